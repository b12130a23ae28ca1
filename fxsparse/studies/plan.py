"""From a comparison to its runs, in an order in which every run finds what it needs.

A run that another starts from (the pruning run behind a lottery ticket) is its prerequisite and stands before
it. Seeds go round last, so that a comparison which was stopped has all its rows with fewer seeds rather than a
few rows with all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.core.errors import ConfigError
from fxsparse.studies.comparison import Comparison, Row
from fxsparse.training.config import TrainConfig, config_options

Axis = tuple[Any, ...]  # values of one axis; (None,) where the row does not depend on it


@dataclass(frozen=True)
class PlannedRun:
    """One run: a row at a sparsity, a distribution (None where the row does not depend on it) and a seed.

    Attributes:
        config: resolved.
        needs: folders of the runs that have to be finished before this one starts.
    """

    row: Row
    sparsity: float | None
    distribution: str | None
    seed: int
    config: TrainConfig
    folder: Path
    needs: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """For messages: `rigl, sparsity 0.9, erk, seed 0`."""
        sparsity = None if self.sparsity is None else f"sparsity {self.sparsity:g}"
        return ", ".join(part for part in (self.row.label, sparsity, self.distribution, f"seed {self.seed}") if part)


def make_plan(comparison: Comparison, out: str | Path) -> list[PlannedRun]:
    """All runs of a comparison, below the folder `out`, prerequisites first; nothing is trained or written.

    Raises:
        ConfigError: an option has a wrong value, a row needs a run that is not in the plan, or rows need each
            other in a circle; in one line that names the row.
    """
    rows = {row.label: row for row in comparison.rows}
    ordered, kept_steps = _ordered(rows), steps_to_keep(rows, comparison.options)
    runs: dict[tuple[str, Any, Any, int], PlannedRun] = {}
    for seed in comparison.seeds:
        for row in ordered:
            sparsities, distributions = axes_of(row, rows, comparison)
            for sparsity in sparsities:
                for distribution in distributions:
                    needed = {
                        option: _prerequisite(runs, rows[label], row, sparsity, distribution, seed)
                        for option, label in row.references.items()
                    }
                    run = _plan_run(comparison, Path(out), row, sparsity, distribution, seed, needed)
                    keep = tuple(sorted({*(run.config.keep_steps or ()), *kept_steps.get(row.label, ())}))
                    run = dataclasses.replace(run, config=dataclasses.replace(run.config, keep_steps=keep))
                    runs[row.label, sparsity, distribution, seed] = run
    used = {folder for run in runs.values() for folder in run.needs}
    while True:  # leave out what a row without a place in the table has too much
        kept = [run for run in runs.values() if run.row.shown or run.folder in used]
        if len(kept) == len(runs):
            return kept
        runs = {(run.row.label, run.sparsity, run.distribution, run.seed): run for run in kept}
        used = {folder for run in kept for folder in run.needs}


def axes_of(row: Row, rows: Mapping[str, Row], comparison: Comparison) -> tuple[Axis, Axis]:
    """The sparsities and the distributions at which a row is run."""
    sparsities: Axis = comparison.sparsities
    distributions: Axis = comparison.distributions
    if "sparsity" in row.options:
        sparsities = (row.options["sparsity"],)
    if "distribution" in row.options:
        distributions = (row.options["distribution"],)
    if row.method == "dense":
        sparsities = (None,)
    if ignores_distribution(row, rows, comparison.options):
        distributions = (None,)
    return sparsities, distributions


def ignores_distribution(row: Row, rows: Mapping[str, Row], shared: Mapping[str, Any] | None = None) -> bool:
    """Whether a row's densities come from elsewhere: everything dense, one global ranking, or another run."""
    of_method = {**(shared or {}), **row.options}.get("method_options")
    scope = of_method.get("scope") if isinstance(of_method, Mapping) else None
    sources = [rows[row.references[name]] for name in ("masks_from", "densities_from") if name in row.references]
    return (
        row.method in ("dense", "small-dense")
        or scope == "global"
        or any(ignores_distribution(source, rows, shared) for source in sources)
    )


def steps_to_keep(rows: Mapping[str, Row], shared: Mapping[str, Any] | None = None) -> dict[str, set[int]]:
    """Label -> steps at which other rows need that row's weights: where they rewind to, 0 for a lottery ticket."""
    found: dict[str, set[int]] = {}
    for row in rows.values():
        options = {**(shared or {}), **row.options}
        source, step = row.references.get("weights_from"), options.get("rewind")
        if source is None and row.method == "lottery" and "weights_from" not in options:
            source, step = row.references.get("masks_from"), step or 0
        if source is not None and isinstance(step, int):
            found.setdefault(source, set()).add(step)
    return found


def _ordered(rows: Mapping[str, Row]) -> list[Row]:
    """The rows in their own order, each behind those that it refers to."""
    done: dict[str, Row] = {}

    def add(row: Row, path: tuple[str, ...]) -> None:
        if row.label in path:
            raise ConfigError(f"rows need each other in a circle: {' -> '.join((*path, row.label))}")
        for label in row.references.values():
            add(rows[label], (*path, row.label))
        done.setdefault(row.label, row)

    for row in rows.values():
        add(row, ())
    return list(done.values())


def _prerequisite(
    runs: Mapping[tuple[str, Any, Any, int], PlannedRun],
    target: Row,
    row: Row,
    sparsity: float | None,
    distribution: str | None,
    seed: int,
) -> PlannedRun:
    """The run of `target` that belongs to this one; an axis that one of the two does not have is not compared."""
    found = [
        run
        for run in runs.values()
        if run.row is target
        and run.seed == seed
        and (None in (run.sparsity, sparsity) or run.sparsity == sparsity)
        and (None in (run.distribution, distribution) or run.distribution == distribution)
    ]
    if len(found) != 1:
        place = ", ".join(str(part) for part in (sparsity, distribution) if part is not None) or "dense"
        how_many = "has no run" if not found else f"has {len(found)} runs"
        raise ConfigError(f"{row.label} at {place} needs one run of {target.label}, which {how_many} there")
    return found[0]


def _plan_run(
    comparison: Comparison,
    out: Path,
    row: Row,
    sparsity: float | None,
    distribution: str | None,
    seed: int,
    needed: Mapping[str, PlannedRun],
) -> PlannedRun:
    values: dict[str, Any] = {"method": row.method, "seed": seed}
    for name, value in {**comparison.options, **row.options}.items():
        shared = comparison.options.get(name)
        values[name] = {**shared, **value} if isinstance(shared, Mapping) and isinstance(value, Mapping) else value
    for name, value in (("sparsity", sparsity), ("distribution", distribution)):
        if value is not None:
            values[name] = value
    for name, run in needed.items():
        if name not in config_options():
            raise ConfigError(f"{row.label}: there is no option {name!r}")
        values[name] = str(run.folder)
    try:
        config = TrainConfig.from_dict(values).resolved()
    except ConfigError as error:
        raise ConfigError(f"{comparison.source}: {row.label}: {error}") from error
    parts = [row.slug, "" if sparsity is None else str(sparsity), distribution or "", f"seed{seed}"]
    folder = out / "runs" / "-".join(part for part in parts if part)
    needs = tuple(dict.fromkeys(run.folder for run in needed.values()))
    return PlannedRun(row, sparsity, distribution, seed, config, folder, needs)
