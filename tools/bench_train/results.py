"""The file of results, one section a device, and the figures made from it."""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from bench_parts.files import write_whole
from bench_parts.machine import describe

from .goals import ABSENT, GOALS, INTERVAL, SPARSIFY, WORKS, Goal

Group = dict[str, Any]
Record = dict[str, Any]


class Results:
    """Finished rows of a device, on disk after each; those of the other device stay as they are."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.sections: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        machine = describe()
        held = self.sections.get(device)
        if held is None or held["machine"] != machine:
            if held is not None:
                print(f"{path}: the figures of {device} are of another machine or other versions: they start anew")
            self.sections[device] = {"machine": machine, "groups": []}

    @property
    def groups(self) -> list[Group]:
        return self.sections[self.device]["groups"]

    def finished(self, wanted: Group) -> bool:
        """Whether a row is there as it is wanted, nothing of ours failed."""
        return any(
            all(group[key] == wanted[key] for key in ("row", "case", "settings"))
            and not any(record["failed"] for record in group["records"] if record["label"].startswith("fxsparse"))
            for group in self.groups
        )

    def add(self, group: Group) -> None:
        others = [held for held in self.groups if held["row"] != group["row"]]
        self.sections[self.device]["groups"] = [*others, {**group, "date": date.today().isoformat()}]
        write_whole(self.path, json.dumps(self.sections, indent=1) + "\n")


def figures(record: Record, records: Iterable[Record], clock: str = "least") -> dict[str, float]:
    """What a record comes to over its dense contender: times, the rewiring in dense steps, bytes.

    `step`, `overhead` (of an interval of 100 steps, one of them an update step), `memory` and `update_memory` are
    ratios; `rewiring` is in dense steps. Of the row `sparsify`: `seconds`.
    """
    if record["failed"]:
        return {}
    if "seconds" in record:
        return {"seconds": record["seconds"]}
    dense = next((r for r in records if r["label"] == record["over"] and not r["failed"]), None)
    if dense is None:
        return {}
    own, step = record[clock], dense[clock]["step"]
    return {
        "step": own["step"] / step,
        "rewiring": own["rewiring"] / step,
        "overhead": ((INTERVAL - 1) * own["step"] + own["update"]) / INTERVAL / step,
        "memory": record["memory"]["ordinary"] / dense["memory"]["ordinary"],
        "update_memory": record["memory"]["update"] / dense["memory"]["ordinary"],
    }


TITLES = (
    "network",
    "contender",
    "over",
    "ms a step",
    "step",
    "of medians",
    "of processor",
    "rewiring",
    "overhead",
    "memory",
    "update step",
    "sparsity exact",
    "loss",
)


def table(groups: Iterable[Group], rows: Iterable[str]) -> list[list[str]]:
    """A line for each contender of each row that was measured."""
    by_row = {group["row"]: group for group in groups}
    lines = []
    for row in rows:
        for record in by_row[row]["records"] if row in by_row and row != "sparsify" else ():
            if record["failed"]:
                lines.append([row, record["label"], f"left out: {record['failed']}", *[""] * (len(TITLES) - 3)])
                continue
            lines.append([row, record["label"], record["over"] or "", f"{1e3 * record['least']['step']:.1f}"])
            lines[-1] += _cells(record, by_row[row]["records"])
    return lines


def _cells(record: Record, records: list[Record]) -> list[str]:
    end = record["end"]
    loss = f"{end['losses'][0]:.2f} to {end['losses'][1]:.2f}"
    found = figures(record, records)
    if not found:
        mib = f"{record['memory']['ordinary'] / 2**20:.0f} MiB"
        return ["", "", "", "", "", mib, "", "" if record["over"] is None else exactness(end), loss]
    medians, processor = (figures(record, records, clock)["step"] for clock in ("median", "cpu"))
    times = [f"{value:.3f}x" for value in (found["step"], medians, processor)]
    return [
        *times,
        f"{found['rewiring']:.2f}",
        f"{found['overhead']:.3f}x",
        f"{found['memory']:.2f}x",
        f"{found['update_memory']:.2f}x",
        exactness(end),
        loss,
    ]


def exactness(end: dict[str, Any]) -> str:
    """Whether every layer has the active weights that its sparsity gives it, and none beside them is not 0."""
    after = f"after {end['steps']:,} steps, {end['rewirings']} rewirings"
    if end["wrong_layers"] or end["stray"]:
        return f"no {after}: {end['wrong_layers']} layers, {end['stray']} weights"
    return f"yes {after} ({end['sparsity']:.4f})"


def of_sparsify(groups: Iterable[Group]) -> list[list[str]]:
    """The row `sparsify`: seconds, the least and the first."""
    lines = []
    for record in next((group["records"] for group in groups if group["row"] == "sparsify"), ()):
        seconds = [f"{record[key]:.2f}" if key in record else "" for key in ("seconds", "first_seconds")]
        lines.append([SPARSIFY[record["label"]], *seconds, record["failed"] or ""])
    return lines


def goals(sections: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table of goals: a line each, with what was measured on each device and whether it is met."""
    lines = []
    for goal in GOALS:
        line = [goal.title]
        for device in ("cpu", "cuda"):
            line += [goal.bounds.get(device, "-"), _reached(goal, device, sections.get(device, {}).get("groups", []))]
        lines.append(line)
    return lines


GOAL_TITLES = ("goal", "CPU", "measured", "GPU", "measured")


def _reached(goal: Goal, device: str, groups: list[Group]) -> str:
    if device not in goal.bounds:
        return "-"
    if goal.otherwise:
        return f"not measured by this command: {goal.otherwise}"
    case = WORKS[goal.row].case(device) if goal.row in WORKS else {}
    for group in groups:
        for record in group["records"] if group["row"] == goal.row and group["case"] == case else ():
            if record["label"] == goal.contender:
                found = figures(record, group["records"])
                if record["failed"] == ABSENT:
                    return "not run"
                if goal.figure not in found:
                    return f"missed: {record['failed'] or 'nothing to compare with'}"
                bound, unit = _number(goal.bounds[device])
                value = found[goal.figure]
                shown = f"{value:.3f}{unit}" if unit == "x" else f"{value:.2f}{unit}"
                return f"{shown}, {'met' if value <= bound else 'missed'}"
    return "not run"


def _number(bound: str) -> tuple[float, str]:
    """ "1.03x" -> 1.03, "x"; "2 s" -> 2.0, " s"."""
    digits = bound.rstrip("xs ")
    return float(digits), bound[len(digits) :]
