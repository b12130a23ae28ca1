"""Training with active weights alone: a module's lowered weights, their graphs, and the optimizer's state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.graphs import pack_graph, unpack_graph
from ..core.records import Captured
from ..kernels import SparsePattern
from ..passes.choose_layout import choose_layout
from ..passes.fuse_norms import fuse_norms
from ..passes.keep_views import keep_views
from ..passes.lower_recurrent import SparseRecurrence
from ..passes.lower_weights import lower_weights, pattern_names
from ..runtime.lowered_site import ADVICE, Storage, pattern_of, restore_dense, set_pattern, store_values
from ..runtime.resizing import check_resizable, resize_parameter
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
        self._order: dict[str, list[str]] = {}  # owner of lowered weights -> its buffers as they were

    def lowered_graphs(self, captured: Captured, train: bool) -> dict[str, fx.Graph]:
        """Graphs that call sparse operators, of masked ones; for training, laid out for them."""
        calls = {name: storage.calls for name, storage in self._planned.items()}
        blocks = {name: storage.block for name, storage in self._planned.items()}
        made = {}
        for mode, graph in captured.distinct_graphs():
            made[mode] = lower_weights(graph, mode, calls, blocks)
            keep_views(captured.model, made[mode])
            if train:
                fuse_norms(captured.model, made[mode])
                choose_layout(captured.model, made[mode])
        return {"eval": made["eval"], "train": made.get("train", made["eval"])}

    def check(self, module: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """`RuntimeStateError` where the optimizer keeps a state that `store` could not take along."""
        for name in self._planned:
            check_resizable(module.get_parameter(name), name, optimizer, ADVICE)

    @torch.no_grad()
    def store(self, module: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Dense parameters and masks to active values and patterns."""
        for name, storage in self._planned.items():
            owner, _, mask = f"{name}_mask".rpartition(".")
            buffers = module.get_submodule(owner)._buffers
            self._order.setdefault(owner, list(buffers))
            store_values(module, name, storage, buffers[mask], optimizer)
            del buffers[mask]
            self.weights[name] = storage

    @property
    def planned(self) -> Mapping[str, Storage]:
        """Name -> how a weight is stored once `store` is called."""
        return self._planned

    @torch.no_grad()
    def install(self, module: Any, name: str, values: Tensor, pattern: SparsePattern) -> None:
        """Puts a weight in place that was stored elsewhere; the module's own may be masked, lowered, or meta.

        An attached optimizer's state moves to the new pattern.
        """
        owner, _, last = name.rpartition(".")
        holder, parameter = module.get_submodule(owner), module.get_parameter(name)
        if name in self.weights:
            old = pattern_of(module, name, self.weights[name])
            resize_parameter(parameter, name, module._optimizer, lambda own: old.move(own, pattern), ADVICE)
            parameter.data.copy_(values)
        else:
            self._order.setdefault(owner, list(holder._buffers))
            holder._parameters[last] = nn.Parameter(values, parameter.requires_grad)
            del holder._buffers[f"{last}_mask"]
            self.weights[name] = self._planned[name]
        set_pattern(module, name, pattern)

    @torch.no_grad()
    def restore(self, module: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """The way back."""
        for name, storage in list(self.weights.items()):
            mask = restore_dense(module, name, storage, optimizer)
            owner, _, parameter = name.rpartition(".")
            module.get_submodule(owner).register_buffer(f"{parameter}_mask", mask)
        for owner, order in self._order.items():
            buffers = module.get_submodule(owner)._buffers
            for key in [*(key for key in order if key in buffers), *(key for key in list(buffers) if key not in order)]:
                buffers[key] = buffers.pop(key)
        self.weights.clear()
        self._order.clear()

    @contextmanager
    def at_full_size(self, module: Any, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """The module as it would be without lowering, for a while; gradients of active weights stay."""
        if not self.weights:
            yield
            return
        lowered = module._graphs
        gradients = {}
        for name, storage in self.weights.items():
            gradient = module.get_parameter(name).grad
            if gradient is not None:
                gradients[name] = (gradient, pattern_of(module, name, storage))
        self.restore(module, optimizer)
        module._graphs = dict(self.masked_graphs)
        try:
            yield
        finally:
            module._graphs = lowered
            self.store(module, optimizer)
            for name, (gradient, before) in gradients.items():
                now = pattern_of(module, name, self.weights[name])
                same = all(map(torch.equal, now.tensors, before.tensors))
                module.get_parameter(name).grad = gradient if same else now.gather(before.scatter(gradient))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: graphs as plain data."""
        masked = self.masked_graphs
        shared = masked["train"] is masked["eval"]
        packed = {mode: pack_graph(graph) for mode, graph in masked.items() if mode == "eval" or not shared}
        return self.__dict__ | {"masked_graphs": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        graphs = {mode: unpack_graph(rows) for mode, rows in state["masked_graphs"].items()}
        self.masked_graphs = {"train": graphs.get("train", graphs["eval"]), "eval": graphs["eval"]}

    def masks(self, module: Any) -> dict[str, Tensor]:
        """The masks of lowered weights, made now."""
        return {name: pattern_of(module, name, storage).mask() for name, storage in self.weights.items()}

    def nbytes(self, module: Any) -> int:
        """Bytes of all patterns."""
        return sum(module.get_buffer(buffer).nbytes for name in self.weights for buffer in pattern_names(name))
