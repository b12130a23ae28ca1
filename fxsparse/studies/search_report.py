"""The trials of a search as Markdown and CSV, and the contour of its score over two of the options."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from fxsparse.studies.search import Search, results, validation_scores
from fxsparse.training.config import shown

SYMBOLS = {"drop_fraction": "alpha", "update_interval": "delta_t", "lr": "learning rate"}
CONTOUR_POINTS = 4  # fewer trials span no surface


@dataclass(frozen=True)
class TrialRow:
    """One trial: its options, its score on the validation part, and what its training cost.

    Attributes:
        score: as the study has it, a mean over the seeds; None where the trial is not finished.
        spread: sample standard deviation over the seeds; None of a single one or where they lie elsewhere.
        training_flops: mean ratio to dense training; None where the runs lie in another folder.
    """

    number: int
    state: str
    options: dict[str, Any]
    score: float | None
    spread: float | None
    training_flops: float | None


def trial_rows(search: Search) -> list[TrialRow]:
    """All trials of the study, by number."""
    return [_row(search, trial) for trial in search.study.get_trials(deepcopy=False)]


def _row(search: Search, trial: FrozenTrial) -> TrialRow:
    complete = trial.state == TrialState.COMPLETE
    done = results(search, trial) if complete else []
    scores = validation_scores(search, trial) if complete else []
    return TrialRow(
        number=trial.number,
        state=trial.state.name.lower(),
        options=dict(trial.params),
        score=trial.value if complete else None,
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        training_flops=statistics.fmean(result.training_flops for result in done) if done else None,
    )


def best_row(search: Search, rows: Sequence[TrialRow]) -> TrialRow | None:
    """The row with the best score, the first of equals."""
    found = [row for row in rows if row.score is not None]
    sign = 1 if search.metric.higher_is_better else -1
    return max(found, key=lambda row: sign * (row.score or 0.0)) if found else None


def to_markdown(search: Search, rows: Sequence[TrialRow], command: str, picture: str | None = None) -> str:
    """The table, the best trial in bold, and what is needed to make it again."""
    config, best = search.config, best_row(search, rows)
    names = list(search.space.distributions())
    metric = f"validation {search.metric.name}"
    headers = ["trial", *(f"{SYMBOLS[name]} ({name})" for name in names), metric, "training FLOPs", "state"]
    lines = [headers, ["---:"] * (len(headers) - 1) + [":---"]]
    for row in rows:
        score = "" if row.score is None else f"{row.score:.4f}"
        score += "" if row.spread is None else f" ± {row.spread:.4f}"
        cells = [
            str(row.number),
            *(_written(row.options.get(name)) for name in names),
            score,
            "" if row.training_flops is None else f"{row.training_flops:.3f}x",
            row.state,
        ]
        lines.append([f"**{cell}**" if row is best and cell else cell for cell in cells])
    sparsity = f"sparsity {config.sparsity:g}" if config.sparsity is not None else f"FLOPs {config.flops:g}"
    parts = [
        f"# {config.method} at {sparsity}, {config.distribution}, {config.model} on {config.data}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"Score: {search.metric.name} on the validation part after the last step, mean over seeds "
        f"{shown(search.seeds)}; the {'highest' if search.metric.higher_is_better else 'lowest'} is best. The test "
        "part has no influence on the search.",
        f"![{metric} over {' and '.join(SYMBOLS[name] for name in names[:2])}]({picture})" if picture else "",
        f"Made by:\n\n    {command}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(search: Search, rows: Sequence[TrialRow]) -> str:
    """One line a trial, numbers in full."""
    names = list(search.space.distributions())
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *names, "score", "std", "training_flops", "state"])
    for row in rows:
        figures = [*(row.options.get(name) for name in names), row.score, row.spread, row.training_flops]
        writer.writerow([row.number, *("" if value is None else f"{value:.10g}" for value in figures), row.state])
    return file.getvalue()


def draw_contour(search: Search, rows: Sequence[TrialRow], path: str | Path) -> bool:
    """The score over the first two options that are searched, as the report's supplement draws it.

    False if matplotlib is not installed, if fewer than two options are searched, or too few trials are finished.
    """
    names = list(search.space.distributions())[:2]
    done = [row for row in rows if row.score is not None]
    if len(names) < 2 or len(done) < CONTOUR_POINTS:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes: Any = figure.subplots()
    x, y = ([row.options[name] for row in done] for name in names)
    scores = [row.score for row in done if row.score is not None]
    colours = {"cmap": "viridis", "vmin": min(scores), "vmax": max(scores)}
    surface = _surface(axes, x, y, scores, colours)
    points = axes.scatter(x, y, c=scores, edgecolors="black", s=45, zorder=3, **colours)
    best = best_row(search, rows)
    assert best is not None
    place = [best.options[name] for name in names]
    axes.scatter(*([value] for value in place), marker="*", s=320, color="red", edgecolors="white", zorder=4)
    axes.annotate(f"{best.score:.4f}", place, textcoords="offset points", xytext=(9, 9), fontweight="bold")
    figure.colorbar(surface or points, ax=axes, label=f"validation {search.metric.name}")
    axes.set(xlabel=f"{SYMBOLS[names[0]]} ({names[0]})", ylabel=f"{SYMBOLS[names[1]]} ({names[1]})")
    for name, set_scale in zip(names, (axes.set_xscale, axes.set_yscale), strict=True):
        set_scale("log" if name == "lr" else "linear")
    axes.use_sticky_edges = False  # or the surface ends the axes, and the points on its edge are cut
    axes.margins(0.08)
    config = search.config
    axes.set_title(f"{config.method}, {config.model} on {config.data}, {len(done)} trials")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _surface(
    axes: Any, x: Sequence[float], y: Sequence[float], scores: Sequence[float], colours: dict[str, Any]
) -> Any:
    """Filled contours between the points; None where they span no area or all score the same."""
    if len(set(scores)) < 2:
        return None
    try:
        return axes.tricontourf(x, y, scores, levels=12, alpha=0.85, **colours)
    except (RuntimeError, ValueError):  # all points on one line
        return None


def _written(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
