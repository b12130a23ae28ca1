"""Pictures of one run, or of several side by side: the metric over steps, density per layer.

matplotlib is optional: without it `draw` returns False and nothing else happens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxsparse.training.metrics import read_metrics
from fxsparse.training.objective import ACCURACY, METRICS

NAMED_LAYERS = 30  # up to so many are named on the axis; more are numbered


def draw(run_folders: Sequence[str | Path], path: str | Path, labels: Sequence[str] | None = None) -> bool:
    """Draw finished runs into the picture `path`; False if matplotlib is not installed.

    `labels` name the runs in the legend; by default their methods do.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    results = [json.loads((Path(folder) / "result.json").read_text()) for folder in run_folders]
    records = [read_metrics(Path(folder) / "metrics.jsonl") for folder in run_folders]
    labels = labels or [result["method"] for result in results]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2)
    _metric_over_steps(left, results, records, labels)
    _density_per_layer(right, results, labels)
    figure.suptitle(f"{results[0]['model']} on {results[0]['data']}")
    figure.savefig(path, dpi=110)
    return True


def draw_or_explain(run_folders: Sequence[str | Path], path: str | Path) -> str:
    """`draw`, and a line that says where the picture is or why there is none."""
    try:
        return f"picture: {path}" if draw(run_folders, path) else "no picture: pip install matplotlib"
    except OSError as error:
        return f"no picture: could not write {path}: {error.strerror or error}"


def _metric_over_steps(axes: Any, results: list[dict], records: list[list[dict]], labels: Sequence[str]) -> None:
    metric = METRICS[results[0].get("metric", ACCURACY.name)]
    last_step = max(record["step"] for run in records for record in run)
    late = []
    for result, run, label in zip(results, records, labels, strict=True):
        evaluations = [r for r in run if r["kind"] == "eval"]
        points = [(r["step"], r[metric.key]) for r in evaluations if r["split"] == result["watched_split"]]
        at_end = metric.of(result["test_loss"], result["test_accuracy"])
        axes.plot(*zip(*points, strict=True), marker=".", label=f"{label}: {at_end:.4f} at the end")
        late += [r[metric.key] for r in evaluations if r["step"] >= last_step / 10]
    # the first climb, or fall, would flatten what comes after it
    if metric.higher_is_better:
        axes.set_ylim(max(0.0, min(late) - 0.02), None)
    else:
        axes.set_ylim(None, max(late) + 0.02)
    axes.set(xlabel="optimizer steps", ylabel=f"{metric.name} ({results[0]['watched_split']})", title=metric.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if metric.higher_is_better else "upper right")


def _density_per_layer(axes: Any, results: list[dict], labels: Sequence[str]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["densities"]))
    width = 0.8 / len(results)
    for index, (result, label) in enumerate(zip(results, labels, strict=True)):
        here = [position for position, name in enumerate(names) if name in result["densities"]]
        places = [position + (index + 0.5) * width - 0.4 for position in here]
        heights = [result["densities"][names[position]] for position in here]
        axes.bar(places, heights, width, label=f"{label}: {1 - result['sparsity']:.4f} overall")
    if len(names) <= NAMED_LAYERS:
        axes.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=90, fontsize=8)
    axes.set(xlabel="layer", ylabel="density", title="density per layer", ylim=(0, 1.15))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper center", ncols=3, fontsize=9)
