"""The global random number generators, captured and put back: torch (CPU and CUDA), numpy, python."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)  # the CUDA generators too
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def capture() -> dict[str, Any]:
    """The generators' states as plain values and CPU tensors, for a checkpoint."""
    name, keys, position, has_gauss, cached = cast(tuple, numpy.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "python": random.getstate(),
    }


def restore(states: dict[str, Any]) -> None:
    """Put back what `capture` gave. CUDA states are ignored on a machine with another number of devices."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
