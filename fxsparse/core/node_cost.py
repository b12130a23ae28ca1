"""`NodeCost`: what one node of a graph costs, dense and with the active weights alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for the example, or the share of it that one of its weights has.

    Attributes:
        node, module, operation: its name, the submodule that makes the call, and what it calls. A share is named
            `node:weight`.
        call: name of the node in the graph; empty where that is `node`.
        macs: multiply-accumulates with all weights.
        weight: name of the parameter that the weight comes from, if there is one and its zeros stay zero.
        weight_shape, input_shape, output_shape: of the weight, the first tensor argument, the first result.
        stride: of a convolution, per dimension.
        elements, active: number of weight elements, and of those that are active; 0 without a weight.
        size: number of elements of the parameter `weight`, of which `elements` may be a part.
        parameters: number of parameters that the node reads.
        other: FLOPs that are not MACs, by category (`core/aten_costs.py`).
        input_gradient: MACs of the gradients of the inputs, with all weights; 0 where nothing before the node
            is trained.
        weight_gradient: MACs of the gradient of the weight, at all positions; 0 where it is not trained.
        unknown: operations in the node that no rule covers.
        detail: what a reader should know of how it was counted.
    """

    node: str
    module: str
    operation: str
    macs: int = 0
    weight: str | None = None
    weight_shape: Shape | None = None
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    stride: Shape = ()
    elements: int = 0
    active: int = 0
    parameters: int = 0
    other: Mapping[str, int] = field(default_factory=dict)
    input_gradient: int = 0
    weight_gradient: int = 0
    unknown: tuple[str, ...] = ()
    detail: str = ""
    call: str = ""
    size: int = 0

    def active_among(self, active: Mapping[str, int]) -> int:
        """Active elements, at these counts by parameter name; a part of a parameter is as dense as the whole."""
        count = active.get(self.weight) if self.weight else None
        if count is None:
            return self.elements
        return round(count * self.elements / self.size) if self.size > self.elements else count

    @property
    def density(self) -> float:
        """Fraction of the weight's elements that are active; 1 without a weight."""
        return self.active / self.elements if self.elements else 1.0

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates with the active weights only."""
        return self._of_active(self.macs)

    @property
    def backward(self) -> int:
        """MACs of the backward pass with all weights."""
        return self.input_gradient + self.weight_gradient

    @property
    def sparse_backward(self) -> int:
        """MACs of the backward pass with the active weights only."""
        return self._of_active(self.input_gradient) + self._of_active(self.weight_gradient)

    @property
    def dense_gradient_backward(self) -> int:
        """MACs of a backward pass with the active weights that gives the gradient of all weights."""
        return self._of_active(self.input_gradient) + self.weight_gradient

    def _of_active(self, macs: int) -> int:
        """Every element of a weight is used equally often."""
        return macs * self.active // self.elements if self.elements else macs
