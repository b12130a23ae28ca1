"""`docs/reproduction.md` and its pictures, from the files in `results/` alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from fxsparse.reproduction.measure import StepSeconds, read_clocks, read_jobs, read_seconds
from fxsparse.reproduction.published import ROWS, Figure
from fxsparse.reproduction.queue import SEEDS, STEPS, TIMED_AS, QueuedRun, Recipe, full_queue, scaled_queue
from fxsparse.reproduction.slices import Workplace
from fxsparse.reproduction.state_files import make_folder
from fxsparse.reproduction.tables import WITHIN, Accuracy, Outcome, Overview, overview
from fxsparse.studies import table_pictures
from fxsparse.studies.run_state import FINISHED
from fxsparse.studies.table import Table
from fxsparse.training.checkpoint import write_atomically

HEADERS = (
    "method",
    "distribution",
    "density",
    "published",
    "measured (seeds)",
    "difference",
    f"within {WITHIN:g}",
    "FLOPs (train, test)",
    "momentum, dropout",
)


def write(path: Path, place: Workplace) -> list[str]:
    """Write the page and its pictures; lines that say where they are and what was left out.

    Raises:
        CheckpointError: the page cannot be written.
    """
    make_folder(path.parent)
    seen = overview(place.found())
    pictures = dict(_draw(path, seen))
    drawn = {name: target.name for name, (target, line) in pictures.items() if line.startswith("picture:")}
    write_atomically(path, page(seen, place, drawn).encode())
    return [*seen.complaints, *(line for _, line in pictures.values()), f"page: {path}"]


def _draw(path: Path, seen: Overview) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Name of a picture -> its file, and what was said of it."""
    for outcome in seen.outcomes:
        for images, table in outcome.tables.items():
            name = _picture_name(outcome.recipe, images)
            target = path.with_name(f"{path.stem}-{name}.png")
            title = f"WideResNet-22-2 on CIFAR-10, {images:,} images: lines measured, grey crosses published"
            yield name, (target, table_pictures.draw_or_explain(table, target, title, _beside(outcome, images)))
    if seen.scaled is not None:
        target = path.with_name(f"{path.stem}-scaled.png")
        title = "Scaled down: a quarter of the width, 8,000 images, 2,000 steps"
        yield "scaled", (target, table_pictures.draw_or_explain(seen.scaled, target, title))


def _picture_name(recipe: Recipe, images: int) -> str:
    return f"{images // 1000}k" + (f"-{recipe.slug}" if recipe.slug else "")


def _beside(outcome: Outcome, images: int) -> dict:
    """The published figures of what was run."""
    beside: dict[tuple[str, str | None], dict[float, tuple[float, float]]] = {}
    for each in outcome.accuracies:
        row, figure = each.place.row, each.place.figure
        if row.images == images and figure is not None and each.cell.n:
            sparsity = round(1 - each.place.density, 10)
            beside.setdefault((row.label, row.distribution), {})[sparsity] = (figure.mean, figure.spread or 0.0)
    return beside


def page(seen: Overview, place: Workplace, pictures: dict[str, str]) -> str:
    """The page as Markdown; `pictures` are the file names of those that were drawn."""
    parts = [_head(seen)]
    for outcome in seen.outcomes:
        parts += _full_tables(outcome, pictures)
    parts += _scaled(seen, pictures)
    parts += _cost(read_seconds(place.results), place)
    parts.append(_how_to)
    return "\n\n".join(parts) + "\n"


def _head(seen: Overview) -> str:
    default = Recipe()
    queue = full_queue(default)
    finished = sum(outcome.finished for outcome in seen.outcomes)
    done = (
        f"{finished} full-size runs have finished."
        if finished
        else "**No full-size run has finished yet**: every row\nsays *not run*, and nothing below compares this "
        "implementation with the published accuracies."
    )
    return f"""# The report's CIFAR-10 tables, run again

This page is written by `python tools/reproduce.py page` from the files in `results/`; do not edit it by hand.

The published accuracies are those of Sundar and Dwaraknath, *[Reproducibility Report] Rigging the Lottery: Making All
Tickets Winners*, ML Reproducibility Challenge 2020. The queue has {len(queue)} runs, {len(SEEDS)} seeds of
{len(queue) // len(SEEDS)} accuracies. {done}

**Recipe.** WideResNet-22-2; {STEPS[50_000]:,} steps of 128 images (250 epochs of 50,000) or {STEPS[45_000]:,} (of
45,000); SGD, momentum 0.9, weight decay 5e-4; learning rate 0.1, times 0.2 every 30,000 steps; flips and 4-pixel crops;
rewiring every 100 steps, drop fraction 0.3 along a cosine, until step {default.stop_step:,}; uniform (the report's
Random, here with a dense first layer) and ERK. RigL 2x has twice the steps, with the learning rate's steps and the end
of rewiring stretched along. Nesterov momentum and a dropout of {default.dropout:g} inside the blocks are in the
report's code and not in its text: they are options here (`--no-nesterov`, `--dropout 0`), and which was used stands
beside every result. So is the end of rewiring (`--stop-step`): the code has 65,918 for 45,000 images, the text 75,000.
Pruning goes from step 700 to 65,918 of 87,890, as in the code, and over the same shares of the longer runs.

*Measured* is the mean accuracy on the 10,000 test images at the end of training, and the sample standard deviation over
the seeds; *difference* is measured minus published, in points; *within {WITHIN:g}* is judged of rows with {len(SEEDS)}
seeds. FLOPs are those that the runs realised, over dense training and over a dense forward pass."""


def _full_tables(outcome: Outcome, pictures: dict[str, str]) -> list[str]:
    recipe = outcome.recipe
    if recipe.slug and not any(each.cell.n or each.diverged for each in outcome.accuracies):
        return []
    variant = f", with {_recipe_text(recipe)}" if recipe.slug else ""
    parts = []
    for images, heading in (
        (45_000, "45,000 images, 5,000 held out: Table 2, Table 5, supplement"),
        (50_000, "50,000 images: Table 1"),
    ):
        rows = [each for each in _in_order(outcome.accuracies) if each.place.row.images == images]
        if recipe.slug:
            rows = [each for each in rows if each.cell.n or each.diverged]
        if not rows:
            continue
        parts.append(f"## {heading}{variant}")
        align = ("left", "left", "right", "right", "right", "right", "left", "right", "left")
        cells = [_cells(each, recipe) for each in rows]
        parts.append(tabulate(cells, HEADERS, tablefmt="pipe", disable_numparse=True, colalign=align))
        remarks = {f"{each.place.row.label}: {each.place.row.remark}." for each in rows if each.place.row.remark}
        parts += ["\n".join(f"- {remark}" for remark in sorted(remarks))] if remarks else []
        diverged = [
            f"- {run.name} diverged at step {run.stopped_at:,}: {run.reason}." for each in rows for run in each.diverged
        ]
        parts += ["\n".join(diverged)] if diverged else []
        name = _picture_name(recipe, images)
        if name in pictures:
            parts.append(f"![accuracy against density and FLOPs]({pictures[name]})")
        elif not recipe.slug:
            parts.append("No picture: no run of this table has finished.")
    return parts


def _in_order(accuracies: Sequence[Accuracy]) -> list[Accuracy]:
    """As the tables have them: by row, then by density."""
    return sorted(accuracies, key=lambda each: (ROWS.index(each.place.row), each.place.density))


def _cells(each: Accuracy, recipe: Recipe) -> list[str]:
    row, measured, cell = each.place.row, each.measured, each.cell
    difference = "" if each.difference is None else f"{each.difference:+.2f}"
    costs = f"{cell.training_flops:.3f}x, {cell.inference_flops:.3f}x" if cell.n else ""
    return [
        row.label,
        {"erk": "ERK", None: ""}.get(row.distribution, row.distribution or ""),
        f"{each.place.density:g}",
        f"{_shown(each.place.figure, 1)} ({row.source})" if each.place.figure else "-",
        f"{_shown(measured, 2)} ({cell.n})" if measured else "not run",
        difference,
        each.verdict if measured or each.diverged else "",
        costs,
        _recipe_text(recipe) if measured or each.diverged else "",
    ]


def _recipe_text(recipe: Recipe) -> str:
    default = Recipe()
    parts = ["Nesterov" if recipe.nesterov else "ordinary", f"{recipe.dropout:g}"]
    if recipe.stop_step != default.stop_step:
        parts.append(f"rewiring until {recipe.stop_step:,}")
    if recipe.semantics != default.semantics:
        parts.append(f"semantics {recipe.semantics}")
    return ", ".join(parts)


def _shown(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return ""
    spread = "" if figure.spread is None else f" ± {figure.spread:.2f}"
    return f"{figure.mean:.{digits}f}{spread}"


def _scaled(seen: Overview, pictures: dict[str, str]) -> list[str]:
    """The small runs, which are not to be mistaken for the others."""
    planned, finished = seen.scaled_runs
    example = scaled_queue()[0].config
    intro = (
        "## Scaled down: proves the harness, says nothing of the tables\n\n"
        "`python tools/reproduce.py run --scaled` trains the same network at a quarter of the width on "
        f"{example.train_images:,} of the\ntraining images for {example.steps:,} steps of {example.batch_size}, "
        f"without dropout, rewiring every {example.update_interval} steps, on one CPU thread. These accuracies are\n"
        "**not comparable with any published figure**. They show that queue, slices, state files, results, this page "
        f"and its\npictures work. {finished} of {planned} runs have finished."
    )
    if seen.scaled is None:
        return [intro]
    done = [run for run in seen.scaled_results if run.state == FINISHED and run.result is not None]
    seconds = sum(run.result.seconds for run in done if run.result is not None)
    devices = sorted({run.result.device for run in done if run.result is not None})
    versions = sorted({f"torch {run.result.versions['torch']}" for run in done if run.result is not None})
    parts = [intro, _scaled_table(seen.scaled)]
    parts.append(
        "Mean ± sample standard deviation of the test accuracy in percent. "
        f"{seconds / 60:.0f} minutes of training in all, on {'; '.join(devices)}; {'; '.join(versions)}."
    )
    diverged = [run for run in seen.scaled_results if run.result is None]
    if diverged:
        parts.append("\n".join(f"- {run.name} diverged: {run.reason}." for run in diverged))
    if "scaled" in pictures:
        parts.append(f"![scaled down: accuracy against density and FLOPs]({pictures['scaled']})")
    return parts


def _scaled_table(table: Table) -> str:
    rows = []
    for line in table.lines:
        for sparsity, cell in line.finished.items():
            spread = "" if cell.spread is None else f" ± {100 * cell.spread:.2f}"
            density = "1" if line.method == "dense" else f"{1 - sparsity:g}"
            costs = f"{cell.training_flops:.3f}x, {cell.inference_flops:.3f}x"
            accuracy = f"{100 * cell.mean:.2f}{spread} ({cell.n})"
            rows.append([line.label, table.name(line), density, f"{cell.density:.4f}", accuracy, costs])
    rows = [[row[0], *row[2:]] for row in rows]
    headers = ["method (ERK)", "density asked", "achieved", "accuracy, small-scale (seeds)", "FLOPs (train, test)"]
    return tabulate(
        rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", "right", "right", "right", "right")
    )


def _cost(measured: dict[str, list[StepSeconds]], place: Workplace) -> list[str]:
    """What the full tables need, from the seconds that were measured."""
    parts = ["## What the full tables need"]
    queue = full_queue()
    steps = sum(run.steps for run in queue)
    first = sum(run.steps for run in queue[: len(queue) // len(SEEDS)])
    parts.append(
        f"{steps:,} optimizer steps: {first:,} for the first seed of every row, and as many for each of the others."
    )
    if not measured:
        parts.append("No device has been measured yet: `python tools/reproduce.py time`.")
    jobs, clocks = read_jobs(place.results), read_clocks(place.results)
    for device, rows in measured.items():
        by_method = {row.method: row for row in rows}
        cells = [
            [
                row.method,
                f"{row.ordinary:.4f}",
                "" if row.update is None else f"{row.update:.4f}",
                f"{row.mean:.4f}",
                f"{row.mean * STEPS[45_000] / 3600:.1f}",
            ]
            for row in rows
        ]
        headers = ["method", "s a step", "s of a step that rewires", "mean", "hours of a run of 87,890 steps"]
        table = tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 4))
        unit = "Processor seconds" if clocks[device] == "process_time" else "Seconds"
        least = f"the least of {rows[0].steps}, as other work only adds to it"
        parts += [f"{unit} of a full-size training step, one run at a time, on {device} ({least}):", table]
        missing = {run.place.row.label for run in queue} - set(by_method) - set(TIMED_AS)
        if not missing:
            total = sum(run.steps * by_method[_timed_as(run)].mean for run in queue)
            one = sum(run.steps * by_method[_timed_as(run)].mean for run in queue[: len(queue) // 3])
            parts.append(
                f"At that rate all {len(queue)} runs take {total / 86_400:.1f} days, the first seed of every row "
                f"{one / 86_400:.1f}, and the first four runs (dense, static, SET, RigL with ERK at 0.1) "
                f"{sum(run.steps * by_method[run.place.row.label].mean for run in queue[:4]) / 3600:.0f} hours; "
                "evaluations not counted."
            )
        else:
            parts.append(f"Not measured there: {', '.join(sorted(missing))}.")
    for device, (chosen, tried) in jobs.items():
        told = ", ".join(f"{each.count}: {each.problem or f'{each.steps_a_second:.1f}'}" for each in tried)
        parts.append(f"Runs at a time on {device}, and their steps a second together: {told}. Chosen: {chosen}.")
    return parts


def _timed_as(run: QueuedRun) -> str:
    return TIMED_AS.get(run.place.row.label, run.place.row.label)


_how_to = """## Running it

    fxsparse data cifar10                              # where torchvision's download is out of reach
    python tools/reproduce.py run --minutes 50         # the next fifty minutes of the queue; the same command goes on
    python tools/reproduce.py status                   # what is done, what has begun, what the rest will take
    python tools/reproduce.py run --only '45k-*-0.1-seed0' --no-nesterov --dropout 0
    python tools/reproduce.py time                     # seconds of a step of every method on this device
    python tools/reproduce.py page                     # this page

Every prefix of the queue is of use: one seed of dense, static, SET and RigL with ERK at 0.1 comes first, then the
uniform ones, density 0.2, the other methods, the 50,000 images, and then all of it for the second and the third seed.

At the end of a slice, and on Ctrl-C, every run that has begun is saved to one file of at most 16 MB in
`runs/reproduction/states`. With those files and `results/` the queue goes on elsewhere; on a CPU a run that was stopped
ends with the same bits as one that was not. `--jobs auto` (the default) measures once how many runs at a time an
accelerator makes the most steps a second with; on a CPU it is 1. Several machines at once each take their own part of
the queue, with `--only`. A run that diverges is recorded with its reason and not tried again; to try it again, remove
its file in `results/` and its folder in `runs/reproduction`."""
