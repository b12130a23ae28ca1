"""The four sets of models: the names of each, and how to build one with an example of two samples."""

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import transformers_set

BATCH = 2

TIMM_MODELS = Path(__file__).with_name("timm_models.txt")
"""A line a family: the family, its smallest model, and the side of the picture; `img_size` where the model is built for
a smaller one than its name says."""

_SIZE_WORDS = frozenset(
    """tiny small base large huge giant gigantic nano pico femto atto zepto xtiny micro mini medium xlarge x s m l b t n
    xs xxs xxtiny xxsmall xsmall xxl xl xxlarge little lite dwee wee pwee dlittle dpwee mediumd betwixt giantopt so150m
    a c d e f g h enormous kobe rw el em es""".split()
)


def timm_family(name: str) -> str:
    """The words of a timm model's name up to the first that is a size or has a digit (`swinv`, `vit_relpos`)."""
    first, *rest = name.split("_")
    words = []
    for word in rest:
        if word in _SIZE_WORDS or re.search(r"\d", word):
            break
        words.append(word)
    return "_".join([re.sub(r"\d+[a-z]*$", "", first), *words])


def names(which: str) -> list[str]:
    """The names of a set's models."""
    return sorted(SETS[which][0]())


def build(which: str, name: str) -> tuple[nn.Module, Any]:
    """A model with random weights of a fixed seed, and its example input: `BATCH` samples."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SETS[which][1](name)


# -- torchvision ------------------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    from torchvision import models

    # The quantized ones are the same networks with casts between their layers.
    return [name for name in models.list_models() if not name.startswith("quantized_")]


_SIDES = {"inception_v3": 299, "maxvit_t": 224}


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    from torchvision import models

    detects = name in models.list_models(module=models.detection)
    options: dict[str, Any] = {"weights": None}
    if detects or name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if detects:
        options["num_classes"] = 5
    if name.startswith("keypointrcnn"):
        options |= {"num_classes": 2, "num_keypoints": 17}
    if detects and not name.startswith("ssd"):  # ssd has one size, built in
        options |= {"min_size": 128, "max_size": 160}
    side = _SIDES.get(name, 64)
    if name.startswith("vit_"):
        options["image_size"] = side = 56 if name.endswith("14") else 64
    model = models.get_model(name, **options)
    if detects:
        return model, _detection_example(name)
    if name.startswith("raft"):
        return model, tuple(torch.rand(BATCH, 3, 128, 128) for _ in range(2))
    if name in models.list_models(module=models.video):
        frames, side = (16, 224) if name.startswith(("mvit", "s3d")) else (4, 56)
        return model, torch.randn(BATCH, 3, frames, side, side)
    return model, torch.randn(BATCH, 3, side, side)


def _detection_example(name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two pictures of different sizes, and two boxes in each."""
    pictures = [torch.rand(3, 128, 144), torch.rand(3, 136, 128)]
    targets = []
    for picture in pictures:
        height, width = picture.shape[1:]
        target = {
            "boxes": torch.tensor([[8.0, 10.0, 60.0, 70.0], [30.0, 20.0, width - 9.0, height - 5.0]]),
            "labels": torch.tensor([1, 1]),
        }
        if name.startswith("maskrcnn"):
            target["masks"] = torch.randint(0, 2, (2, height, width), dtype=torch.uint8)
        if name.startswith("keypointrcnn"):
            target["keypoints"] = torch.cat([torch.rand(2, 17, 2) * 40 + 12, torch.ones(2, 17, 1)], dim=2)
        targets.append(target)
    return pictures, targets


# -- timm, transformers, the zoo ---------------------------------------------------------------------------


def timm_table() -> dict[str, tuple[str, int, dict[str, int]]]:
    """Family -> its model, the side of its pictures, and the options to build it with."""
    rows = (line.split() for line in TIMM_MODELS.read_text().splitlines())
    return {family: (name, int(side), dict.fromkeys(options, int(side))) for family, name, side, *options in rows}


def _timm(family: str) -> tuple[nn.Module, Any]:
    import timm

    name, side, options = timm_table()[family]
    model = timm.create_model(name, pretrained=False, **options)
    return model, torch.randn(BATCH, model.default_cfg["input_size"][0], side, side)


def _zoo_names() -> list[str]:
    from fxsparse.models.zoo import ZOO

    return list(ZOO)


def _zoo(name: str) -> tuple[nn.Module, Any]:
    from fxsparse.models.zoo import ZOO

    return ZOO[name].make(), ZOO[name].example()


SETS: dict[str, tuple[Callable[[], Any], Callable[[str], tuple[nn.Module, Any]]]] = {
    "torchvision": (_torchvision_names, _torchvision),
    "timm": (timm_table, _timm),
    "transformers": (lambda: transformers_set.ARCHITECTURES, transformers_set.build),
    "zoo": (_zoo_names, _zoo),
}
"""Name of a set -> (its models' names, the function that builds one)."""


def libraries(which: str) -> Iterator[str]:
    """What a set needs to be installed."""
    yield from {"torchvision": ["torchvision"], "timm": ["timm"], "transformers": ["transformers"]}.get(which, [])
