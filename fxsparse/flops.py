"""`count_flops` and its report: what a forward pass costs, dense and sparse.

Convention: MACs are multiply-accumulates of convolutions, linears and tensor contractions; FLOPs are twice
that. Bias, normalisation, activations, pooling and softmax are not counted.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

from .captured_module import CapturedModule
from .passes.count_flops import NodeCost
from .passes.count_flops import count_flops as count_nodes
from .passes.trace import trace


@dataclass(frozen=True)
class FlopReport:
    """The cost of one forward pass of the example.

    Attributes:
        nodes: a `NodeCost` for every node that costs something or could not be counted.
    """

    nodes: tuple[NodeCost, ...]

    @property
    def dense_macs(self) -> int:
        """MACs with all weights."""
        return sum(node.macs for node in self.nodes)

    @property
    def macs(self) -> int:
        """MACs with the active weights only; the same as `dense_macs` for a model without masks."""
        return sum(node.sparse_macs for node in self.nodes)

    @property
    def flops(self) -> int:
        """Twice the MACs."""
        return 2 * self.macs

    @property
    def ratio(self) -> float:
        """Sparse over dense."""
        return self.macs / self.dense_macs if self.dense_macs else 1.0

    @property
    def by_node(self) -> dict[str, int]:
        """Node name -> MACs with the active weights."""
        return {node.node: node.sparse_macs for node in self.nodes}

    @property
    def by_module(self) -> dict[str, int]:
        """Qualified module name -> MACs with the active weights of everything called inside it."""
        totals: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            path = node.module
            while path:
                totals[path] += node.sparse_macs
                path = path.rpartition(".")[0]
            totals[""] += node.sparse_macs
        return dict(totals)

    @property
    def unknown(self) -> dict[str, tuple[str, ...]]:
        """Node name -> operations in it that no rule covers and that the totals therefore lack."""
        return {node.node: node.unknown for node in self.nodes if node.unknown}

    def table(self) -> str:
        """The nodes with a cost, and the totals."""
        rows = [[n.module, n.operation, n.macs, n.sparse_macs, n.sparse_macs / n.macs] for n in self.nodes if n.macs]
        rows.append(["total", "", self.dense_macs, self.macs, self.ratio])
        text = tabulate(rows, ["module", "operation", "MACs dense", "MACs sparse", "ratio"], intfmt=",", floatfmt=".4f")
        lines = [
            "MACs of one forward pass of the example; FLOPs are twice that; padding counts, bias does not",
            text,
        ]
        for name, operations in self.unknown.items():
            lines.append(f"not counted: {', '.join(operations)} in {name}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The nodes and totals as a JSON object."""
        totals = {"macs": self.macs, "dense_macs": self.dense_macs, "flops": self.flops, "ratio": self.ratio}
        return json.dumps(totals | {"nodes": [asdict(node) for node in self.nodes]}, indent=1)


def count_flops(model: nn.Module, example_input: Any = None) -> FlopReport:
    """Counts a model's forward pass in eval mode, for the sizes of `example_input`.

    Args:
        model: any module that can be captured, or a `SparseModule`, which is counted at its present densities.
        example_input: as for `sparsify`; a captured module has its own and needs none.

    Raises:
        CaptureError: the model cannot be captured.
        InputError: a node fails for these shapes.
    """
    if isinstance(model, CapturedModule) and example_input is None:
        return count_module(model, getattr(model, "active_counts", {}))
    if isinstance(model, CapturedModule):
        from .core.records import specs_of
        from .passes.trace import split_example

        args, kwargs = split_example(example_input)
        example = (specs_of(args), specs_of(kwargs))
        return FlopReport(tuple(count_nodes(model, model.graphs["eval"], example, getattr(model, "active_counts", {}))))
    captured = trace(model, example_input)
    return FlopReport(tuple(count_nodes(captured.model.eval(), captured.graphs["eval"], captured.example, {})))


def count_module(module: CapturedModule, active: Mapping[str, int]) -> FlopReport:
    """The cost of a captured module at the given active counts, for the example it was captured with."""
    return FlopReport(tuple(count_nodes(module, module.graphs["eval"], module.example, active)))
