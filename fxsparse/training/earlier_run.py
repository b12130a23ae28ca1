"""What a run may take from another one: its weights, its masks, its densities.

A lottery ticket takes a pruning run's masks and the weights that it began with; RigL may start from a static
solution (the RigL paper, Figure 6), or afresh with another run's final masks or densities (the reproducibility
report, last group of Table 5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.training import checkpoint
from fxsparse.training.config import TrainConfig
from fxsparse.training.run_folder import RunFolder


@dataclass(frozen=True)
class Inheritance:
    """What a run has from earlier ones; a checkpoint holds it, so that the earlier runs may go.

    Attributes:
        masks: weight name -> bool mask to begin with, or None.
        sparsities: weight name -> sparsity to begin with where no masks are given, or None.
        weights: the parameters and buffers to begin with, by name, or None for freshly initialised ones.
        cost: folder of each run behind it -> FLOPs of its training, each run once.
    """

    masks: dict[str, Tensor] | None = None
    sparsities: dict[str, float] | None = None
    weights: dict[str, Tensor] | None = None
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def goal(self) -> dict[str, Any]:
        """The arguments of `sparsify` that it stands for."""
        if self.masks is not None:
            return {"masks": self.masks}
        return {} if self.sparsities is None else {"distribution": self.sparsities}

    def to_resume(self) -> dict[str, Any]:
        """For a checkpoint: what a resumed run cannot take from its own masks and weights."""
        sparsities = sparsities_of(self.masks) if self.masks is not None else self.sparsities
        return {"sparsities": sparsities, "cost": self.cost}


def inherit(config: TrainConfig) -> Inheritance:
    """What `config` takes from earlier runs, read from their folders.

    Raises:
        CheckpointError: a run that is not there, has not finished, or did not keep the step wanted.
    """
    masks = masks_in(read_state(config.masks_from, None)) if config.masks_from is not None else None
    sparsities = None
    if config.densities_from is not None:
        sparsities = sparsities_of(masks_in(read_state(config.densities_from, None)))
    sources = (config.masks_from, config.densities_from, config.weights_from)
    cost: dict[str, float] = {}
    for source in sources:
        if source is not None:
            cost |= cost_of(source)
    return Inheritance(masks, sparsities, given_weights(config), cost)


def inherit_again(config: TrainConfig, payload: Mapping[str, Any]) -> Inheritance:
    """What a run that is resumed from the checkpoint `payload` had from earlier ones."""
    begun = payload["begun_with"]
    if begun["sparsities"] is None:
        return Inheritance(cost=begun["cost"])
    masks = masks_in(payload["model"]) if config.method == "lottery" else None
    return Inheritance(masks, begun["sparsities"], None, begun["cost"])


def sparsities_of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: 1.0 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def cost_of(source: str) -> dict[str, float]:
    """Folder -> FLOPs of training, of the run at `source` (a folder or a checkpoint in it) and those behind it."""
    path = Path(source).resolve()
    folder = RunFolder(path if path.is_dir() else path.parent.parent)
    if not folder.result.exists():
        raise CheckpointError(
            f"there is no {folder.result}, which says what the training of {source} cost; name the folder of a "
            "finished run"
        )
    result = json.loads(folder.result.read_text())
    behind = result.get("earlier", {})
    return behind | {str(folder.path): result["training_flops_total"] - sum(behind.values())}


def given_weights(config: TrainConfig) -> dict[str, Tensor] | None:
    """The parameters and buffers to begin with, by name and without masks; None for freshly initialised ones."""
    source, step = config.weights_from, config.rewind
    if source is None and config.method == "lottery":
        source, step = config.masks_from, step or 0
    if source is None:
        return None
    state = read_state(source, step)
    masks = {f"{name}_mask" for name in masks_in(state)}
    return {name: value for name, value in state.items() if name not in masks}


def load_weights(sparse: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads `weights` into a sparse module and leaves its masks; `ConfigError` where they belong to another network."""
    own = {name: value.shape for name, value in sparse.state_dict().items()}
    wrong = [name for name, value in weights.items() if own.get(name) != value.shape]
    if wrong:
        here = tuple(own[wrong[0]]) if wrong[0] in own else "missing"
        raise ConfigError(
            f"the weights of {source} do not fit this network: {wrong[0]} is {tuple(weights[wrong[0]].shape)} there "
            f"and {here} here; take the same model and model_options"
        )
    missing = [name for name in own if name not in weights and not name.endswith("_mask")]
    if missing:
        raise ConfigError(f"the weights of {source} lack {missing[0]}; take the same model and model_options")
    sparse.load_state_dict(weights, strict=False)


def read_state(source: str, step: int | None) -> dict[str, Tensor]:
    """The state dict of the run in a folder (or of one checkpoint file), at `step` or, if that is None, at its end.

    Raises:
        CheckpointError: there is no such checkpoint; names what there is.
    """
    path = Path(source)
    if path.is_dir():
        path = _in_folder(RunFolder(path), step)
    elif step is not None and checkpoint.load(path)["step"] != step:
        raise ConfigError(f"{path} is one checkpoint and not of step {step}; give its run folder, or leave rewind out")
    return checkpoint.load(path)["model"]


def _in_folder(folder: RunFolder, step: int | None) -> Path:
    found = folder.checkpoints()
    if step is None:
        if not found:
            raise CheckpointError(f"{folder.path} holds no checkpoint; let its run finish first")
        if not folder.result.exists():
            raise CheckpointError(
                f"the run in {folder.path} has not finished; go on with fxsparse train --resume {folder.path}"
            )
        return found[-1]
    path = folder.saved(step)
    if path is None:
        steps = ", ".join(str(each) for each in folder.saved_steps()) or "none"
        raise CheckpointError(
            f"{folder.path} did not keep step {step} (kept: {steps}); train it with --keep-steps {step}"
        )
    return path


def masks_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks in a sparse module's state dict, by the weight's name."""
    return {
        name: state[f"{name}_mask"]
        for name, value in state.items()
        if f"{name}_mask" in state and state[f"{name}_mask"].dtype == torch.bool
        if state[f"{name}_mask"].shape == value.shape
    }
