"""The typed records that passes write and read. Plain, serialisable, keyed by qualified names."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .arguments import map_leaves
from .units import Units

META_KEY = "fxsparse"
"""The one key of `node.meta` that fxsparse uses; it holds a `NodeRecord`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its contents; strides in elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        strided = tensor.layout == torch.strided
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()) if strided else (), tensor.device)


def specs_of(tree: Any) -> Any:
    """`tree` with every tensor replaced by its `TensorSpec`."""
    return map_leaves(lambda leaf: TensorSpec.of(leaf) if isinstance(leaf, Tensor) else leaf, tree)


@dataclass(frozen=True)
class NodeRecord:
    """What the passes know of one node.

    Attributes:
        module: qualified name of the submodule whose forward made the node; empty for the root.
        spec: `TensorSpec`, a number, or a container of them; None until shapes are annotated.
        opaque: whether the node is a call that could not be looked into; its `spec` was recorded.
    """

    module: str = ""
    spec: Any = None
    opaque: bool = False


def record_of(node: fx.Node) -> NodeRecord:
    return node.meta.get(META_KEY, NodeRecord())


def update_record(node: fx.Node, **changes: Any) -> None:
    node.meta[META_KEY] = replace(record_of(node), **changes)


@dataclass(frozen=True)
class SiteUse:
    """One graph node that uses a site as its weight.

    Attributes:
        mode: the graph the node is in, `"eval"` or `"train"` (`"eval"` where both modes share one graph).
        node: the node's name.
        operation: `"conv2d"`, `"linear"`, ... (`core/operations.py`).
        module: qualified name of the submodule that makes the call.
    """

    mode: str
    node: str
    operation: str
    module: str


@dataclass(frozen=True)
class WeightSite:
    """One maskable parameter and every node that uses it as a weight. Identity is the Parameter object.

    Attributes:
        name: the parameter's first qualified name; its mask is the buffer `<name>_mask`.
        shape: the parameter's shape.
        uses: in execution order, the eval graph's before those that only the train graph has.
        aliases: further qualified names of the same Parameter.
        owner: type of the module that holds the parameter.
        depthwise: whether every use is a convolution with one input channel per group, and several groups.
        tied_embedding: whether the parameter is also an embedding table.
        frozen: whether the parameter does not require a gradient.
        matrix: `(out, in, *kernel)` of the weight as it is used, `in` per group; empty where that is `shape`. A bank of
            matrices (experts) has the shape of one of them.
        form: how the weight comes from the parameter, where it is not the parameter itself; for reports.
        looks_like_a_table: whether only products use it, and it belongs to an embedding or its name says that it holds
            positions or tokens.
        output_dim: the dimension of `shape` over the output channels; None where it is not known.
        output_groups: into how many groups (of a convolution) that dimension falls.
        input_dim, input_groups: the same of the input channels, over which products are summed. A convolution's weight
            has those of one group.
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[SiteUse, ...]
    aliases: tuple[str, ...] = ()
    owner: type = object
    depthwise: bool = False
    tied_embedding: bool = False
    frozen: bool = False
    matrix: tuple[int, ...] = ()
    form: str = ""
    looks_like_a_table: bool = False
    output_dim: int | None = 0
    output_groups: int = 1
    input_dim: int | None = 1
    input_groups: int = 1

    @property
    def matrices(self) -> int:
        """How many matrices of the shape `matrix` the parameter holds."""
        return self.numel // torch.Size(self.matrix or self.shape).numel()

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def mask_name(self) -> str:
        return f"{self.name}_mask"

    @property
    def operation(self) -> str:
        return self.uses[0].operation


@dataclass(frozen=True)
class Uncovered:
    """A matrix-shaped parameter that has no mask, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Captured:
    """A model and its graphs, as a capture mechanism hands them to the passes.

    Attributes:
        name: class name of the user's model.
        model: the private copy of the user's model; the graphs refer to its submodules and parameters.
        graphs: `"train"` and `"eval"`; the same object under both names where the modes do not differ.
        example: `(args, kwargs)` with a `TensorSpec` in place of every tensor.
        mechanism: how the graphs were made, a name of `passes.trace.MECHANISMS`.
        reason: why no mechanism before it made them; empty for the first.
        notes: what the user should know, a sentence each.
        flags: mode -> `training` flags of submodules by name, where they are not the mode's (a frozen BatchNorm).
        mode_readers: submodules whose own `training` flag decided what is in the graphs.
        units: graphs of submodules inside of calls that could not be looked into; None where there are none.
    """

    name: str
    model: torch.nn.Module
    graphs: dict[str, fx.Graph]
    example: tuple[tuple, dict[str, Any]]
    mechanism: str
    notes: list[str] = field(default_factory=list)
    flags: dict[str, dict[str, bool]] = field(default_factory=dict)
    mode_readers: tuple[str, ...] = ()
    reason: str = ""
    units: Units | None = None

    def distinct_graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """`("eval", graph)`, then `("train", graph)` if training has a graph of its own."""
        yield "eval", self.graphs["eval"]
        if self.graphs["train"] is not self.graphs["eval"]:
            yield "train", self.graphs["train"]

    def all_graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """The same, and after them those of all units."""
        yield from self.distinct_graphs()
        for mode, _, graph in self.units.distinct_graphs() if self.units else ():
            yield mode, graph
