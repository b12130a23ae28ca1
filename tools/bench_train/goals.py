"""What is trained on which device, and what each figure is to reach."""

from dataclasses import dataclass
from typing import Any

INTERVAL = 100
"""Steps between rewirings that the amortised overhead counts with."""

SPARSITY = 0.9

ABSENT = "not wanted (--without)"
"""Why a contender is left out that the command was told to leave out."""

STEPS = {"cpu": 100, "cuda": 1000}
"""Steps after which the sparsity is looked at, where --steps does not say."""

STRETCH = {"cpu": 3, "cuda": 10}
"""Ordinary steps that a turn times as one stretch, so that a device's queue stays filled."""

WARM = {"cpu": 0, "cuda": 3}
"""Steps before them that no one times: memory that other contenders were lent is taken again."""


@dataclass(frozen=True)
class Shape:
    """One batch: pictures of `size` x `size` pixels, the classes told apart; `precision` is of autocast."""

    batch: int
    size: int
    classes: int
    precision: str = "fp32"
    format: str = "contiguous"


@dataclass(frozen=True)
class Work:
    """A row: a network, trained with SGD on one batch that stays the same."""

    network: str
    shapes: dict[str, Shape]
    lr: float

    def case(self, device: str, batch: int | None = None, size: int | None = None) -> dict[str, Any]:
        """What a worker must know, as JSON can hold it."""
        shape = self.shapes[device]
        return {
            "network": self.network,
            "device": device,
            "batch": batch or shape.batch,
            "size": size or shape.size,
            "classes": shape.classes,
            "precision": shape.precision,
            "format": shape.format,
            "lr": self.lr,
            "sparsity": SPARSITY,
        }


WORKS = {
    "resnet50": Work(
        "resnet50",
        {"cpu": Shape(16, 64, 100), "cuda": Shape(256, 224, 1000, "bf16", "channels_last")},
        lr=0.02,
    ),
    "vit_b_16": Work("vit_b_16", {"cpu": Shape(8, 64, 100), "cuda": Shape(256, 224, 1000, "bf16")}, lr=0.01),
    "wide_resnet22_2": Work(
        "wide_resnet22_2",
        {"cpu": Shape(64, 32, 10), "cuda": Shape(128, 32, 10, "bf16", "channels_last")},
        lr=0.05,
    ),
}

SPARSIFY = {
    "resnet50": "`sparsify(resnet50)`, all passes and verify",
    "vit_l_16": "bare `sparsify` of vit_l_16 built on meta, no verify",
}
"""What the row `sparsify` times: seconds on one thread of the CPU."""


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals: which figure of which contender, and its bound on each device.

    `figure` is a key of `results.figures` ("" for what another command measures, which `otherwise` names).
    """

    title: str
    bounds: dict[str, str]
    row: str = ""
    contender: str = ""
    figure: str = ""
    otherwise: str = ""


GOALS = (
    Goal(
        "masked step over dense, eager, resnet50",
        {"cpu": "1.03x", "cuda": "1.02x"},
        "resnet50",
        "fxsparse eager",
        "step",
    ),
    Goal("the same, compiled", {"cpu": "1.03x", "cuda": "1.01x"}, "resnet50", "fxsparse compiled", "step"),
    Goal(
        "one rewiring of resnet50, in dense steps",
        {"cpu": "0.4", "cuda": "0.2"},
        "resnet50",
        "fxsparse eager",
        "rewiring",
    ),
    Goal(
        "WideResNet-22-2 on CIFAR-10, 250 epochs compiled in bf16",
        {"cuda": "12 min"},
        otherwise="`fxsparse train`",
    ),
    Goal(
        "2:4 inference of a ViT-L-sized encoder over dense compiled",
        {"cuda": "1.3x faster"},
        otherwise="`python tools/bench.py nm`",
    ),
    Goal(SPARSIFY["resnet50"], {"cpu": "2 s"}, "sparsify", "resnet50", "seconds"),
    Goal(SPARSIFY["vit_l_16"], {"cpu": "2 s"}, "sparsify", "vit_l_16", "seconds"),
)
