"""The defaults that depend on the data set.

CIFAR follows the reproducibility report (section 4): WideResNet-22-2, 250 epochs of batch 128, SGD with
momentum 0.9 and weight decay 5e-4, learning rate 0.1 times 0.2 every 30,000 steps, flips and 4-pixel crops,
rewiring every 100 steps. The others are that recipe scaled: a smaller network and fewer epochs where there
are fewer or smaller images, no mirror images of digits, and rewirings often enough that a short run has a
fair number of them.
"""

from __future__ import annotations

from typing import Any

_REPORT = {
    "model": "wide_resnet22_2",
    "epochs": 250,
    "batch_size": 128,
    "update_interval": 100,
    "flip": True,
    "crop": 4,
}

RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": _REPORT,
    "cifar100": _REPORT,
    "fashion-mnist": _REPORT | {"epochs": 60, "crop": 2},
    "imagefolder": _REPORT | {"model": "resnet18", "epochs": 90, "crop": 0},
    "digits": {
        "model": "small_resnet",
        "epochs": 30,
        "batch_size": 64,
        "update_interval": 20,
        "flip": False,
        "crop": 0,
    },
}

_RATES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adam": {"lr": 1e-3, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}


def recipe_for(data: str, optimizer: str) -> dict[str, Any]:
    """The defaults for a data set (`"cifar10"`, `"imagefolder:PATH"`) under an optimizer, by option name.

    A data set without a row of its own is treated as an image folder.
    """
    return RECIPES.get(data.partition(":")[0], RECIPES["imagefolder"]) | _RATES[optimizer]
