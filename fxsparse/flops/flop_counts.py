"""`FlopCounts`: what a forward pass costs, dense and sparse, node by node."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from ..core.aten_costs import CATEGORIES
from ..core.errors import ConfigError, nearest
from ..core.node_cost import NodeCost
from .micronet import micronet_flops

CONVENTIONS = ("macs", "micronet")


@dataclass(frozen=True)
class FlopCounts:
    """The cost of one forward pass of the example.

    MACs are integers: for every call of a weighted operation the number of (active) weights times their reuse,
    padding included, and for contractions without a weight the products of both operands. FLOPs are twice the
    MACs, plus the categories in `also`; or, under the `micronet` convention, what the paper's notebooks count.

    Attributes:
        nodes: a `NodeCost` for every node that costs something or could not be counted.
        parameters: number of parameters of the model, every one counted once.
        also: categories of other arithmetic that `flops` includes (`CATEGORIES`); none by default.
        convention: `"macs"` or `"micronet"`.
        densities: weight name -> planned density, where it is known better than by whole weights.
        places: node name -> place in the code, for nodes with an operation that has no rule.
        links: the graph for pictures, in order: a node's name and those before it, nodes without a cost left out.
    """

    nodes: tuple[NodeCost, ...]
    parameters: int = 0
    also: tuple[str, ...] = ()
    convention: str = "macs"
    densities: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    links: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"convention: {self.convention!r} is not one of {', '.join(CONVENTIONS)}")
        for category in self.also:
            if category not in CATEGORIES:
                raise ConfigError(
                    f"also: {category!r} is not one of {', '.join(CATEGORIES)}{nearest(category, CATEGORIES)}"
                )

    # -- totals -------------------------------------------------------------------------------------------

    @property
    def dense_macs(self) -> int:
        """MACs with all weights."""
        return sum(node.macs for node in self.nodes)

    @property
    def macs(self) -> int:
        """MACs with the active weights only; the same as `dense_macs` for a model without masks."""
        return sum(node.sparse_macs for node in self.nodes)

    @property
    def flops(self) -> float:
        """FLOPs with the active weights only, in the report's convention; an int but for `micronet`."""
        return sum(self.flops_by_node.values())

    @property
    def dense_flops(self) -> float:
        """FLOPs with all weights, in the report's convention."""
        return sum(self.dense_flops_by_node.values())

    @property
    def ratio(self) -> float:
        """Sparse over dense FLOPs."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def other(self) -> dict[str, int]:
        """FLOPs that are not MACs, by category, whether or not `flops` includes them."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for node in self.nodes:
            for category, flops in node.other.items():
                totals[category] += flops
        return totals

    # -- parts --------------------------------------------------------------------------------------------

    @property
    def by_node(self) -> dict[str, int]:
        """Node name -> MACs with the active weights."""
        return {node.node: node.sparse_macs for node in self.nodes}

    @property
    def by_module(self) -> dict[str, int]:
        """Qualified module name -> MACs with the active weights of everything called inside it; `""` is all."""
        totals: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            path = node.module
            while path:
                totals[path] += node.sparse_macs
                path = path.rpartition(".")[0]
            totals[""] += node.sparse_macs
        return dict(totals)

    @property
    def flops_by_node(self) -> dict[str, float]:
        """Node name -> FLOPs with the active weights, in the report's convention."""
        return self._flops({node.node: self.densities.get(node.weight or "", node.density) for node in self.nodes})

    @property
    def dense_flops_by_node(self) -> dict[str, float]:
        """Node name -> FLOPs with all weights, in the report's convention."""
        return self._flops(None)

    @property
    def unknown(self) -> dict[str, tuple[str, ...]]:
        """Node name -> operations in it that no rule covers and that the totals therefore lack."""
        return {node.node: node.unknown for node in self.nodes if node.unknown}

    def _flops(self, densities: Mapping[str, float] | None) -> dict[str, float]:
        if self.convention == "micronet":
            first = next((node.node for node in self.nodes if node.operation.startswith("conv")), "")
            return {
                node.node: micronet_flops(node, densities[node.node] if densities else 1.0, node.node == first)
                for node in self.nodes
            }
        return {
            node.node: 2 * (node.sparse_macs if densities else node.macs) + sum(node.other.get(c, 0) for c in self.also)
            for node in self.nodes
        }

    # -- the same nodes under other circumstances ---------------------------------------------------------

    def at(self, active: Mapping[str, int], densities: Mapping[str, float] | None = None) -> Self:
        """The same model with these numbers of active weights; weights that are not named are dense.

        `densities` are the planned ones, for the `micronet` convention, which does not round to whole weights.
        """
        nodes = tuple(replace(node, active=node.active_among(active)) for node in self.nodes)
        return replace(self, nodes=nodes, densities=dict(densities or {}))

    def under(self, convention: str | None = None, also: tuple[str, ...] | None = None) -> Self:
        """The same counts in another convention, or with other categories."""
        return replace(
            self,
            convention=self.convention if convention is None else convention,
            also=self.also if also is None else tuple(also),
        )
