"""The traced parts of submodules that stay one call in the graph, as plain data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Call = tuple[tuple, dict[str, Any]]
"""`(args, kwargs)` of one call, with a `TensorSpec` in place of every tensor."""


@dataclass
class Units:
    """Submodules inside opaque ones that were captured on their own, by mode and qualified name.

    The targets of a unit's graph are relative to the model, as those of the model's own graph are, and its node
    names begin with the unit's, so that passes may treat it as one more graph.

    Attributes:
        graphs: mode -> name of the submodule -> its graph; the same object in both modes where they do not differ.
        calls: mode -> name -> the calls that one run of the example makes, none for a unit that it does not reach.
        hidden: name of a parameter -> the reason why an opaque submodule uses it outside of every unit.
        opaque: name of an opaque submodule (empty for the model itself) -> why it could not be traced.
    """

    graphs: dict[str, dict[str, fx.Graph]] = field(default_factory=lambda: {"eval": {}, "train": {}})
    calls: dict[str, dict[str, list[Call]]] = field(default_factory=lambda: {"eval": {}, "train": {}})
    hidden: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)

    def distinct_graphs(self) -> Iterator[tuple[str, str, fx.Graph]]:
        """Mode, name and graph of every unit: those of `"eval"`, then those that only training has."""
        for mode in ("eval", "train"):
            for name, graph in self.graphs[mode].items():
                if mode == "eval" or self.graphs["eval"].get(name) is not graph:
                    yield mode, name, graph

    def example_of(self, mode: str, name: str) -> Call | None:
        """The first call of a unit, of the other mode where this one has none."""
        for one in (mode, "eval", "train"):
            if self.calls[one].get(name):
                return self.calls[one][name][0]
        return None

    def replaced(self, rewrite: Any) -> "Units":
        """A copy in which every graph is `rewrite(graph)`; graphs that were shared stay shared."""
        new: dict[int, fx.Graph] = {}
        graphs = {
            mode: {name: new.setdefault(id(graph), rewrite(graph)) for name, graph in own.items()}
            for mode, own in self.graphs.items()
        }
        return Units(graphs, self.calls, self.hidden, self.opaque)
