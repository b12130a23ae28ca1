"""What the rules for labels work with: the labels so far, and what to do with them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.core.channel_labels import LabelSource, LabelSpace, compressed, fixed, varying_dims
from fxsparse.core.graphs import attribute
from fxsparse.core.labelled_model import TensorReference
from fxsparse.core.records import TensorSpec


class LabelRun:
    """One run over all graphs of a model; the function of a kind of operation gets it as its first argument.

    Attributes:
        root: what the graph's attributes and submodules refer to.
        space: the labels; shared by all graphs of a model.
        deciding: whether to pin and couple where labels still change along a dimension that a rule needs.
        roles: (tensor name, dimension) -> what its slices do: `"producer"`, `"consumer"`, `"copy"`.
        direct: names of tensors that take part by their elements, not as a weight.
        values: labels of every node so far.
    """

    def __init__(self, root: nn.Module, space: LabelSpace, names: dict[int, str], deciding: bool) -> None:
        self.root = root
        self.space = space
        self.deciding = deciding
        self.roles: dict[tuple[str, int], set[str]] = {}
        self.direct: set[str] = set()
        self.values: dict[fx.Node, Any] = {}
        self._names = names

    def operands(self, tree: Any) -> Any:
        """`tree` with every node replaced by its value."""
        return fx.map_arg(tree, lambda node: self.values[node])

    def elements(self, value: Any) -> Any:
        """A value with labels for the tensors that it refers to; a tensor of one element is never cut."""
        return pytree.tree_map(self._elements, value, is_leaf=lambda leaf: isinstance(leaf, TensorReference))

    def _elements(self, leaf: Any) -> Any:
        if not isinstance(leaf, TensorReference):
            return leaf
        if leaf.tensor.numel() <= 1:
            return fixed(leaf.tensor.shape)
        self.direct.add(leaf.name)
        return compressed(self.space.labels(LabelSource(leaf.name), tuple(leaf.tensor.shape)))

    def own_tensor(self, node: fx.Node, attribute_name: str) -> TensorReference | None:
        """A parameter or buffer of the module that a node calls."""
        tensor = getattr(attribute(self.root, str(node.target)), attribute_name, None)
        return self.reference(tensor) if isinstance(tensor, Tensor) else None

    def reference(self, tensor: Tensor) -> TensorReference:
        return TensorReference(self._names[id(tensor)], tensor)

    def pin_all(self, tree: Any, reason: str) -> None:
        for leaf in tensors_of(self.elements(tree)):
            self.space.pin(leaf, reason)

    def pin_where_varying(self, labels: Tensor, dims: Iterable[int], reason: str) -> None:
        """In the last call: labels that change along one of these dimensions have to stay."""
        if self.deciding and set(varying_dims(labels)) & {dim % labels.ndim for dim in dims}:
            self.space.pin(labels, reason)

    def couple_where_varying(self, labels: Tensor, dims: Iterable[int], reason: str) -> bool:
        """In the last call: labels that change along one of these dimensions are mixed with one another."""
        if self.deciding and set(varying_dims(labels)) & {dim % labels.ndim for dim in dims}:
            self.space.couple(labels, reason)
            return True
        return False


def tensors_of(tree: Any, kind: type = Tensor) -> list[Any]:
    leaves = pytree.tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, (TensorSpec, TensorReference)))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
