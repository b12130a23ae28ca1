"""The defaults that depend on the data set.

CIFAR follows the reproducibility report (section 4): WideResNet-22-2, 250 epochs of batch 128, SGD with
momentum 0.9 and weight decay 5e-4, learning rate 0.1 times 0.2 every 30,000 steps, flips and 4-pixel crops,
rewiring every 100 steps. The other image sets are that recipe scaled: a smaller network and fewer epochs where
there are fewer or smaller images, no mirror images of digits, and rewirings often enough that a short run has a
fair number of them.

Texts follow the paper's character-level language model (Evci et al. 2020, section 4.2 and its appendix): the
network of `models/char_gru.py`, Adam at a constant 7e-4 with L2 5e-4, batches of 32, gradient values clipped
at 10, sparsity 0.75, alpha 0.1, rewiring every 100 steps until the end of the run. Its sequences of 512
characters and 200,000 steps are 64 and 10 epochs here, for a run that a CPU finishes.
"""

from __future__ import annotations

from typing import Any

_REPORT = {
    "model": "wide_resnet22_2",
    "sparsity": 0.9,
    "drop_fraction": 0.3,
    "update_interval": 100,
    "stop_fraction": 0.75,
    "epochs": 250,
    "batch_size": 128,
    "optimizer": "sgd",
    "schedule": "step",
    "flip": True,
    "crop": 4,
}

RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": _REPORT,
    "cifar100": _REPORT,
    "fashion-mnist": _REPORT | {"epochs": 60, "crop": 2},
    "imagefolder": _REPORT | {"model": "resnet18", "epochs": 90, "crop": 0},
    "digits": _REPORT
    | {
        "model": "small_resnet",
        "epochs": 30,
        "batch_size": 64,
        "update_interval": 20,
        "flip": False,
        "crop": 0,
    },
    "text": {
        "model": "char_gru",
        "sequence_length": 64,
        "split": (0.9, 0.05, 0.05),
        "sparsity": 0.75,
        "drop_fraction": 0.1,
        "update_interval": 100,
        "stop_fraction": 1.0,
        "epochs": 10,
        "batch_size": 32,
        "optimizer": "adam",
        "schedule": "constant",
        "clip_norm": 10.0,
    },
}

_RATES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adam": {"lr": 1e-3, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}
_TEXT_RATES = _RATES | {"adam": {"lr": 7e-4, "weight_decay": 5e-4}}


def recipe_for(data: str, optimizer: str | None = None) -> dict[str, Any]:
    """The defaults for a data set (`"cifar10"`, `"imagefolder:PATH"`) under an optimizer, by option name.

    None takes the data set's own optimizer. A data set without a row of its own is treated as an image folder.
    """
    kind = data.partition(":")[0]
    recipe = RECIPES.get(kind, RECIPES["imagefolder"])
    return recipe | (_TEXT_RATES if kind == "text" else _RATES)[optimizer or recipe["optimizer"]]
