"""`compact`: the smaller model without the channels that masks, or the caller, have removed."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..captured_module import CapturedModule
from ..core.channel_records import Atom
from ..core.errors import SelectionError
from ..core.labelled_model import LabelledModel
from ..core.records import Captured
from ..passes.compact_channels import compact_channels
from ..passes.find_dead_channels import find_dead_channels
from ..passes.fold_constants import fold_constants
from ..passes.group_channels import group_channels, label_channels
from ..passes.zero_channels import zero_channels
from .analysis import captured_for_channels, refuse_opaque
from .compact_module import CompactModule
from .optimizer_state import check_holds, move_optimizer


def compact(
    model: nn.Module,
    example_input: Any = None,
    *,
    remove: Iterable[Atom] = (),
    stored_zeros: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> CompactModule:
    """A module of ordinary, smaller layers that computes the same, in both modes.

    What no active weight reads is removed, and what then reads nothing, and so on. So is what is constant, where
    its contribution can be moved into a bias exactly. `remove` names atoms that go besides, as if the slices that
    read them were masked; norm-coupled ones go as if everything of theirs was (what makes them, biases, added
    parameters), and the norms keep the original width in their statistics. Keys stay, tensors get smaller. Of a
    tensor that would be left empty one channel stays, with zeros in what reads it.

    Args:
        model: a `SparseModule` (its masks decide), a `CapturedModule`, or any module that can be captured;
            never touched.
        example_input: as for `channel_groups`.
        remove: atoms of `channel_groups` of the same model: exact ones, and those that LayerNorm, RMSNorm and
            GroupNorm alone couple, where they are then 0 at the norm's input.
        stored_zeros: where a weight has no mask, take its stored zeros as inactive, as after `fold()`.
        optimizer: of the model's parameters; it is moved over in place, its state cut, so that the training goes on
            with the result. Detach a rewirer first.

    Raises:
        SelectionError: an atom that is pinned, that something else than a norm couples, or that is not of this model.
        CaptureError, InputError: as of `channel_groups`.
        RuntimeStateError: an optimizer of another model, or whose state cannot be cut; it is as it was then.
    """
    if optimizer is not None:
        check_holds(optimizer, model)
    labelled, gone = removable(model, example_input, remove, stored_zeros)
    compacted = compact_channels(labelled, gone)
    small = CompactModule(_without_captured_attributes(compacted.captured), compacted.kept)
    if optimizer is not None:
        move_optimizer(optimizer, model, small, compacted.kept)
    return small


def removable(
    model: nn.Module, example_input: Any, remove: Iterable[Atom], stored_zeros: bool
) -> tuple[LabelledModel, Tensor]:
    """A labelled copy of the model, constants folded, and for every label whether it goes; arguments of `compact`."""
    masked: Any = model
    active: dict[str, Tensor] = {}
    if hasattr(masked, "masks") and hasattr(masked, "fold"):
        active = {name: mask.clone() for name, mask in masked.masks.items()}
        model = masked.fold()
        with torch.no_grad():
            for name, mask in active.items():
                model.get_parameter(name).masked_fill_(~mask, 0)
    elif isinstance(model, CapturedModule):
        model = copy.deepcopy(model)
    captured = captured_for_channels(model, example_input)
    refuse_opaque(captured, "compact")
    labelled = label_channels(captured)
    labelled.active = active
    if stored_zeros:
        weights = {name for name, _ in labelled.roles} - active.keys()
        labelled.active |= {name: labelled.captured.model.get_parameter(name) != 0 for name in weights}
    atoms = _known(labelled, remove)
    coupled = [atom for atom in atoms if atom.status == "norm-coupled"]
    if coupled:
        zero_channels(labelled, _labels_of(labelled, coupled))
    gone = _labels_of(labelled, atoms)
    fold_constants(labelled)
    return labelled, find_dead_channels(labelled, gone)


def _labels_of(labelled: LabelledModel, atoms: Iterable[Atom]) -> Tensor:
    """bool, one a label: those of the atoms."""
    flags = torch.zeros_like(labelled.space.stays)
    flags[[atom.id for atom in atoms]] = True
    return flags


def _known(labelled: LabelledModel, remove: Iterable[Atom]) -> list[Atom]:
    if not isinstance(remove, Iterable):
        raise SelectionError(f"remove: a {type(remove).__name__}; give atoms of channel_groups, such as group.atoms")
    wanted = list(remove)
    if not wanted:
        return []
    for atom in wanted:
        if not isinstance(atom, Atom):
            raise SelectionError(
                f"remove: {atom!r:.60} is no atom; take atoms of channel_groups, such as group.with_status('exact')"
            )
    own = {atom.id: atom for group in group_channels(labelled) for atom in group.atoms}
    for atom in wanted:
        if atom.id not in own or own[atom.id].slices != atom.slices:
            raise SelectionError(f"remove: {atom.slices[0].tensor} has no such atom; analyse this very model")
        if atom.status == "pinned":
            raise SelectionError(
                f"remove: a channel of {atom.slices[0].tensor} is pinned ({atom.reason}); only exact ones go, and "
                "those that norms alone couple"
            )
    return wanted


def _without_captured_attributes(captured: Captured) -> Captured:
    """The tree of a captured module as a plain one, for a new captured module to be built on."""
    if isinstance(captured.model, CapturedModule):
        tree = nn.Module()
        own = CapturedModule.__annotations__.keys() | CompactModule.__annotations__.keys()
        tree.__dict__.update({key: value for key, value in captured.model.__dict__.items() if key not in own})
        captured.model = tree
    return captured
