"""What to count, from words on a command line: a model by name, its input, a checkpoint."""

import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError, nearest
from ..models import registry

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}
_IMAGE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28}


@dataclass(frozen=True)
class Subject:
    """A model to count.

    Attributes:
        name: for titles.
        model: on the meta device where it can be built there.
        example: positional arguments, on the model's device.
        active: weight name -> number of active weights, from a checkpoint; None without one.
    """

    name: str
    model: nn.Module
    example: tuple
    active: Mapping[str, int] | None = field(default=None)


def make_subject(
    name: str | None,
    options: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    checkpoint: str | Path | None = None,
) -> Subject:
    """Builds what the words stand for, without memory for weights where that is possible.

    Args:
        name: a network of `fxsparse.models`, a torchvision classification model, or `package.module:factory`;
            None takes the one that a run's checkpoint names.
        options: keyword arguments of the network.
        inputs: shapes such as `"1,3,224,224"` or `"1,16:int64"`, one an argument; by default what the network
            takes by itself, for a batch of one.
        checkpoint: a checkpoint of `fxsparse train`, or a `state_dict` saved with `torch.save`; its masks say
            which weights are active, and where it has none its zeros do.

    Raises:
        ConfigError: an unknown model, with near names; an input that is no shape; a missing input.
        CheckpointError: a file that is missing or damaged, or of another architecture: which keys differ.
    """
    given = dict(options or {})
    size = None
    state: dict[str, Tensor] | None = None
    if checkpoint is not None:
        state, config = read_checkpoint(checkpoint)
        if name is None and config is None:
            raise ConfigError(f"{checkpoint} does not say which model it is of; give the model's name too")
        if config is not None and name in (None, config.get("model")):
            name = config["model"]
            given = {**config.get("model_options", {}), **given}
            kind = str(config.get("data")).partition(":")[0]
            size = config.get("image_size") or config.get("sequence_length") or _IMAGE_SIZES.get(kind)
    if name is None:
        raise ConfigError("give a model: a name, or package.module:factory")
    if state is not None and ":" not in name:
        given = {**_sizes_in(name, given, state), **given}
    model = build(name, given)
    active = active_counts(model, state, f"{checkpoint}", name) if state is not None else None
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    example = tuple(parse_input(text, device) for text in inputs) or default_input(name, given, size, device)
    return Subject(name, model.eval(), example, active)


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network, on meta tensors unless its constructor needs values."""
    make = _factory(name) if ":" in name else (lambda **given: registry.build(name, **given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = make(**options)
        except ConfigError:
            raise
        except Exception:
            try:
                model = make(**options)
            except ConfigError:
                raise
            except Exception as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise ConfigError(f"{name} cannot be built with {dict(options)}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} gives a {type(model).__name__}, not an nn.Module")
    return model


def _factory(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{name}: cannot import {module_name} ({error})") from error
    found: Any = module
    for atom in attribute.split("."):
        if not hasattr(found, atom):
            raise ConfigError(f"{name}: {module_name} has no {attribute!r}{nearest(atom, dir(found))}")
        found = getattr(found, atom)
    if not callable(found):
        raise ConfigError(f"{name} is a {type(found).__name__}; give a class or a function that makes the model")
    return found


def parse_input(text: str, device: torch.device) -> Tensor:
    """`"1,3,224,224"`, or with a dtype `"1,16:int64"`, as a tensor on `device` (zeros off meta)."""
    sizes, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+([,x]\d+)*", sizes) or (dtype and dtype not in DTYPES):
        raise ConfigError(
            f"--input {text!r} is not a shape like 1,3,224,224, with a dtype behind a colon where it is not "
            f"float32 ({', '.join(DTYPES)})"
        )
    shape = [int(size) for size in re.split("[,x]", sizes)]
    return torch.zeros(shape, dtype=DTYPES[dtype or "float32"], device=device)


def default_input(name: str, options: Mapping[str, Any], size: int | None, device: torch.device) -> tuple:
    """What a network of the registry takes, a batch of one."""
    if ":" in name:
        raise ConfigError(f"{name}: give the shape of its input with --input, such as --input 1,3,224,224")
    return (registry.example_input(name, batch=1, size=size, in_channels=options.get("in_channels")).to(device),)


# -- checkpoints --------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state of a checkpoint, and the run's options where it is one of `fxsparse train`."""
    import json

    path = Path(path)
    if path.is_dir():
        found = sorted((path / "checkpoints").glob("*.pt"))
        if not found:
            raise CheckpointError(f"{path} holds no checkpoint")
        path = found[-1]
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is damaged, or not a file of torch.save: {reason}") from error
    config = None
    if isinstance(payload, Mapping) and isinstance(payload.get("config"), str):
        from ..training import checkpoint

        payload = checkpoint.load(path)  # checks every byte
        config = json.loads(payload["config"])
    for key in ("model", "state_dict"):
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    if not isinstance(payload, Mapping) or not any(isinstance(value, Tensor) for value in payload.values()):
        raise CheckpointError(f"{path} holds no state_dict")
    return {key: value for key, value in payload.items() if isinstance(value, Tensor)}, config


def active_counts(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> dict[str, int]:
    """Weight name -> number of active weights, by the masks in `state`, or by its zeros where it has none.

    Raises:
        CheckpointError: `state` is of another architecture: which keys and shapes differ.
    """
    masks = {key: value for key, value in state.items() if key.endswith("_mask") and value.dtype == torch.bool}
    masks = {key.removesuffix("_mask"): value for key, value in masks.items() if key.removesuffix("_mask") in state}
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    saved = {key: tuple(value.shape) for key, value in state.items() if key.removesuffix("_mask") not in masks}
    saved |= {key: tuple(state[key].shape) for key in masks}
    missing, extra = [key for key in own if key not in saved], [key for key in saved if key not in own]
    other = [f"{key} {saved[key]} instead of {own[key]}" for key in own if key in saved and saved[key] != own[key]]
    if missing or extra or other:
        parts = [("lacks", missing), ("has", extra), ("has shape", other)]
        differ = "; ".join(f"it {verb} {_some(keys)}" for verb, keys in parts if keys)
        raise CheckpointError(f"{source} is not a checkpoint of {name}: {differ}")
    if masks:
        return {key: int(mask.count_nonzero()) for key, mask in masks.items()}
    return {key: int(state[key].count_nonzero()) for key, p in model.named_parameters() if p.ndim >= 2}


def _some(keys: Sequence[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def _sizes_in(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of classes and of input channels, where the checkpoint has others than the network's own."""
    own = {key: tuple(p.shape) for key, p in build(name, options).named_parameters() if p.ndim >= 2}
    first, last = next(iter(own), ""), next(reversed(own), "")
    found = {}
    if last in state and state[last].ndim == len(own[last]) and state[last].shape[0] != own[last][0]:
        found["num_classes"] = state[last].shape[0]
    if first in state and state[first].ndim == len(own[first]) and state[first].shape[1] != own[first][1]:
        found["in_channels"] = state[first].shape[1]
    return found
