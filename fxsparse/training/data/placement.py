"""Where an image set lies while a network trains on it, and how tensors get from there to the device.

A set that is held in memory goes whole to the device, as uint8, where it fits: a batch is then one selection there.
Where it does not, its batches are selected on the CPU and sent, still as uint8. Images of a folder are decoded from
disk batch by batch. The batches have the same bits in all three cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.core.errors import ConfigError
from fxsparse.training.data.image_folder import FolderSet, usable_workers
from fxsparse.training.data.image_set import ImageSet

FREE_SHARE = 0.5  # of the device's free memory, that images may take: the rest is for the network
PLACES = ("auto", "device", "cpu")


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a run are: on `device`; `words` say so to a person, empty where there is one place only."""

    device: torch.device
    words: str = ""


def place(
    sets: Sequence[ImageSet | FolderSet], device: torch.device, where: str = "auto", workers: int | None = None
) -> Placement:
    """Where all of `sets` are to lie for training on `device`; `where` is one of `PLACES`.

    Raises ConfigError for images of a folder that are wanted on the device: they have no common size.
    """
    cpu = torch.device("cpu")
    if any(isinstance(each, FolderSet) for each in sets):
        if where == "device":
            raise ConfigError("data_device is device; images of a folder are decoded from disk: leave data_device out")
        return Placement(cpu, f"images are decoded from disk, by {usable_workers(workers)} processes")
    if device.type == "cpu":
        return Placement(cpu)
    size = sum(each.nbytes for each in sets if isinstance(each, ImageSet))
    if where == "cpu":
        return Placement(cpu, f"images stay on the CPU: {_shown(size)}")
    free = free_memory(device)
    if where == "auto" and free is not None and size > FREE_SHARE * free:
        reason = f"{_shown(size)} is more than {FREE_SHARE:.0%} of the {_shown(free)} that are free on {device}"
        return Placement(cpu, f"images stay on the CPU: {reason}")
    return Placement(device, f"images are on {device}: {_shown(size)}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None where it cannot be asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; the CPU does not wait for a CUDA device, whose work is ordered behind the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
