"""Writes docs/flops.md: every FLOP figure of the paper's and the report's tables beside ours.

    python tools/flops_page.py [--output docs/flops.md]

The published figures are data below, each table with its source; ours are computed when the script runs.
Nothing is trained: figures that depend on how densities moved in a run are listed without one of ours.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import fxsparse.models as models
from fxsparse.flops import FlopReport, average_step, plan_flops
from fxsparse.runtime.schedule import gradual_sparsity

PAPER = "Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020 (arXiv 1911.11134)"
REPORT = "Sundar and Dwaraknath, [Reproducibility Report] Rigging the Lottery, ML Reproducibility Challenge 2020"


@dataclass(frozen=True)
class Row:
    """One published line: ratios to dense, training and inference; None where the table has none."""

    method: str
    sparsity: float
    train: float | None
    test: float | None
    plan: Mapping[str, object] | None = None  # how ours is planned; None: it depends on the run
    ledger: str = "static"
    longer: float = 1.0
    why: str = ""


UNIFORM: Mapping[str, object] = {"distribution": "uniform"}
ERK: Mapping[str, object] = {"distribution": "erk"}
RUN = "depends on the densities that the run came to"
PAPERS_UNIFORM_9 = "the paper's counts the first layer as sparse; with it dense it is 0.13, as in the authors' README"

FIGURE_2 = [
    *(Row(name, 0.8, 0.23, 0.23, UNIFORM, kind) for name, kind in (("Static", "static"), ("SNIP", "static"))),
    Row("Small-Dense", 0.8, 0.20, 0.20, None, why="a dense network of width 0.465; torchvision's has no such option"),
    *(Row(name, 0.8, 0.23, 0.23, UNIFORM, kind) for name, kind in (("SET", "set"), ("RigL", "rigl"))),
    Row("Small-Dense 5x", 0.8, 1.01, 0.20, None, why="see Small-Dense"),
    Row("RigL 5x", 0.8, 1.14, 0.23, UNIFORM, "rigl", 5),
    Row("Static (ERK)", 0.8, 0.42, 0.42, ERK),
    Row("DSR", 0.8, 0.40, 0.40, None, why=RUN),
    Row("RigL (ERK)", 0.8, 0.42, 0.42, ERK, "rigl"),
    Row("RigL 5x (ERK)", 0.8, 2.09, 0.42, ERK, "rigl", 5),
    Row("SNFS (ERK)", 0.8, 0.61, 0.42, ERK, "snfs", why="densities taken as not moving"),
    Row(
        "Pruning", 0.8, 0.56, 0.23, UNIFORM, "pruning", why="cubic from step 10,000 to 25,000 of 32,000 (the notebook)"
    ),
    Row("Pruning 1.5x", 0.8, 0.84, 0.23, UNIFORM, "pruning", 1.5),
    *(
        Row(name, 0.9, 0.10, 0.10, UNIFORM, kind, why=PAPERS_UNIFORM_9)
        for name, kind in (("Static", "static"), ("SNIP", "static"), ("SET", "set"), ("RigL", "rigl"))
    ),
    Row("Small-Dense", 0.9, 0.12, 0.12, None, why="a dense network of width 0.34"),
    Row("Small-Dense 5x", 0.9, 0.60, 0.12, None, why="see Small-Dense"),
    Row("RigL 5x", 0.9, 0.52, 0.10, UNIFORM, "rigl", 5, why=PAPERS_UNIFORM_9),
    Row("Static (ERK)", 0.9, 0.24, 0.24, ERK),
    Row("DSR", 0.9, 0.30, 0.30, None, why=RUN),
    Row("RigL (ERK)", 0.9, 0.25, 0.24, ERK, "rigl"),
    Row("RigL 5x (ERK)", 0.9, 1.23, 0.24, ERK, "rigl", 5),
    Row("SNFS (ERK)", 0.9, 0.50, 0.24, ERK, "snfs", why="densities taken as not moving"),
    Row("Pruning", 0.9, 0.51, 0.10, UNIFORM, "pruning", why=PAPERS_UNIFORM_9),
    Row("Pruning 1.5x", 0.9, 0.76, 0.10, UNIFORM, "pruning", 1.5, why=PAPERS_UNIFORM_9),
]

README_RATIOS = [
    *(Row(f"RigL 5x {d}", s, a, b, {"distribution": d}, "rigl", 5) for d, s, a, b in (
        ("erk", 0.8, 2.09, 0.42), ("uniform", 0.8, 1.14, 0.23), ("erk", 0.9, 1.23, 0.24), ("uniform", 0.9, 0.66, 0.13),
        ("erk", 0.95, 0.63, 0.12), ("uniform", 0.95, 0.42, 0.08), ("erk", 0.965, 0.45, 0.09),
        ("uniform", 0.965, 0.34, 0.07),
    )),
    Row("RigL 5x erk", 0.99, 0.29, 0.05, {"distribution": "erk", "dense": "first"}, "rigl", 5, why="first layer dense"),
    *(Row(f"RigL {d}", s, a, a, {"distribution": d}, "rigl") for d, s, a in (
        ("erk", 0.8, 0.42), ("uniform", 0.8, 0.23), ("erk", 0.9, 0.24), ("uniform", 0.9, 0.13),
    )),
]  # fmt: skip

TABLE_2 = [
    *(Row(name, 0.8, 0.20, 0.20, UNIFORM, name.lower()) for name in ("Static", "SET", "RigL")),
    Row("Small Dense", 0.8, 0.20, 0.20, None, why="a dense network of as many parameters"),
    Row("SET (ERK)", 0.8, 0.35, 0.35, ERK, "set"),
    Row("RigL (ERK)", 0.8, 0.35, 0.35, ERK, "rigl"),
    Row("Static 2x", 0.8, 0.40, 0.20, UNIFORM, "static", 2),
    Row("SET 2x", 0.8, 0.41, 0.20, UNIFORM, "set", 2),
    Row("RigL 2x", 0.8, 0.41, 0.20, UNIFORM, "rigl", 2),
    Row("RigL 2x (ERK)", 0.8, 0.70, 0.35, ERK, "rigl", 2),
    *(Row(name, 0.8, train, test, None, why=RUN) for name, train, test in (
        ("Lottery", 0.68, 0.27), ("SNFS", 0.66, 0.49), ("SNFS (ERK)", 0.66, 0.49), ("SNFS 2x", 1.32, 0.98),
        ("Pruning", 0.41, 0.27),
    )),
    Row("SET (ERK)", 0.9, 0.17, 0.17, ERK, "set"),
    Row("RigL (ERK)", 0.9, 0.17, 0.17, ERK, "rigl"),
    Row("RigL 2x (ERK)", 0.9, 0.34, 0.17, ERK, "rigl", 2, why="the report's is twice its rounded 0.17"),
    Row("Small Dense", 0.9, 0.11, 0.11, None, why="a dense network of as many parameters"),
    *(Row(name, 0.9, train, test, None, why=RUN) for name, train, test in (
        ("Lottery", 0.45, 0.13), ("SNFS", 0.51, 0.27), ("SNFS (ERK)", 0.52, 0.28), ("SNFS 2x", 1.02, 0.27),
        ("Pruning", 0.32, 0.13),
    )),
]  # fmt: skip

TABLE_3 = [
    *(Row(name, 0.8, 0.20, 0.20, UNIFORM, name.lower()) for name in ("Static", "SET", "RigL")),
    Row("RigL 2x", 0.8, 0.41, 0.20, UNIFORM, "rigl", 2),
    Row("RigL 3x", 0.8, 0.61, 0.20, UNIFORM, "rigl", 3),
    Row("RigL 2x (ERK)", 0.8, 0.76, 0.38, ERK, "rigl", 2),
    *(Row(name, 0.8, train, test, None, why=RUN) for name, train, test in (
        ("SNFS", 0.70, 0.55), ("SNFS (ERK)", 0.69, 0.54), ("Pruning", 0.45, 0.25), ("Lottery", 0.81, 0.25),
    )),
    Row("Static (ERK)", 0.9, 0.22, 0.22, ERK),
    Row("SET (ERK)", 0.9, 0.22, 0.22, ERK, "set"),
    Row("RigL (ERK)", 0.9, 0.23, 0.22, ERK, "rigl"),
    Row("RigL 3x", 0.9, 0.30, 0.10, UNIFORM, "rigl", 3),
    Row("RigL 2x (ERK)", 0.9, 0.46, 0.22, ERK, "rigl", 2),
    *(Row(name, 0.9, train, test, None, why=RUN) for name, train, test in (
        ("SNFS", 0.58, 0.37), ("SNFS (ERK)", 0.59, 0.38), ("Pruning", 0.36, 0.11), ("Lottery", 0.62, 0.11),
    )),
]  # fmt: skip

NOTEBOOK = {  # (width, sparsity, distribution, which layers stay dense) -> MFLOPs
    (1.0, 0.0, "uniform", "depthwise"): 1141.544,
    (1.0, 0.75, "erk", "depthwise"): 599.144,
    (1.0, 0.85, "erk", "depthwise"): 439.152,
    (1.0, 0.90, "erk", "depthwise"): 334.134,
    (1.0, 0.95, "erk", "depthwise"): 205.281,
    (1.0, 0.75, "uniform", "depthwise"): 330.769,
    (1.0, 0.85, "uniform", "depthwise"): 222.666,
    (1.0, 0.90, "uniform", "depthwise"): 168.614,
    (1.0, 0.95, "uniform", "depthwise"): 114.563,
    (1.0, 0.75, "erk", "first"): 588.355,
    (1.0, 0.85, "erk", "first"): 422.419,
    (1.0, 0.90, "erk", "first"): 312.956,
    (1.0, 0.95, "erk", "first"): 180.359,
    (0.47, 0.0, "erk", "first"): 266.539,
    (0.353, 0.0, "erk", "first"): 154.770,
    (0.285, 0.0, "erk", "first"): 103.825,
    (0.204, 0.0, "erk", "first"): 56.617,
}

WIDE_ERK = "the notebook gives the wide network the sparsities that ERK finds for width 1"
FIGURE_3 = [  # sparsity, method, published ratio, key of NOTEBOOK's scheme
    (0.75, "Small-Dense 5x", 0.23, (0.47, 0.0, "erk", "first")),
    (0.75, "RigL 5x, Pruning (uniform)", 0.27, (1.0, 0.75, "uniform", "first")),
    (0.75, "RigL 5x (ERK)", 0.52, (1.0, 0.75, "erk", "first")),
    (0.9, "Small-Dense 5x", 0.09, (0.285, 0.0, "erk", "first")),
    (0.9, "RigL 5x, Pruning (uniform)", 0.12, (1.0, 0.9, "uniform", "first")),
    (0.9, "RigL 5x (ERK)", 0.27, (1.0, 0.9, "erk", "first")),
    (0.75, "Big-Sparse 5x", 0.98, (1.98, 0.75, "uniform", "first")),
    (0.75, "Big-Sparse 5x (ERK)", 1.91, (1.98, 0.75, "erk", "first")),
]


class ConvClassifier(nn.Module):
    """A linear layer as a 1x1 convolution, as in Keras's MobileNet: ERK then gives it a little more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None, None]).flatten(1)


@cache
def network(name: str, width: float = 1.0) -> tuple[nn.Module, Tensor]:
    """A network and its input on the meta device."""
    with torch.device("meta"):
        if name == "keras mobilenet":
            model = models.build("mobilenet_v1", width=width)
            model.classifier = ConvClassifier(model.classifier.in_features, 1000)
            return model, torch.empty(1, 3, 224, 224)
        return models.build(name), models.example_input(name, batch=1).to("meta")


@cache
def planned(name: str, sparsity: float, plan: tuple[tuple[str, object], ...], width: float = 1.0) -> FlopReport:
    model, x = network(name, width)
    return plan_flops(model, x, sparsity=sparsity, **dict(plan))  # type: ignore[arg-type]


def training_ratio(row: Row, name: str, report: FlopReport, convention: str) -> float:
    """Training cost over that of a dense run of the plain length."""
    sparse, dense = report.flops, report.dense_flops
    if row.ledger == "pruning":
        schedule = {"begin": 10_000, "end": 25_000, "interval": 1_000, "final": row.sparsity}
        sparsities = [gradual_sparsity(step, **schedule) for step in range(0, 32_001, 1_000)]  # type: ignore[arg-type]
        plan = tuple((row.plan or {}).items())
        costs = [planned(name, s, plan).under(convention).flops for s in sparsities]
        sparse = sum(costs) / len(costs)
    return row.longer * average_step(row.ledger, sparse, dense, update_interval=100) / (3 * dense)


def ratio_table(name: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        "| S | method | train | test | ours, MACs: train | test | ours, micronet: train | test | remark |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = ["", "", "", ""]
        if row.plan is not None:
            cells = []
            for convention in ("macs", "micronet"):
                report = planned(name, row.sparsity, tuple(row.plan.items())).under(convention)
                cells += [f"{training_ratio(row, name, report, convention):.4f}", f"{report.ratio:.4f}"]
        given = [f"{value:.2f}" if value is not None else "" for value in (row.train, row.test)]
        lines.append(f"| {row.sparsity:g} | {row.method} | {' | '.join([*given, *cells])} | {row.why} |")
    return lines


def mobilenet(width: float, sparsity: float, distribution: str, dense: str) -> FlopReport:
    """MobileNet-v1 under the notebook's schemes: depthwise layers without masks, or the first layer only."""
    exclude = ("depthwise",) if dense == "depthwise" else ("first",)
    if dense == "first" and distribution == "uniform":
        return planned("keras mobilenet", sparsity, (("distribution", "uniform"),), width)
    return planned("keras mobilenet", sparsity, (("distribution", distribution), ("exclude", exclude)), width)


def mobilenet_tables() -> list[str]:
    dense = mobilenet(1.0, 0.0, "uniform", "depthwise")
    lines = [
        "| width | S | distribution | dense layers | notebook, MFLOPs | ours, micronet | ours, 2 x MACs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (width, sparsity, distribution, which), published in NOTEBOOK.items():
        report = mobilenet(width, sparsity, distribution, which)
        lines.append(
            f"| {width:g} | {sparsity:g} | {distribution} | {which} | {published:.3f} "
            f"| {report.under('micronet').flops / 1e6:.3f} | {report.flops / 1e6:.3f} |"
        )
    lines += [
        "",
        "Uniform with depthwise layers dense keeps the first layer dense as well. Widths are rounded by us and",
        "truncated by the notebook, which moves the small networks by up to a few percent; and in ERK's equation the",
        "notebook rounds the number of zeros of every layer down, which moves the third decimal.",
        "",
        f"### MobileNet-v1 on ImageNet (figure 3, right; inference): {PAPER}",
        "",
        "| S | method | paper | ours, MACs | ours, micronet | remark |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for sparsity, method, published, scheme in FIGURE_3:
        report = mobilenet(*scheme)
        ratios = [report.under(c).flops / dense.under(c).flops for c in ("macs", "micronet")]
        why = WIDE_ERK if method.startswith("Big-Sparse") and "ERK" in method else ""
        lines.append(f"| {sparsity:g} | {method} | {published:.2f} | {ratios[0]:.4f} | {ratios[1]:.4f} | {why} |")
    return [
        *lines,
        "",
        "The text says that depthwise layers stay dense; the figures are those of a network where only the first",
        "layer does (the notebook's runs with `conv1` at 0), which is what stands here.",
    ]


def dense_table() -> list[str]:
    published = {
        "resnet50": "8.2e9 (README and figure 2)",
        "keras mobilenet": "1.1e9 (figure 3), 1141.544e6 (notebook)",
        "wide_resnet22_2": "3.15e8 (report, table 2)",
        "resnet50_cifar": "2.59e9 (report, tables 3 and 6)",
        "mobilenet_v2": "",
    }
    lines = [
        "| network | published FLOPs | ours, MACs | ours, 2 x MACs | ours, micronet |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figure in published.items():
        report = plan_flops(*network(name))
        lines.append(
            f"| {name.replace('keras mobilenet', 'mobilenet_v1')} | {figure} | {report.dense_macs:,} "
            f"| {report.flops:,} | {report.under('micronet').flops:,.0f} |"
        )
    return lines


def write_page() -> str:
    """The page as Markdown."""
    parts = [
        "# FLOPs: published figures and ours",
        "",
        "This page is written by `python tools/flops_page.py`; do not edit it by hand. Ratios are to a dense network,",
        "trained for the plain number of steps. A training step costs what the report's supplement says:",
        "3 f_d dense, 3 f_s static and SET, (3 dT f_s + 2 f_s + f_d) / (dT + 1) RigL with dT = 100,",
        "2 E[f_s] + f_d SNFS, 3 E[f_s] gradual pruning.",
        "",
        "Two conventions. *MACs*: one for every active weight and use, padding included; FLOPs are twice that.",
        "*micronet*: multiplications plus additions as the paper's notebooks count (`fxsparse/flops/micronet.py`).",
        "They differ by the bias, the ReLU and the saved addition of every output, by output sizes of padded layers,",
        "and by depthwise layers; ratios of the two agree to about 0.003 for these networks.",
        "",
        "## Dense networks",
        "",
        *dense_table(),
        "",
        f"## ResNet-50 on ImageNet (figure 2, left): {PAPER}",
        "",
        *ratio_table("resnet50", FIGURE_2),
        "",
        "## ResNet-50 on ImageNet: README of google-research/rigl, extended and plain training",
        "",
        *ratio_table("resnet50", README_RATIOS),
        "",
        "## MobileNet-v1: outputs stored in google-research/rigl, `imagenet_resnet/colabs/MobileNet_Counting.ipynb`",
        "",
        *mobilenet_tables(),
        "",
        f"## WideResNet-22-2 on CIFAR-10 (table 2): {REPORT}",
        "",
        *ratio_table("wide_resnet22_2", TABLE_2),
        "",
        f"## ResNet-50 on CIFAR-100 (table 3): {REPORT}",
        "",
        *ratio_table("resnet50_cifar", TABLE_3),
        "",
        "The report's uniform networks have all layers at the same density, so its figures are 1 - S; ours keep the",
        "first layer dense, as in the paper, and are a little higher. Rows whose figures the published text does not",
        "give unambiguously (methods that share a group's figure) are left out.",
        "",
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).parents[1] / "docs" / "flops.md"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(True)
    Path(arguments.output).write_text(write_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
