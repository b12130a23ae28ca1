"""Benchmarks: `python tools/bench.py flops` times counting, `struct` what cutting out channels is worth.

`sparse` times sparse kernels beside everything dense, and SparseProp; `train` what masked training costs; `nm` 2:4
inference on a GPU.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_nm
import bench_struct
import torch
import torchvision
from bench_sparse import command as bench_sparse
from bench_train import command as bench_train
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse.passes.capture_annotated import capture_annotated
from fxsparse.passes.count_flops import count_flops as count_nodes


def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Least wall-clock seconds of each call, taken in turns, so that a busy machine treats all alike."""
    best = [float("inf")] * len(calls)
    for round in range(repeats + 1):
        for index, call in enumerate(calls):
            gc.collect()
            start = time.perf_counter()
            call()
            if round:  # the first round warms up
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def bench_flops(arguments: argparse.Namespace) -> None:
    """Counting on meta tensors: `FlopCounterMode` (one forward pass), and ours from the model and from its graph."""
    rows = []
    for name in arguments.models:
        with torch.device("meta"):
            model, x = torchvision.models.get_model(name).eval(), torch.empty(1, 3, 224, 224)

        def theirs(model: Any = model, x: Any = x) -> int:
            with FlopCounterMode(display=False) as counter:
                model(x)
            return counter.get_total_flops()

        captured = capture_annotated(model, x)
        ours = fxsparse.count_flops(model, x)
        if ours.dense_flops != theirs():
            raise SystemExit(f"{name}: {ours.dense_flops:,} FLOPs by ours, {theirs():,} by FlopCounterMode")
        calls = (
            theirs,
            lambda model=model, x=x: fxsparse.count_flops(model, x),
            lambda captured=captured: count_nodes(captured.model, captured.graphs["eval"], {}),
        )
        reference, whole, count = seconds(calls, arguments.repeats)
        rows.append(
            [name, ours.dense_macs, 1e3 * reference, 1e3 * whole, whole / reference, 1e3 * count, count / reference]
        )
    header = ["model", "MACs", "FlopCounterMode ms", "capture + count ms", "x", "count the graph ms", "x"]
    print(tabulate(rows, header, intfmt=",", floatfmt=("", "", ".1f", ".1f", ".2f", ".1f", ".2f")))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, least of {arguments.repeats}, meta tensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    flops = commands.add_parser("flops", help="counting FLOPs beside torch.utils.flop_counter")
    flops.add_argument(
        "--models", nargs="+", default=["resnet50", "vit_l_16"], help="torchvision classification models"
    )
    flops.add_argument("--repeats", type=int, default=15)
    flops.set_defaults(run=bench_flops)
    struct = commands.add_parser("struct", help="channels: dense, masked, compact, an ordinary model of those widths")
    bench_struct.add_arguments(struct)
    struct.set_defaults(run=bench_struct.bench_struct)
    sparse = commands.add_parser("sparse", help="sparse kernels beside PyTorch, ONNX Runtime, OpenVINO, SparseProp")
    bench_sparse.add_arguments(sparse)
    sparse.set_defaults(run=bench_sparse.bench_sparse)
    train = commands.add_parser("train", help="masked training beside dense, rigl-torch and sparsimony")
    bench_train.add_arguments(train)
    train.set_defaults(run=bench_train.bench_train)
    nm = commands.add_parser("nm", help="2:4 inference of a ViT-L-sized encoder on a GPU, over dense compiled")
    bench_nm.add_arguments(nm)
    nm.set_defaults(run=bench_nm.bench_nm)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
