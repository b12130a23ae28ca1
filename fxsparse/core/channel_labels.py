"""Channel labels: integers that say which elements of which tensors can only be removed together.

A label tensor has the shape of the tensor that it stands for, and one label an element. Where labels do not
change along a dimension that dimension is expanded (stride 0), so that the label tensor of a feature map costs
as much as its channels. Label 0 is `FIXED`: an element that is never removed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import networkx as nx
import torch
from torch import Tensor

FIXED = 0


@dataclass(frozen=True)
class LabelSource:
    """What a block of labels was made for.

    Attributes:
        name: qualified name of a parameter or buffer, or of the node that makes new channels.
        dim: the dimension of a weight that has one label an index; None where every element has its own.
        kind: `"tensor"`, or `"node"` for channels that a node makes (padding).
    """

    name: str
    dim: int | None = None
    kind: Literal["tensor", "node"] = "tensor"


class LabelSpace:
    """All labels of an analysis, which of them belong together, and which have to stay.

    Attributes:
        blocks: source -> (first label, shape); made once for each source.
        reasons: label -> why it has to stay.
        couplings: label -> the normalisations and reductions that mix it with others, by the names of their nodes.
    """

    def __init__(self) -> None:
        self.blocks: dict[LabelSource, tuple[int, tuple[int, ...]]] = {}
        self.reasons: dict[int, str] = {}
        self.couplings: dict[int, tuple[str, ...]] = {}
        self._representative = torch.zeros(1, dtype=torch.int64)
        self._pairs: list[Tensor] = []

    def labels(self, source: LabelSource, shape: Sequence[int]) -> Tensor:
        """The labels of a source, in `shape`; united ones are shown by the least of them."""
        if source not in self.blocks:
            first = len(self._representative)
            self.blocks[source] = (first, tuple(shape))
            self._representative = torch.cat((self._representative, torch.arange(first, first + prod(shape))))
        first, own_shape = self.blocks[source]
        return self._representative[first : first + prod(own_shape)].reshape(own_shape)

    def current(self, labels: Tensor) -> Tensor:
        """`labels` after the unions so far."""
        return expanded_like(self._representative[narrowed(labels)], labels)

    @property
    def representatives(self) -> Tensor:
        """For every label the one that it is shown by."""
        return self._representative

    # -- what belongs together ----------------------------------------------------------------------------

    def unite(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Unites two label tensors, of shapes that broadcast, element by element; what meets `FIXED` has to stay."""
        first, second = torch.broadcast_tensors(first, second)
        first, second = _narrowed_alike(first, second)
        differ = first != second
        pairs = torch.stack((first[differ], second[differ]), 1)
        if not pairs.numel():
            return
        touches_fixed = (pairs == FIXED).any(1)
        if touches_fixed.any():
            self.pin(pairs[touches_fixed], reason)
        self._pairs.append(pairs[~touches_fixed])

    def unite_over(self, labels: Tensor, kept: Iterable[int], reason: str) -> Tensor:
        """Unites the labels along every dimension that is not in `kept`; returns those of the kept ones."""
        kept = [dim % labels.ndim for dim in kept]
        first = labels
        for dim in range(labels.ndim):
            if dim not in kept:
                first = first.narrow(dim, 0, 1)
        self.unite(labels, first, reason)
        return first.reshape([labels.shape[dim] for dim in kept])

    def settle(self) -> bool:
        """Takes the unions into account: connected components become one label each. Whether there were any."""
        pairs = torch.cat(self._pairs) if self._pairs else torch.empty(0, 2, dtype=torch.int64)
        self._pairs.clear()
        pairs = self._representative[pairs].unique(dim=0)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        self._representative = _components(pairs, len(self._representative))[self._representative]
        reasons: dict[int, str] = {}
        for label, reason in self.reasons.items():
            reasons.setdefault(int(self._representative[label]), reason)
        couplings: dict[int, tuple[str, ...]] = {}
        for label, nodes in self.couplings.items():
            own = int(self._representative[label])
            couplings[own] = tuple(dict.fromkeys((*couplings.get(own, ()), *nodes)))
        self.reasons, self.couplings = reasons, couplings
        return bool(len(pairs))

    # -- what has to stay ---------------------------------------------------------------------------------

    def pin(self, labels: Tensor, reason: str) -> None:
        """These labels have to stay."""
        for label in narrowed(labels).unique().tolist():
            if label != FIXED:
                self.reasons.setdefault(label, reason)

    def couple(self, labels: Tensor, node: str) -> None:
        """These labels are mixed with one another: without one of them the others get other values."""
        for label in narrowed(labels).unique().tolist():
            if label != FIXED:
                self.couplings[label] = tuple(dict.fromkeys((*self.couplings.get(label, ()), node)))

    @property
    def stays(self) -> Tensor:
        """For every label, whether it has to stay or is coupled."""
        flags = torch.zeros(len(self._representative), dtype=torch.bool)
        flags[[FIXED, *self.reasons, *self.couplings]] = True
        return flags[self._representative]


def _components(pairs: Tensor, count: int) -> Tensor:
    """For every label the least that it is connected with."""
    found = torch.arange(count)
    # Most labels (a bias, the column of a weight) are in one pair only and need no graph.
    single = torch.bincount(pairs.reshape(-1), minlength=count)[pairs] == 1
    is_leaf = single.any(1)
    for component in nx.connected_components(nx.Graph(pairs[~is_leaf].tolist())):
        found[list(component)] = min(component)
    leaf = torch.where(single[:, 1], pairs[:, 1], pairs[:, 0])[is_leaf]
    other = torch.where(single[:, 1], pairs[:, 0], pairs[:, 1])[is_leaf]
    found[leaf] = found[other]
    least = torch.arange(count).scatter_reduce(0, found, torch.arange(count), "amin")
    return least[found]


def fixed(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor that is never cut."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """One label an index of `dim`, the same everywhere else."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.reshape(view).expand(tuple(shape))


def narrowed(labels: Tensor) -> Tensor:
    """`labels` with one index left of every dimension along which it is expanded."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def expanded_like(narrow: Tensor, labels: Tensor) -> Tensor:
    return narrow.expand(labels.shape)


def compressed(labels: Tensor) -> Tensor:
    """`labels`, expanded along every dimension along which they do not change."""
    shape = labels.shape
    if not labels.numel():
        return labels
    narrow = narrowed(labels)
    for dim in range(narrow.ndim):
        if narrow.shape[dim] > 1 and bool((narrow == narrow.narrow(dim, 0, 1)).all()):
            narrow = narrow.narrow(dim, 0, 1)
    return narrow.expand(shape)


def varying_dims(labels: Tensor) -> list[int]:
    """The dimensions along which labels change."""
    if not labels.numel():
        return []
    narrow = narrowed(labels)
    return [
        dim
        for dim in range(narrow.ndim)
        if narrow.shape[dim] > 1 and not bool((narrow == narrow.narrow(dim, 0, 1)).all())
    ]


def _narrowed_alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for dim, (one, other) in enumerate(zip(first.stride(), second.stride(), strict=True)):
        if one == 0 and other == 0 and first.shape[dim] > 1:
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first, second
