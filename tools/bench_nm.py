"""`python tools/bench.py nm`: 2:4 inference of a ViT-L-sized encoder on a GPU, over the dense one, both compiled."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from fxsparse.kernels import semi_structured

GOAL = 1.3
"""Times faster than dense, compiled, in bfloat16."""

TOKENS = 197
"""Of an image of 224x224 in patches of 16x16, and the class token."""

HEADER = ["contender", "ms", "faster than dense x"]
PAGE = """# 2:4 inference

Written by `python tools/bench.py nm --write FILE`. {legend}

`dense`: the encoder as it is. `dense graph`: `sparse.fold()`, the captured graph of the same weights without masks.
`2:4`: `sparse.lower(backend="cuda")`. `x` is over the faster of the two dense ones, compiled and eager ones apart.

{table}

{verdict}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--layers", type=int, default=24, help="of the encoder; ViT-L has 24")
    parser.add_argument("--width", type=int, default=1024, help="of the encoder; ViT-L has 1024, and 4 times it inside")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=20, help="times each is measured, in turns; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", type=Path, help="also write the table to this file, in Markdown")


def bench_nm(arguments: argparse.Namespace) -> None:
    """Forward passes; where there is no device with such kernels, a word and nothing else."""
    try:
        kernels = semi_structured.find_kernels(torch.device("cuda"))
    except fxsparse.ConfigError as error:
        raise SystemExit(f"bench nm needs a GPU with 2:4 kernels: {error}") from None
    found = measured(arguments, kernels.device)
    rows = [[name, figures["ms"], figures["faster"]] for name, figures in found["contenders"].items()]
    formats = ("", ".3f", ".2f")
    print(tabulate(rows, HEADER, floatfmt=formats))
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernels.name}"
    legend = (
        f"{arguments.layers} layers of width {arguments.width}, {arguments.batch} x {TOKENS} tokens, "
        f"{arguments.dtype}, torch.compile mode {arguments.mode}; {machine}; median of {arguments.rounds}, in turns."
    )
    faster = found["contenders"]["2:4, compiled"]["faster"]
    verdict = (
        f"2:4 is {faster:.2f} times as fast as dense, compiled (goal: {GOAL}); {found['lowered']} of "
        f"{found['weights']} weights run on sparse kernels; outputs differ by {found['difference']:.1e} of the largest."
    )
    print(legend + "\n" + verdict)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        table = tabulate(rows, HEADER, "github", floatfmt=formats)
        arguments.write.write_text(PAGE.format(table=table, legend=legend, verdict=verdict))
    if arguments.json:
        given = {key: str(value) for key, value in vars(arguments).items() if key not in ("run", "json", "write")}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "arguments": given, **found}, indent=1) + "\n")


@torch.no_grad()
def measured(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a forward pass of each contender, and how far the outputs are apart."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    dense = encoder(arguments.layers, arguments.width).to(device, dtype).eval()
    x = torch.randn(arguments.batch, TOKENS, arguments.width, device=device, dtype=dtype)
    sparse = fxsparse.sparsify(dense, x[:2], "static", granularity="2:4", verify=False).eval()
    lowered = sparse.lower(backend="cuda", verify=False)
    nets = {"dense": dense, "dense graph": sparse.fold().eval(), "2:4": lowered}
    expected, found = nets["dense graph"](x[:2]), lowered(x[:2])
    calls: dict[str, Callable[[Tensor], Tensor]] = {f"{name}, eager": net for name, net in nets.items()}
    calls |= {f"{name}, compiled": torch.compile(net, mode=arguments.mode) for name, net in nets.items()}
    milliseconds = medians({name: lambda call=call: call(x) for name, call in calls.items()}, arguments.rounds, device)
    contenders = {}
    for name, own in milliseconds.items():
        how = name.rpartition(", ")[2]
        base = min(milliseconds[f"dense, {how}"], milliseconds[f"dense graph, {how}"])
        contenders[name] = {"ms": own, "faster": base / own}
    return {
        "contenders": contenders,
        "difference": float((found - expected).abs().max() / expected.abs().max()),
        "lowered": sum(decision.lowered for decision in lowered.decisions),
        "weights": len(lowered.decisions),
    }


def encoder(layers: int, width: int) -> nn.Module:
    """The encoder of torchvision's vision transformers: (batch, tokens, width) -> the same."""
    vit = torchvision.models.VisionTransformer(224, 16, layers, width // 64, width, 4 * width)
    return vit.encoder


def medians(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each call, taken in turns; three rounds before warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            own = milliseconds_of(call, device)
            if turn >= 3:
                taken[name].append(own)
    return {name: statistics.median(own) for name, own in taken.items()}


def milliseconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, on the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
