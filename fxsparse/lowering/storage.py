"""Training with active weights alone: a module's lowered weights, their graphs, and the optimizer's state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..core.records import Captured
from ..passes.choose_layout import choose_layout
from ..passes.fuse_norms import fuse_norms
from ..passes.lower_recurrent import SparseRecurrence
from ..passes.lower_weights import lower_weights, pattern_names
from ..runtime.lowered_site import Storage, pattern_of, restore_dense, store_values
from .decisions import Decision


class LoweredStorage:
    """What a module whose weights are stored as active values has beside them.

    Attributes:
        decisions: what was decided on every site.
        weights: name -> how it is stored.
        masked_graphs: the graphs of the masked module, to go back to.
        recurrences: GRU calls that are lowered as well, for inference.
    """

    def __init__(
        self,
        decisions: Sequence[Decision],
        planned: Mapping[str, Storage],
        masked_graphs: Mapping[str, fx.Graph],
        recurrences: Sequence[SparseRecurrence] = (),
    ) -> None:
        """`planned` says how weights are stored once `store` is called."""
        self.decisions = tuple(decisions)
        self.masked_graphs = dict(masked_graphs)
        self.recurrences = tuple(recurrences)
        self.weights: dict[str, Storage] = {}
        self._planned = dict(planned)

    def lowered_graphs(self, captured: Captured, train: bool) -> dict[str, fx.Graph]:
        """Graphs that call sparse operators, of masked ones; for training, laid out for them."""
        calls = {name: storage.calls for name, storage in self._planned.items()}
        blocks = {name: storage.block for name, storage in self._planned.items()}
        made = {}
        for mode, graph in captured.distinct_graphs():
            made[mode] = lower_weights(graph, mode, calls, blocks)
            if train:
                fuse_norms(captured.model, made[mode])
                choose_layout(captured.model, made[mode])
        return {"eval": made["eval"], "train": made.get("train", made["eval"])}

    @torch.no_grad()
    def store(self, module: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Dense parameters and masks to active values and patterns."""
        for name, storage in self._planned.items():
            owner, _, mask = f"{name}_mask".rpartition(".")
            buffers = module.get_submodule(owner)._buffers
            store_values(module, name, storage, buffers[mask], optimizer)
            del buffers[mask]
            self.weights[name] = storage

    @torch.no_grad()
    def restore(self, module: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """The way back."""
        for name, storage in list(self.weights.items()):
            mask = restore_dense(module, name, storage, optimizer)
            owner, _, parameter = name.rpartition(".")
            module.get_submodule(owner).register_buffer(f"{parameter}_mask", mask)
        self.weights.clear()

    @contextmanager
    def at_full_size(self, module: Any, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """The module as it would be without lowering, for a while."""
        if not self.weights:
            yield
            return
        lowered = module._graphs
        self.restore(module, optimizer)
        module._graphs = dict(self.masked_graphs)
        try:
            yield
        finally:
            module._graphs = lowered
            self.store(module, optimizer)

    def masks(self, module: Any) -> dict[str, Tensor]:
        """The masks of lowered weights, made now."""
        return {name: pattern_of(module, name, storage).mask() for name, storage in self.weights.items()}

    def nbytes(self, module: Any) -> int:
        """Bytes of all patterns."""
        return sum(module.get_buffer(buffer).nbytes for name in self.weights for buffer in pattern_names(name))
