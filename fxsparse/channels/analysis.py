"""`channel_groups`: from a model or a captured module to its groups of channels."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..captured_module import CapturedModule
from ..core.errors import CaptureError, InputError
from ..core.graphs import copy_graph
from ..core.records import Captured
from ..passes.annotate_shapes import annotate_shapes
from ..passes.drop_unread import drop_unread
from ..passes.group_channels import group_channels, label_channels
from ..passes.open_leaves import open_leaves
from ..passes.trace import trace
from ..passes.try_removal import try_removal
from .channel_groups import ChannelGroups


def channel_groups(model: nn.Module, example_input: Any = None) -> ChannelGroups:
    """Which channels of a model can only be removed together, in both modes, without running it.

    Args:
        model: any module that can be captured, a `CapturedModule` or a `SparseModule`; never touched.
        example_input: as for `sparsify`; a captured module has its own and needs none. Sizes decide what the
            graph holds; the groups then hold at any batch size.

    Raises:
        CaptureError: the model cannot be captured: where, and why.
        InputError: no example for a model that is not captured yet.
    """
    labelled = label_channels(captured_for_channels(model, example_input))
    try_removal(labelled)
    return ChannelGroups(labelled.captured.name, tuple(group_channels(labelled)))


def captured_for_channels(model: nn.Module, example_input: Any = None) -> Captured:
    """The graphs of a model with shapes; of a captured module they are copies, its tensors are its own."""
    if isinstance(model, CapturedModule):
        return opened(
            Captured(
                *(model._get_name(), model, model.graphs, model.example, model.capture, model.notes, model.flags),
                mode_readers=model.mode_readers,
                reason=model.capture_reason,
                units=model.units,
            )
        )
    if example_input is None:
        raise InputError(f"example_input: {type(model).__name__} is not captured yet; give an input that it takes")
    return opened(trace(model, example_input))


def opened(captured: Captured) -> Captured:
    """A copy of the graphs over the same tensors, with shapes, in which small modules are written out."""
    graphs = {"eval": copy_graph(captured.graphs["eval"])}
    shared = captured.graphs["train"] is captured.graphs["eval"]
    graphs["train"] = graphs["eval"] if shared else copy_graph(captured.graphs["train"])
    captured = replace(captured, graphs=graphs)
    annotate_shapes(captured)
    open_leaves(captured)
    drop_unread(captured)
    return captured


def refuse_opaque(captured: Captured, what: str) -> None:
    """`CaptureError` where a submodule is kept as one call; `what` cannot be done then."""
    if captured.units is not None:
        kept = next(name or captured.name for name in captured.units.opaque)
        raise CaptureError(
            f"cannot {what} {captured.name}: {kept} is kept as one call, and what it does with its channels is not "
            "known; take submodules that are captured on their own"
        )
