"""`lower_for_inference`: a module that only runs, on sparse kernels."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..captured_module import CapturedModule
from ..core.errors import InputError, RuntimeStateError
from ..core.graphs import attribute
from ..core.records import Captured
from ..passes.choose_layout import choose_layout, pool_on_kernels
from ..passes.fuse_lowered import fuse_lowered
from ..passes.lower_recurrent import SparseRecurrence, lower_recurrent
from ..passes.remove_masks import remove_masks
from .decisions import Decision, decide_whole, decision_report

ALREADY = "this module is lowered already; lower what sparsify returned, which is left as it was"


class LoweredModule(CapturedModule):
    """A captured module for inference, in which chosen layers compute with their active weights alone.

    Attributes:
        decisions: what was decided on every site.
    """

    decisions: tuple[Decision, ...]

    def __init__(self, captured: Captured, decisions: Sequence[Decision]) -> None:
        super().__init__(captured)
        self.decisions = tuple(decisions)
        self.eval()

    def train(self, mode: bool = True) -> "LoweredModule":
        """Refuses training: batch normalisation is folded into the weights, which have no gradients."""
        if mode:
            raise InputError("this module was lowered for inference; sparse.lower(train=True) gives one that trains")
        super().train(False)
        return self

    def lower(self, *args: Any, **options: Any) -> Any:
        """Refuses to lower what is lowered: a `RuntimeStateError`."""
        raise RuntimeStateError(ALREADY)

    def report(self) -> str:
        """Which layers run on sparse kernels, with the cost model's estimates, for a person to read."""
        return decision_report(self.decisions)


@torch.no_grad()
def lower_for_inference(
    lowered: Captured,
    decisions: Sequence[Decision],
    layers: str | Sequence[str],
    recurrences: Sequence[SparseRecurrence] = (),
) -> LoweredModule:
    """Fuses a lowered graph of eval mode.

    Args:
        lowered: graphs that call `lowered_conv` and `lowered_linear`, annotated with shapes; its tensors are copied, as
            far as they are read.
        decisions: on the masked weights.
        layers: as for `decide`.
        recurrences: GRU calls to lower as well.
    """
    more, whole = decide_whole(lowered, layers)
    again = {decision.name for decision in more}
    decisions = [*(decision for decision in decisions if decision.name not in again), *more]
    graph, own = lower_recurrent(lowered.model, lowered.graphs["eval"], recurrences)
    graph, tensors = fuse_lowered(lowered.model, remove_masks(graph), whole)
    tensors |= own
    pool_on_kernels(lowered.model, graph)
    choose_layout(lowered.model, graph)
    return module_of(lowered, graph, tensors, decisions)


def module_of(
    lowered: Captured, graph: fx.Graph, tensors: Mapping[str, Tensor], decisions: Sequence[Decision]
) -> LoweredModule:
    """A module that runs a graph in both modes, over copies of what it reads.

    Args:
        lowered: whose attributes the graph reads.
        tensors: attributes that are others than there; they are not copied.
    """
    root = nn.Module()
    copied: dict[int, Any] = {id(lowered.model): root}  # submodules that run by a graph refer to the whole
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            owner, _, last = str(node.target).rpartition(".")
            _module_at(root, owner).register_buffer(last, tensors[str(node.target)])
        elif node.op in ("get_attr", "call_module"):
            _copy_attribute(lowered.model, root, str(node.target), copied)
    for _, _, inside in lowered.units.distinct_graphs() if lowered.units else ():
        for node in inside.find_nodes(op="get_attr"):
            _copy_attribute(lowered.model, root, str(node.target), copied)
    both = {"train": graph, "eval": graph}
    captured = replace(lowered, model=root, graphs=both, flags={}, mode_readers=(), notes=list(lowered.notes))
    return LoweredModule(captured, decisions)


def _module_at(root: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, with plain modules on the way to it."""
    for atom in name.split(".") if name else ():
        if atom not in root._modules:
            root.add_module(atom, nn.Module())
        root = root._modules[atom]  # type: ignore[assignment]
    return root


def _copy_attribute(source: nn.Module, target: nn.Module, name: str, copied: dict[int, Any]) -> None:
    """Copies an attribute to the same qualified name."""
    owner, _, last = name.rpartition(".")
    target = _module_at(target, owner)
    value: Any = attribute(source, name)
    if last in target._modules or hasattr(target, last):
        return
    if isinstance(value, nn.Parameter):
        value = nn.Parameter(value.detach().clone(), requires_grad=False)
    elif isinstance(value, Tensor):
        target.register_buffer(last, value.detach().clone())
        return
    else:
        value = copy.deepcopy(value, copied)
    setattr(target, last, value)
