"""Published and measured side by side: what the results in a folder say of each accuracy of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxsparse.core.errors import ConfigError
from fxsparse.reproduction.published import Figure, Place
from fxsparse.reproduction.queue import SEEDS, QueuedRun, Recipe, full_queue, scaled_queue
from fxsparse.reproduction.results import FinishedRun, Found
from fxsparse.studies.execution import States
from fxsparse.studies.plan import PlannedRun
from fxsparse.studies.run_state import DIVERGED, FINISHED, NOT_RUN, RunState, differences
from fxsparse.studies.table import Cell, Table, make_table

WITHIN = 0.3
"""Points of accuracy that a row with three seeds may differ by."""
SCALED_PREFIX = "scaled-"


@dataclass(frozen=True)
class Accuracy:
    """One accuracy of the tables beside its runs.

    Attributes:
        place: which one, and what was published of it.
        cell: of the finished runs.
        diverged: those that did not finish.
    """

    place: Place
    cell: Cell
    diverged: Sequence[FinishedRun] = ()

    @property
    def measured(self) -> Figure | None:
        """Mean and sample standard deviation in percent; None without a run."""
        if not self.cell.n:
            return None
        spread = self.cell.spread
        return Figure(100 * self.cell.mean, None if spread is None else 100 * spread)

    @property
    def difference(self) -> float | None:
        """Measured minus published, in points."""
        if self.measured is None or self.place.figure is None:
            return None
        return self.measured.mean - self.place.figure.mean

    @property
    def verdict(self) -> str:
        """Of an accuracy with three seeds, whether it is within `WITHIN` of the published one; else what is missing."""
        if self.diverged:
            return f"{len(self.diverged)} of {len(SEEDS)} seeds diverged"
        if not self.cell.n:
            return "not run"
        if self.cell.n < len(SEEDS):
            return f"{self.cell.n} of {len(SEEDS)} seeds"
        if self.difference is None:
            return "nothing published"
        return "yes" if round(abs(self.difference), 6) <= WITHIN else "no"


@dataclass(frozen=True)
class Outcome:
    """The full-size runs of one recipe.

    Attributes:
        recipe: what the report leaves open, as these runs have it.
        accuracies: in the order of the tables.
        tables: images -> the same for pictures, of what is finished.
    """

    recipe: Recipe
    accuracies: Sequence[Accuracy]
    tables: Mapping[int, Table]

    @property
    def finished(self) -> int:
        return sum(each.cell.n for each in self.accuracies)


@dataclass(frozen=True)
class Overview:
    """Everything that a folder of results says.

    Attributes:
        outcomes: by recipe, the default one first, also when it has no run.
        scaled: the small runs, as a table; None without one.
        scaled_runs: how many of them there are, and how many are finished.
        complaints: a line for every result that is left out.
    """

    outcomes: Sequence[Outcome]
    scaled: Table | None
    scaled_runs: tuple[int, int]
    scaled_results: Sequence[FinishedRun]
    complaints: Sequence[str]


def overview(found: Found) -> Overview:
    """Sorts results into the tables; those that belong nowhere are left out with a line."""
    complaints = list(found.complaints)
    scaled: dict[str, FinishedRun] = {}
    recipes: dict[Recipe, dict[str, FinishedRun]] = {Recipe(): {}}
    for name, run in found.runs.items():
        try:
            (scaled if name.startswith(SCALED_PREFIX) else recipes.setdefault(_recipe_of(run), {}))[name] = run
        except ConfigError as error:
            complaints.append(f"{name}.json is in no table ({error}); left out")
    outcomes = []
    for recipe in sorted(recipes, key=lambda each: each.slug):
        queue = full_queue(recipe)
        fitting = _fitting(recipes[recipe], queue, complaints)
        outcomes.append(_outcome(recipe, queue, fitting))
    small = scaled_queue()
    fitting = _fitting(scaled, small, complaints)
    finished = [run for run in fitting.values() if run.state == FINISHED]
    table = make_table(*_as_plan(small, fitting)) if finished else None
    return Overview(outcomes, table, (len(small), len(finished)), list(fitting.values()), complaints)


def _recipe_of(run: FinishedRun) -> Recipe:
    config = run.config
    steps = config.steps or 1
    return Recipe(
        nesterov=config.nesterov,
        dropout=float(config.model_options.get("dropout", 0.0)),
        stop_step=round((config.stop_fraction or 0.0) * steps),
        semantics=config.semantics,
    )


def _fitting(
    runs: Mapping[str, FinishedRun], queue: Sequence[QueuedRun], complaints: list[str]
) -> dict[str, FinishedRun]:
    """The runs that are those of the queue; a line for each of the others."""
    by_name = {run.name: run for run in queue}
    fitting = {}
    for name, run in runs.items():
        if name not in by_name:
            complaints.append(f"{name}.json is in no table; left out")
            continue
        changed = differences(run.config, by_name[name].config)
        if changed:
            complaints.append(f"{name}.json was made with {'; '.join(changed)}; left out")
            continue
        fitting[name] = run
    return fitting


def _as_plan(queue: Sequence[QueuedRun], runs: Mapping[str, FinishedRun]) -> tuple[list[PlannedRun], States]:
    """The queue as a plan, and how far its runs are."""
    planned = [run.planned(Path()) for run in queue]
    states = {}
    for run, plan in zip(queue, planned, strict=True):
        done = runs.get(run.name)
        states[plan.folder] = RunState(done.state, done.result, done.reason) if done else RunState(NOT_RUN)
    return planned, states


def _outcome(recipe: Recipe, queue: Sequence[QueuedRun], runs: Mapping[str, FinishedRun]) -> Outcome:
    seeds: dict[tuple[int, float], list[QueuedRun]] = {}
    for run in queue:
        seeds.setdefault((id(run.place.row), run.place.density), []).append(run)
    accuracies = []
    for members in seeds.values():
        done = [runs[run.name] for run in members if run.name in runs]
        results = tuple(each.result for each in done if each.result is not None)
        diverged = [each for each in done if each.state == DIVERGED]
        accuracies.append(Accuracy(members[0].place, Cell(results, len(members)), diverged))
    tables = {}
    for images in sorted({run.place.row.images for run in queue}):
        part = [run for run in queue if run.place.row.images == images]
        if any(run.name in runs and runs[run.name].result for run in part):
            tables[images] = make_table(*_as_plan(part, runs))
    return Outcome(recipe, accuracies, tables)
