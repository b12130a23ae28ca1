"""`LabelledModel`: a captured model with channel labels on everything, as the passes on channels share it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .channel_labels import LabelSpace
from .records import Captured

NodeLabels = dict[str, Any]
"""Node name -> labels in the place of every tensor of its value; plain values as they are for the example."""


@dataclass(frozen=True, eq=False)
class TensorReference:
    """Stands for a parameter or buffer until it is known how it takes part."""

    name: str
    tensor: Tensor


@dataclass
class LabelledModel:
    """A captured model with labels on everything: what compaction works on.

    Attributes:
        space: the labels, settled.
        nodes: mode -> labels of every node of that graph.
        roles: (tensor name, dimension) -> what its slices do.
        active: weight name -> bool, which of its elements are not masked; of a weight that is not in it, all.
    """

    captured: Captured
    space: LabelSpace
    nodes: dict[str, NodeLabels]
    roles: dict[tuple[str, int], set[str]]
    active: dict[str, Tensor] = field(default_factory=dict)

    def active_elements(self, weight: str) -> Tensor:
        """Which elements of a weight are not masked."""
        tensor = self.captured.model.get_parameter(weight)
        return self.active.get(weight, torch.ones((), dtype=torch.bool, device=tensor.device).expand(tensor.shape))
