"""A comparison's table as Markdown for people and CSV for programs; the same results give the same bytes."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fxsparse.studies.comparison import Comparison
from fxsparse.studies.plan import PlannedRun
from fxsparse.studies.table import Cell, Group, Line, Table
from fxsparse.training.config import shown

ACCURACY_DIGITS, OTHER_DIGITS = 2, 3  # behind the point: of a percentage; of bits per character


@dataclass(frozen=True)
class About:
    """What stands around the table: the comparison, its runs, and the command that made it."""

    comparison: Comparison
    runs: Sequence[PlannedRun]
    command: str
    failures: Sequence[str] = ()  # one line each
    picture: str | None = None  # the file's name, from the Markdown file's folder


def to_markdown(table: Table, about: About) -> str:
    """The table in the report's layout, its title above and below it all that is needed to make it again."""
    title = about.comparison.title
    parts = [
        f"# {title}" if title else "",
        about.comparison.notes,
        _markdown_table(table),
        _legend(table, about),
        f"![{table.metric} against density and FLOPs]({about.picture})" if about.picture else "",
        "\n".join(["Runs without a result:", "", *(f"- {line}" for line in about.failures)]) if about.failures else "",
        _circumstances(table, about),
        f"Made by:\n\n    {about.command}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    headers, marks = ["method"], [":---"]
    for sparsity in table.columns:
        unit = ", %" if table.metric == "accuracy" else ""
        headers += [f"{table.metric}{unit} at density {1 - sparsity:g}", "FLOPs (train, test)"]
        marks += ["---:", "---:"]
    rows = [headers, marks]
    for number, group in enumerate(table.groups, start=1):
        rows.append(_group_row(table, group, number))
        rows += [_line_row(table, group, line) for line in group.lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _group_row(table: Table, group: Group, number: int) -> list[str]:
    """The group's name, and under FLOPs what training costs in it."""
    has_results = any(line.finished for line in group.lines)
    row = [f"*{_escaped(group.heading) or (f'group {number}' if has_results else 'no results')}*"]
    for sparsity in table.columns:
        costs = [line.cells[sparsity].training_flops for line in group.lines if sparsity in line.finished]
        ends = list(dict.fromkeys(f"{cost:.3f}x" for cost in (min(costs), max(costs)))) if costs else []
        row += ["", f"*{' to '.join(ends)}*" if ends else ""]
    return row


def _line_row(table: Table, group: Group, line: Line) -> list[str]:
    row = [_escaped(table.name(line))]
    for sparsity in table.columns:
        cell = line.cells.get(sparsity)
        if cell is None:
            row += ["", ""]
            continue
        is_best = any(line is best for best in group.best(sparsity, *_precision(table)))
        row += [
            _score(table, cell, is_best),
            f"{cell.training_flops:.3f}x, {cell.inference_flops:.3f}x" if cell.n else "",
        ]
    return row


def _score(table: Table, cell: Cell, is_best: bool) -> str:
    """`91.20 ± 0.15 (3)`, with what is missing of the seeds behind it."""
    missing = cell.planned - cell.n - len(cell.failures)
    faults = [f"{count} {word}" for word, count in sorted(Counter(cell.failures).items())]
    if not cell.n:
        if not faults:
            return "not run"
        return ", ".join([*faults, *([f"{missing} not run"] if missing else [])])
    digits, scale = _precision(table)
    text = f"{cell.mean * scale:.{digits}f}" + (
        f" ± {cell.spread * scale:.{digits}f}" if cell.spread is not None else ""
    )
    seeds = f"{cell.n}" if cell.n == cell.planned else f"{cell.n} of {cell.planned}"
    return f"{f'**{text}**' if is_best else text} ({', '.join([seeds, *faults])})"


def _precision(table: Table) -> tuple[int, float]:
    """Digits behind the point, and the factor to what is written: accuracies are percentages."""
    return (ACCURACY_DIGITS, 100) if table.metric == "accuracy" else (OTHER_DIGITS, 1)


def _legend(table: Table, about: About) -> str:
    seeds = about.comparison.seeds
    better = next((result.higher_is_better for result in table.results), True)
    return (
        f"{table.metric.capitalize()} on the test split ({'higher' if better else 'lower'} is better): mean ± sample "
        f"standard deviation (number of seeds, of {len(seeds)}: {shown(seeds)}). FLOPs are ratios to dense training "
        f"and to a dense forward pass{_dense_cost(table)}. A group reaches to {about.comparison.group_factor:g} times "
        "the training FLOPs of its cheapest line, and the best mean of several in it is bold."
    )


def _dense_cost(table: Table) -> str:
    """What a forward pass of the dense network costs: two FLOPs a multiply-accumulate."""
    costs = sorted({2 * result.dense_macs for result in table.results})
    return f" ({' / '.join(f'{cost:.3g}' for cost in costs)} FLOPs an example)" if costs else ""


def _circumstances(table: Table, about: About) -> str:
    """Model, data, steps, optimizer, device and versions, of the runs that are in the table."""
    configs = {run.folder: run.config for run in about.runs if run.row.shown}
    folders = {result.run_folder for result in table.results}
    used = [config for folder, config in configs.items() if str(folder) in folders] or list(configs.values())
    models = [
        f"{config.model}{''.join(f' {name}={value}' for name, value in config.model_options.items())}"
        for config in used
    ]
    optimizers = [f"{config.optimizer}, learning rate {config.lr:g}, schedule {config.schedule}" for config in used]
    lengths = _most_common(table, {line.label: _steps(line) for line in table.lines if line.finished})
    machines = sorted({result.device for result in table.results})
    versions = sorted({f"{name} {each}" for result in table.results for name, each in result.versions.items()})
    facts = [
        ("Model", _joined(models)),
        ("data", _joined([config.data for config in used])),
        ("length", lengths),
        ("batch", _joined([str(config.batch_size) for config in used])),
        ("optimizer", _joined(optimizers)),
        ("device", "; ".join(machines)),
        ("versions", ", ".join(versions)),
    ]
    return "; ".join(f"{name}: {fact}" for name, fact in facts if fact) + "."


def _steps(line: Line) -> str:
    return _joined([f"{result.steps:,} steps" for cell in line.finished.values() for result in cell.results])


def _most_common(table: Table, by_label: dict[str, str]) -> str:
    """What most rows have, and by name the rows that have something else."""
    if not by_label:
        return ""
    usual = Counter(by_label.values()).most_common(1)[0][0]
    others = [f"{label}: {value}" for label, value in by_label.items() if value != usual]
    return usual + (f" ({', '.join(others)})" if others else "")


def _joined(values: Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("*", "\\*")


def to_csv(table: Table) -> str:
    """One line a row, distribution and sparsity, numbers in full; scores as they are (accuracy in [0, 1])."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        "group label method distribution sparsity metric n planned mean std training_flops inference_flops "
        "density seeds scores failures".split()
    )
    for number, group in enumerate(table.groups, start=1):
        for line in group.lines:
            for sparsity, cell in line.cells.items():
                figures = (
                    (cell.mean, cell.spread, cell.training_flops, cell.inference_flops, cell.density)
                    if cell.n
                    else (None,) * 5
                )
                writer.writerow(
                    [group.heading or number, line.label, line.method, line.distribution or "", sparsity, table.metric]
                    + [cell.n, cell.planned]
                    + [_figure(value) for value in figures]
                    + [" ".join(str(result.seed) for result in cell.results)]
                    + [" ".join(_figure(result.score) for result in cell.results), " ".join(cell.failures)]
                )
    return file.getvalue()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"
