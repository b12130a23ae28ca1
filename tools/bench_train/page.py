"""The page in Markdown."""

from typing import Any

from bench_parts.machine import in_a_line
from tabulate import tabulate

from .goals import WORKS
from .results import GOAL_TITLES, TITLES, goals, of_sparsify, table

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def page(sections: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, both devices."""
    parts = [INTRODUCTION, tabulate(goals(sections), GOAL_TITLES, "github", disable_numparse=True), ""]
    for device, title in DEVICES.items():
        parts.append(f"## {title}\n")
        held = sections.get(device)
        lines = table(held["groups"], WORKS) if held else []
        if not held or not held["groups"]:
            parts.append(
                f"Not run. `python tools/bench.py train --device {device} --write docs/bench/train.md` does.\n"
            )
            continue
        parts.append(f"On {in_a_line(held['machine'])}.\n")
        parts += [f"- {line}" for line in shapes(held["groups"])]
        missing = [row for row in WORKS if row not in {group["row"] for group in held["groups"]}]
        if missing:
            parts.append(f"- not run: {', '.join(missing)}")
        parts += ["", tabulate(lines, TITLES, "github", disable_numparse=True), ""]
        others = of_sparsify(held["groups"])
        if others:
            parts += [tabulate(others, ("", "least s", "first s", ""), "github", disable_numparse=True), ""]
    return "\n".join(parts) + MEANING


def shapes(groups: list[dict[str, Any]]) -> list[str]:
    """What each row trained on, and how it was measured."""
    lines = []
    for group in groups:
        case, settings = group["case"], group["settings"]
        what = "seconds of `sparsify`"
        if case:
            layout = ", channels_last" if case["format"] == "channels_last" else ""
            pictures = f"{case['batch']} x {case['size']} px"
            what = f"batches of {pictures}, {case['classes']} classes, {case['precision']}{layout}"
        threads = f"{settings['threads']} thread" + "s" * (settings["threads"] > 1)
        lines.append(f"{group['row']}: {what}; {settings['rounds']} turns, {threads}, {group['date']}")
    return lines


INTRODUCTION = """# What masked training costs

Written by `python tools/bench.py train --write docs/bench/train.md`; `--device cuda` adds what a GPU measures. RigL at
90% beside dense training, and beside rigl-torch 0.5.2 and sparsimony 0.1.0, each installed into an environment of its
own.
"""

MEANING = """
## How it is measured

Each contender has a process of its own, and all take turns in one run: a stretch of ordinary steps, then an update
step. A step is forward, backward and SGD with momentum and weight decay (fused, for all) on a batch that stays the
same. Of all turns the least counts; `of medians` divides the medians, `of processor` the least processor seconds,
which others on the machine disturb less.

- `over` is what a contender is divided by: dense training in the same mode. `dense compiled` is `torch.compile` as it
  is by default, `CUDA graphs` is its mode `reduce-overhead`. The other packages run eagerly.
- `rewiring` is the time of the call that rewires, in dense steps: for fxsparse `optimizer.step()` of an update step,
  which moves no weights, for rigl-torch its `pruner()`, for sparsimony its `sparsifier.step()`.
- `overhead` is the mean of 99 ordinary steps and one update step over a dense step.
- `memory` is the peak of an ordinary step over dense (for dense: in MiB), `update step` that of an update step. On a
  GPU it is what PyTorch's allocator counts (`max_memory_allocated`; with CUDA graphs, which keep their memory,
  `max_memory_reserved`). On a CPU it is every tensor that is reachable before the step and what the step allocates
  above that, as the profiler is told by PyTorch's allocator; what oneDNN takes by itself is not seen.
- `sparsity exact`: whether after so many steps every layer has the number of active weights that its sparsity gives
  it, and no other weight differs from 0; with the sparsity over the masked weights. While measuring, masks change
  every few steps, not every hundredth.
- `loss`: at the first step, and the mean of the last five. A contender whose loss does not fall, or whose masks do
  not change, is left out, and so is a compiled one whose first loss is not that of eager mode.

Differences that remain: fxsparse and sparsimony spread sparsity by ERK, rigl-torch uniformly with the first layer
dense, the only way it knows. rigl-torch masks LayerNorm's weights as well. Neither of the two masks the joint input
weight of `nn.MultiheadAttention`, which is a quarter of vit_b_16. sparsimony refuses weights in channels_last; with it
only the pictures are.
"""
