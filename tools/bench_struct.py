"""`python tools/bench.py struct`: what cutting out channels is worth, beside an ordinary model of those widths."""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
import fxsparse.models as models
from fxsparse.passes.compact_channels import set_sizes

INTERVAL = 100
"""Steps between rewirings that the amortised training step counts with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["resnet50_cifar", "wide_resnet22_2"], help="of models/")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.2, 0.5])
    parser.add_argument("--formats", nargs="+", default=["contiguous", "channels_last"], help="memory formats")
    parser.add_argument("--distribution", default="uniform", help="uniform, er or erk")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured, in turns; the least counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", type=Path, help="also write the table to this file, in Markdown")


def bench_struct(arguments: argparse.Namespace) -> None:
    """Forward passes and training steps: dense, masked, compact, an ordinary model of the compact one's widths."""
    torch.set_num_threads(arguments.threads)
    rows, found = [], []
    for name in arguments.models:
        for layout in arguments.formats:
            for density in arguments.densities:
                figures = measured(name, layout, density, arguments)
                found.append(figures)
                rows.append([figures[key] for key in HEADER])
                print(tabulate([rows[-1]], TITLES, floatfmt=FORMATS), flush=True)
    print(tabulate(rows, TITLES, floatfmt=FORMATS))
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads"
    legend = f"x: over dense, same memory format; batch {arguments.batch}, {arguments.device}, {machine}"
    print(legend)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(PAGE.format(table=tabulate(rows, TITLES, "github", floatfmt=FORMATS), legend=legend))
    if arguments.json:
        given = {key: str(value) for key, value in vars(arguments).items() if key not in ("run", "json", "write")}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "arguments": given, "rows": found}, indent=1) + "\n")


HEADER = {
    "model": "model",
    "format": "format",
    "density": "density",
    "achieved": "left",
    "forward_dense": "forward s",
    "forward_masked": "masked x",
    "forward_compact": "compact x",
    "forward_ordinary": "ordinary x",
    "step_dense": "step s",
    "step_masked": "masked x",
    "step_compact": "compact x",
    "step_ordinary": "ordinary x",
    "step_amortised": "with rewiring x",
}
TITLES = list(HEADER.values())
PAGE = """# What cutting out channels saves

Written by `python tools/bench.py struct --write FILE`. RigL-struct. {legend}. Least of several rounds, taken in turns.

`left`: share of the masked weights' parameters. `forward` and `step`: seconds of a dense forward pass and training
step (SGD with momentum). `masked` multiplies masks into dense tensors. `compact` is what `sparse.compact()` gives;
in training it is the step between two rewirings with `attach(compact=True)`. `ordinary` is the user's own model
with those widths. `with rewiring` is the mean over an interval of 100 steps, its update step at full size and both
changes of size included.

{table}
"""
FORMATS = ("", "", ".2f", ".4f", ".4f", ".3f", ".3f", ".3f", ".4f", ".3f", ".3f", ".3f", ".3f")


def measured(name: str, layout: str, density: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds of dense, all others over it."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    device = torch.device(arguments.device)
    model = models.build(name, num_classes=arguments.classes)
    model = model.to(device, memory_format=memory_format)
    shape = models.example_input(name).shape[1:]
    x = torch.randn(arguments.batch, *shape, device=device).contiguous(memory_format=memory_format)
    y = torch.randint(arguments.classes, (arguments.batch,), device=device)

    def sparse_module() -> Any:
        given = {"sparsity": 1 - density, "distribution": arguments.distribution, "update_interval": 4}
        return fxsparse.sparsify(model, x, "rigl-struct", stop_fraction=1.0, verify=False, **given)

    masked, trained = sparse_module(), sparse_module()
    small = masked.compact()
    widths = ordinary(model, small)
    check(masked, small, widths, x)

    nets = {"dense": model, "masked": masked, "compact": small, "ordinary": widths}
    forward = best_of({key: forward_of(net.eval(), x) for key, net in nets.items()}, arguments.rounds, device)
    steps = {key: step_of(net.train(), x, y)[0] for key, net in nets.items() if key != "compact"}
    step, optimizer = step_of(trained.train(), x, y)
    trained.attach(optimizer, 10_000, compact=True)
    by_place = cycles(step, arguments.rounds, device)
    step_seconds = best_of(steps, arguments.rounds, device)
    compact_step = min(by_place[1], by_place[2])
    update = by_place[3] + by_place[0]  # before the update step the module takes its full size, after it the small one
    amortised = ((INTERVAL - 2) * compact_step + update) / INTERVAL
    left = sum(p.numel() for n, p in small.named_parameters() if n in masked.masks)
    return {
        "model": name,
        "format": layout,
        "density": density,
        "achieved": left / sum(site.numel for site in masked.sites),
        "forward_dense": forward["dense"],
        **{f"forward_{key}": forward[key] / forward["dense"] for key in ("masked", "compact", "ordinary")},
        "step_dense": step_seconds["dense"],
        **{f"step_{key}": step_seconds[key] / step_seconds["dense"] for key in ("masked", "ordinary")},
        "step_compact": compact_step / step_seconds["dense"],
        "step_amortised": amortised / step_seconds["dense"],
    }


def ordinary(model: nn.Module, small: nn.Module) -> nn.Module:
    """The user's own model, run by its own `forward`, with the small one's tensors in place of its own."""
    own = copy.deepcopy(model)
    for path, module in own.named_modules():
        other = small.get_submodule(path)
        for key, tensor in other._parameters.items():
            module._parameters[key] = None if tensor is None else nn.Parameter(tensor.detach().clone())
        for key, tensor in other._buffers.items():
            if key in module._buffers:
                module._buffers[key] = None if tensor is None else tensor.clone()
    set_sizes(own, {}, {})
    return own


@torch.no_grad()
def check(masked: nn.Module, small: nn.Module, widths: nn.Module, x: Tensor) -> None:
    outputs = [net.eval()(x) for net in (masked, small, widths)]
    for other in outputs[1:]:
        if not torch.allclose(outputs[0], other, rtol=1e-4, atol=1e-5 * float(outputs[0].abs().max())):
            raise SystemExit(f"outputs differ by {(outputs[0] - other).abs().max():.2e}")


def forward_of(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def step_of(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], Any], torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return run, optimizer


def timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best_of(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Least seconds of each, taken in turns after one round to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for key, call in calls.items():
            seconds = timed(call, device)
            if number:
                best[key] = min(best[key], seconds)
    return best


def cycles(step: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Least seconds of the steps t = 0, 1, 2, 3 modulo 4, of a run that rewires at every fourth."""
    best = [float("inf")] * 4
    for number in range(4 * (rounds + 1) + 1):
        seconds = timed(step, device)
        if number > 4:
            best[number % 4] = min(best[number % 4], seconds)
    return best
