"""A weight that is cut over ranks by `fully_shard` (FSDP2), its mask and the optimizer's state along with it.

Each rank holds some rows of the weight, of its gradient (after FSDP averaged it) and of the mask. The forward pass
takes the weight as it is stored, so inactive positions are 0 there at all times; the gradient at inactive positions is
taken away as soon as it arrives at the part, before anybody can clip by it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RuntimeStateError
from ..core.packed_masks import is_packed
from ..core.records import WeightSite
from ..core.sharded_tensors import count_true, is_fully_sharded, is_sharded, local_part
from .masked_site import MaskedModule, MaskedSite
from .methods import Method
from .shards import Shards

_WATCHED = "_fxsparse_masks_gradient"


class ShardedSite(MaskedSite):
    """A site of whose weight and mask this rank holds some rows; all tensors are those rows, all numbers the whole's.

    Counts are collectives: every rank has to ask.
    """

    def __init__(self, module: MaskedModule, site: WeightSite, target: int) -> None:
        super().__init__(module, site, target)
        self.shards = shards_of(self.parameter)

    @property
    def parameter(self) -> nn.Parameter:
        found = self.module.get_parameter(self.name)
        if not is_sharded(found):
            cut_again(self.module)
            found = self.module.get_parameter(self.name)
        return found

    @property
    def weight(self) -> Tensor:
        return local_part(self.parameter)

    @property
    def stored_mask(self) -> Tensor:
        return local_part(super().stored_mask)

    @property
    def mask(self) -> Tensor:
        return self.stored_mask

    @property
    def active(self) -> int:
        mask, (counted, version) = self.mask, self._counted
        if mask is not counted or mask._version != version:
            self._active, self._counted = count_true(super().stored_mask), (mask, mask._version)
        return int(self._active)

    def dead_units(self) -> tuple[int, int, int, int]:
        """As of `MaskedSite`: rows are spread over the ranks, and each rank sees a part of every column."""
        mask = self.mask
        rows = mask.flatten(1).any(1).sum().view(1)
        columns = mask.transpose(0, 1).flatten(1).any(1).to(rows.dtype)
        alive = self.shards.add_up(torch.cat([rows, columns]))
        n_rows, n_columns = self.parameter.shape[:2]
        by_row = n_rows - int(alive[0]), n_rows
        by_column = n_columns - int((alive[1:] > 0).sum()), n_columns
        return (*by_column, *by_row) if self.output_dim == 1 else (*by_row, *by_column)

    def gradient(self) -> Tensor | None:
        gradient = self.parameter.grad
        return None if gradient is None else local_part(gradient)

    def momentum(self, optimizer: torch.optim.Optimizer) -> Tensor:
        return local_part(self._mean_of_gradients(optimizer))

    def stray_weights(self) -> Tensor:
        return self.shards.add_up(super().stray_weights())

    def has_zeros(self) -> bool:
        """Not asked: the forward pass takes a gathered weight as it is."""
        return False

    def note_zeros(self) -> None:
        """Nothing."""

    def forget_zeros(self) -> None:
        """Nothing."""


def shards_of(parameter: Any) -> Shards:
    """How a DTensor lies over the ranks."""
    dimension = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
    return Shards(parameter.device_mesh.get_group(dimension), parameter.shape)


def cut_again(module: Any) -> None:
    """`fully_shard` leaves the whole parameters in place after a forward pass that no backward pass follows."""
    if is_fully_sharded(module):
        module.reshard()


def holds_shards(module: MaskedModule) -> bool:
    """Whether the weights of a module's sites are sharded; those that were gathered are cut again first."""
    cut_again(module)
    return any(is_sharded(module.get_parameter(site.name)) for site in module.sites)


def _check_method(method: Method) -> None:
    if not method.over_shards or getattr(method, "scope", "layer") != "layer":
        raise RuntimeStateError(
            f"{method.name} does not rewire weights that fully_shard has cut over ranks; use rigl, set, static or "
            "pruning by layer, or DistributedDataParallel"
        )


def check_still_whole(module: MaskedModule) -> None:
    """`RuntimeStateError` for a module that was sharded after a rewirer was attached to it."""
    if module.sites and is_sharded(module.get_parameter(module.sites[0].name)):
        raise RuntimeStateError(
            "fully_shard was called after attach; call it first, then build the optimizer from sparse.parameters(), "
            "then attach"
        )


@torch.no_grad()
def shard_masks(module: MaskedModule, method: Method | None = None) -> None:
    """Cuts every mask as its weight is cut, sets inactive weights to 0, and watches gradients; again is nothing.

    Args:
        module: `holds_shards` is True of it.
        method: that is going to rewire it.

    Raises:
        RuntimeStateError: weights that are cut in another way than `fully_shard` of the whole module cuts them, or a
            method that cannot rewire them.
    """
    _check_layout(module)
    if method is not None:
        _check_method(method)
    from torch.distributed.tensor import DTensor

    for site in module.sites:
        weight: Any = module.get_parameter(site.name)
        mask = module.get_buffer(site.mask_name)
        if not is_sharded(mask):
            own = shards_of(weight).part(mask).clone()
            owner, _, name = site.mask_name.rpartition(".")
            mask = DTensor.from_local(
                own, weight.device_mesh, weight.placements, run_check=False, shape=mask.shape, stride=mask.stride()
            )
            module.get_submodule(owner).register_buffer(name, mask)
        local_part(weight).masked_fill_(~local_part(mask), 0)
        if weight.requires_grad and not hasattr(weight, _WATCHED):
            weight.register_post_accumulate_grad_hook(partial(_mask_gradient, module, site.mask_name))
            setattr(weight, _WATCHED, True)


@torch.no_grad()
def _mask_gradient(module: MaskedModule, mask_name: str, parameter: nn.Parameter) -> None:
    """Called when a part of the averaged gradient has arrived: outside update steps only active weights get one."""
    if not module.dense_gradient and parameter.grad is not None:
        local_part(parameter.grad).masked_fill_(~local_part(module.get_buffer(mask_name)), 0)


def _check_layout(module: MaskedModule) -> None:
    from torch.distributed.fsdp import FSDPModule

    if module.granularity.kind != "weight" or module.channel_sites:
        raise RuntimeStateError(
            f"granularity {module.granularity}: fully_shard cuts through its units; only granularity='weight' is "
            "rewired over shards"
        )
    if any(is_packed(module.get_buffer(site.mask_name)) for site in module.sites):
        raise RuntimeStateError("packed masks are not cut over ranks; sparsify without pack_masks")
    names = {id(module.get_parameter(site.name)): site.name for site in module.sites}
    parts = [(name, sub) for name, sub in module.named_modules() if isinstance(sub, FSDPModule)]
    for name, sub in parts:
        held = [names[id(p)] for p in sub.parameters() if id(p) in names] if sub is not module else []
        if held:
            raise RuntimeStateError(
                f"{name} was given to fully_shard by itself and holds {held[0]}; a SparseModule runs its graph and "
                "not the forward of its submodules, so call fully_shard on the whole of it alone"
            )
    if not is_fully_sharded(module):
        raise RuntimeStateError("this module's weights are DTensors, but fully_shard was not called on it as a whole")
    for site in module.sites:
        _check_weight(site.name, module.get_parameter(site.name))


def _check_weight(name: str, weight: Any) -> None:
    if not is_sharded(weight):
        raise RuntimeStateError(f"{name} is not sharded while others are; leave it out of fully_shard's ignored_params")
    cuts = [placement for placement in weight.placements if not placement.is_replicate()]
    if len(cuts) != 1 or type(cuts[0]).__name__ != "Shard" or cuts[0].dim != 0:
        raise RuntimeStateError(
            f"{name} lies over the ranks as {tuple(weight.placements)}; masks follow weights that are cut along their "
            "first dimension alone, as fully_shard does by itself"
        )
    own, shards = local_part(weight), shards_of(weight)
    if own.device.type != weight.device_mesh.device_type:
        raise RuntimeStateError(
            f"{name} lies on {own.device.type}, and its ranks talk over {weight.device_mesh.device_type}; rewiring "
            "needs both in one place: leave out the CPU offload"
        )
    if len(own) != shards.stop - shards.start:
        raise RuntimeStateError(f"{name} has {len(own)} rows on this rank instead of {shards.stop - shards.start}")
