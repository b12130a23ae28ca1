"""The results of a comparison as a table: lines, columns, groups of like cost, and the best of each group.

As in the report's Table 2, there is a column of scores and FLOPs for each sparsity, and lines of like FLOPs stand
together, because a method that may spend more should not be compared with one that may not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxsparse.core.errors import ConfigError
from fxsparse.studies.comparison import GROUP_FACTOR
from fxsparse.studies.execution import States
from fxsparse.studies.plan import PlannedRun
from fxsparse.studies.run_state import DIVERGED, FAILED, FINISHED
from fxsparse.training.summary import Result


@dataclass(frozen=True)
class Cell:
    """The seeds of one line at one sparsity.

    Attributes:
        results: of the finished seeds.
        planned: number of seeds asked for.
        failures: `failed` or `diverged`, once a seed that ended so.
    """

    results: tuple[Result, ...]
    planned: int
    failures: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.results)

    @property
    def mean(self) -> float:
        """Mean score over the finished seeds."""
        return statistics.fmean(result.score for result in self.results)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation (n - 1) of the score; None of a single seed."""
        return statistics.stdev(result.score for result in self.results) if self.n > 1 else None

    @property
    def training_flops(self) -> float:
        """Mean of the realised training FLOPs over those of dense training."""
        return statistics.fmean(result.training_flops for result in self.results)

    @property
    def inference_flops(self) -> float:
        """Mean of the FLOPs of a forward pass over those of the dense network."""
        return statistics.fmean(result.inference_flops for result in self.results)

    @property
    def density(self) -> float:
        """Mean of the densities that were achieved."""
        return statistics.fmean(result.density for result in self.results)


@dataclass(frozen=True)
class Line:
    """One line of the table; `cells` by sparsity, for the sparsities that the row has runs at."""

    label: str
    method: str
    distribution: str | None
    cells: Mapping[float, Cell]
    heading: str | None = None  # of the group that it was put in by hand

    @property
    def finished(self) -> dict[float, Cell]:
        return {sparsity: cell for sparsity, cell in self.cells.items() if cell.n}


@dataclass(frozen=True)
class Group:
    """Lines of like training FLOPs, or those of one heading, or the ones without a result."""

    lines: tuple[Line, ...]
    heading: str | None = None

    def best(self, sparsity: float, digits: int, scale: float) -> list[Line]:
        """The lines with the best mean score at a sparsity, all of those that are equal when rounded as shown.

        Nothing is best among fewer than two.
        """
        found = [(line, line.cells[sparsity]) for line in self.lines if sparsity in line.finished]
        if len(found) < 2:
            return []
        sign = 1 if found[0][1].results[0].higher_is_better else -1
        shown = [round(sign * cell.mean * scale, digits) for _, cell in found]
        return [line for (line, _), value in zip(found, shown, strict=True) if value == max(shown)]


@dataclass(frozen=True)
class Table:
    """A comparison's table; `metric` is what the scores are ("accuracy", "bits per character")."""

    columns: tuple[float, ...]
    groups: tuple[Group, ...]
    metric: str
    distributions: tuple[str, ...] = ()

    @property
    def lines(self) -> list[Line]:
        return [line for group in self.groups for line in group.lines]

    @property
    def results(self) -> list[Result]:
        """Of all runs, each once."""
        found = {r.run_folder: r for line in self.lines for cell in line.cells.values() for r in cell.results}
        return list(found.values())

    def name(self, line: Line) -> str:
        """The line's label, with its distribution where the table has several: `RigL (ERK)`."""
        if line.distribution is None or len(self.distributions) < 2:
            return line.label
        return f"{line.label} ({_WRITTEN.get(line.distribution, line.distribution)})"


_WRITTEN = {"er": "ER", "erk": "ERK"}


def make_table(runs: Sequence[PlannedRun], states: States, group_factor: float = GROUP_FACTOR) -> Table:
    """The table of a plan with whatever is finished of it.

    A group reaches from its cheapest line to `group_factor` times its training FLOPs.

    Raises:
        ConfigError: runs of different metrics, which do not compare.
    """
    shown = [run for run in runs if run.row.shown]
    columns = tuple(sorted({run.sparsity for run in shown if run.sparsity is not None}))
    by_line: dict[tuple[str, str | None], list[PlannedRun]] = {}
    for run in shown:
        by_line.setdefault((run.row.label, run.distribution), []).append(run)
    order = list(dict.fromkeys(run.row.label for run in shown))
    lines = [_make_line(members, columns or (0.0,), states) for members in by_line.values()]
    lines.sort(key=lambda line: order.index(line.label))
    metrics = sorted({r.metric for line in lines for cell in line.cells.values() for r in cell.results})
    if len(metrics) > 1:
        raise ConfigError(f"the runs have different measures: {', '.join(metrics)}")
    return Table(
        columns=columns or (0.0,),
        groups=tuple(_grouped(lines, group_factor)),
        metric=metrics[0] if metrics else "accuracy",
        distributions=tuple(dict.fromkeys(line.distribution for line in lines if line.distribution)),
    )


def _make_line(runs: Sequence[PlannedRun], columns: Sequence[float], states: States) -> Line:
    """A row at a distribution; runs that have no sparsity (dense) stand in every column."""
    row = runs[0].row
    cells = {}
    for column in columns:
        here = [run for run in runs if run.sparsity in (column, None)]
        if here:
            found = [states[run.folder] for run in here]
            cells[column] = Cell(
                results=tuple(state.result for state in found if state.word == FINISHED and state.result),
                planned=len(here),
                failures=tuple(state.word for state in found if state.word in (FAILED, DIVERGED)),
            )
    return Line(row.label, row.method, runs[0].distribution, cells, row.group)


def _grouped(lines: Sequence[Line], factor: float) -> list[Group]:
    """Groups from the cheapest to the dearest, then those put together by hand, then lines without a result."""
    costed = sorted((line for line in lines if line.finished and line.heading is None), key=_cost)
    groups: list[list[Line]] = []
    for line in costed:
        if groups and _fits(line, groups[-1], factor):
            groups[-1].append(line)
        else:
            groups.append([line])
    found = [Group(tuple(sorted(group, key=lines.index))) for group in groups]
    for heading in dict.fromkeys(line.heading for line in lines if line.heading is not None):
        found.append(Group(tuple(line for line in lines if line.heading == heading), heading))
    without = tuple(line for line in lines if not line.finished and line.heading is None)
    return [*found, *([Group(without)] if without else [])]


def _fits(line: Line, group: Sequence[Line], factor: float) -> bool:
    """Whether in every column the dearest of the group and `line` is at most `factor` times the cheapest."""
    for sparsity in line.finished:
        costs = [each.cells[sparsity].training_flops for each in (*group, line) if sparsity in each.finished]
        if max(costs) > factor * min(costs) * (1 + 1e-9):
            return False
    return True


def _cost(line: Line) -> float:
    """Logarithm of the training FLOPs over those at the columns' densities alone, a mean over the columns.

    Divided by the densities, a line that is finished at other sparsities than the rest can still be placed.
    """
    return statistics.fmean(
        math.log(max(cell.training_flops, 1e-12) / max(1 - sparsity, 1e-12)) for sparsity, cell in line.finished.items()
    )
