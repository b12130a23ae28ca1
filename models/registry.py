"""Networks by name: the ones of this package, and every classification network of torchvision."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fxsparse.core.errors import ConfigError, nearest

from .char_gru import char_gru
from .lenet import lenet5
from .mobilenet_v1 import mobilenet_v1
from .resnet_cifar import resnet50_cifar
from .small_resnet import small_resnet
from .wide_resnet import wide_resnet22_2


@dataclass(frozen=True)
class Entry:
    """A network of this package and what it takes."""

    make: Callable[..., nn.Module]
    size: int  # side of the example picture in pixels, or length of the example text in characters

    @property
    def defaults(self) -> dict[str, Any]:
        """The network's options and their default values."""
        return {name: parameter.default for name, parameter in inspect.signature(self.make).parameters.items()}


ENTRIES = {
    "wide_resnet22_2": Entry(wide_resnet22_2, size=32),
    "resnet50_cifar": Entry(resnet50_cifar, size=32),
    "mobilenet_v1": Entry(mobilenet_v1, size=224),
    "char_gru": Entry(char_gru, size=16),
    "small_resnet": Entry(small_resnet, size=8),
    "lenet5": Entry(lenet5, size=32),
}

TORCHVISION_SIZES = {"inception_v3": 299}  # the others take 224


def names() -> list[str]:
    """Every name that `build` takes: this package's networks first, then torchvision's."""
    return [*ENTRIES, *_torchvision_names()]


def canonical(name: str) -> str:
    """The network of this package that `name` means, `char-gru` being `char_gru`; any other name as it is."""
    underscored = name.replace("-", "_")
    return underscored if underscored in ENTRIES else name


def takes_text(name: str) -> bool:
    """Whether a network reads characters, where all others see pictures."""
    name = canonical(name)
    return name in ENTRIES and "in_channels" not in ENTRIES[name].defaults


def build(name: str, num_classes: int | None = None, in_channels: int | None = None, **options: object) -> nn.Module:
    """The network called `name`, freshly initialised from PyTorch's global random state.

    `num_classes` and `in_channels` (of the input picture) are the network's own defaults where not given;
    `options` go to the network, such as `width` for this package's. Raises ConfigError for an unknown name,
    an option that the network does not take, or a value that it cannot have.
    """
    name = _known(name)
    given = {"num_classes": num_classes, "in_channels": in_channels, **options}
    given = {option: value for option, value in given.items() if value is not None}
    for option in ("num_classes", "in_channels", "width"):
        value = given.get(option, 1)
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{name}: {option} is {value!r}; it must be a number above 0")
    if name not in ENTRIES:
        return _build_torchvision(name, given)
    entry = ENTRIES[name]
    for option in given:
        if option not in entry.defaults:
            raise ConfigError(f"{name} takes no option {option!r}; it takes {', '.join(entry.defaults)}")
    try:
        return entry.make(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def has_width(name: str) -> bool:
    """Whether a network takes the option `width`: those of this package do."""
    return _known(name) in ENTRIES


def default_width(name: str) -> float:
    """The `width` at which a network of this package is itself; its channels are proportional to `width`.

    Raises ConfigError for torchvision's networks, which have no such option.
    """
    name = _known(name)
    if name not in ENTRIES:
        raise ConfigError(f"{name} takes no option 'width'; {', '.join(ENTRIES)} do")
    return ENTRIES[name].defaults["width"]


def example_input(name: str, batch: int = 2, size: int | None = None, in_channels: int | None = None) -> Tensor:
    """An input that the network takes, the same at every call and apart from the global random state.

    Pictures are (batch, in_channels, size, size) float32 of unit variance; text is (batch, size) int64.
    """
    name = _known(name)
    generator = torch.Generator().manual_seed(0)
    if name in ENTRIES:
        defaults, side = ENTRIES[name].defaults, size or ENTRIES[name].size
    else:
        defaults, side = {"in_channels": 3}, size or TORCHVISION_SIZES.get(name, 224)
    if "in_channels" not in defaults:
        return torch.randint(defaults["num_classes"], (batch, side), generator=generator, device="cpu")
    channels = in_channels or defaults["in_channels"]
    return torch.randn(batch, channels, side, side, generator=generator, device="cpu")


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _known(name: str) -> str:
    """The canonical `name`."""
    name, known = canonical(name), names()
    if name not in known:
        near = nearest(name, known) or f"; this package has {', '.join(ENTRIES)}, and torchvision the rest"
        raise ConfigError(f"unknown model {name!r}{near}")
    return name


def _build_torchvision(name: str, options: dict) -> nn.Module:
    in_channels = options.pop("in_channels", 3)
    if in_channels != 3:
        raise ConfigError(f"{name}: in_channels is {in_channels}; torchvision's networks take 3")
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # what torchvision does too, after a warning
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except (TypeError, ValueError) as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected:
            raise ConfigError(f"{name} takes no option {unexpected[1]!r}") from error
        raise ConfigError(f"{name}: {error}") from error
