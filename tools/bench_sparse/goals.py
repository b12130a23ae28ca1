"""What is measured and what each figure is to reach: one `Work` per row of the table."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Work:
    """One row: a network, what is done with it, and the goal at each sparsity.

    `kind` is "inference" or "training" (seconds; the goal is how many times faster than the best dense choice),
    "layers" (seconds of single layers; times faster than SparseProp) or "storage" (bytes; at most this share of
    dense). `size` is the side of the picture in pixels or the length of the text in characters. `options` go to
    `fxsparse.sparsify`.
    """

    title: str
    kind: str
    network: str
    batch: int
    size: int
    goals: dict[float, float]
    classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def case(self, **more: Any) -> dict[str, Any]:
        """What a worker must know to load this work, as JSON can hold it."""
        own = {key: getattr(self, key) for key in ("kind", "network", "batch", "size", "classes", "options")}
        return {**own, **more}


STATIC = {"method": "static", "distribution": "uniform"}
RIGL = {"method": "rigl", "distribution": "uniform"}

WORKS = {
    "resnet50": Work(
        "inference, resnet50, 224, batch 1",
        "inference",
        "resnet50",
        1,
        224,
        {0.8: 1.3, 0.9: 2.5, 0.95: 4},
        1000,
        STATIC,
    ),
    "resnet50-block": Work(
        "inference, resnet50, 224, batch 1, blocks (4, 1)",
        "inference",
        "resnet50",
        1,
        224,
        {0.8: 2, 0.9: 4, 0.95: 6},
        1000,
        {**STATIC, "granularity": (4, 1)},
    ),
    "mobilenet_v1": Work(
        "inference, mobilenet_v1, 224, batch 1, first and depthwise dense",
        "inference",
        "mobilenet_v1",
        1,
        224,
        {0.8: 1.3, 0.9: 2, 0.95: 2.5},
        1000,
        {**STATIC, "exclude": ("first", "depthwise")},
    ),
    "char_gru": Work(
        "inference, the paper's character GRU, batch 1",
        "inference",
        "char_gru",
        1,
        64,
        {0.8: 2, 0.9: 4, 0.95: 6},
        256,
        STATIC,
    ),
    "resnet50_cifar": Work(
        "training step, the report's ResNet-50, batch 32, RigL",
        "training",
        "resnet50_cifar",
        32,
        32,
        {0.8: 1.2, 0.9: 2, 0.95: 3},
        100,
        RIGL,
    ),
    "wide_resnet22_2": Work(
        "training step, WideResNet-22-2, batch 128, RigL",
        "training",
        "wide_resnet22_2",
        128,
        32,
        {0.8: 1.1, 0.9: 1.7, 0.95: 2.5},
        10,
        RIGL,
    ),
    "layers": Work(
        "one layer, forward and both backward passes, over SparseProp, geometric mean",
        "layers",
        "resnet50_cifar",
        32,
        32,
        {0.8: 2, 0.9: 2, 0.95: 2},
        100,
        STATIC,
    ),
    "storage": Work(
        "bytes of parameters, gradients and momentum, of dense",
        "storage",
        "resnet50_cifar",
        4,
        32,
        {0.8: 0.45, 0.9: 0.25, 0.95: 0.15},
        100,
        RIGL,
    ),
}

INTERVAL = 100
"""Steps between rewirings that a training step counts with."""

CYCLE = 4
"""Steps between rewirings while measuring: an update step, the step after it, and ordinary ones."""
