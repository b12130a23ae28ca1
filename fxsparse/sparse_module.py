"""`SparseModule`: a captured model whose weights go through masks."""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .captured_module import CapturedModule
from .channels import CompactModule, compact
from .channels.analysis import captured_for_channels
from .channels.channel_plan import channels_in
from .core.channel_sites import ChannelPlan, ChannelSite, alive_in, clear_carriers
from .core.errors import RuntimeStateError
from .core.granularity import SINGLE_WEIGHTS, Granularity, UnitLayout, check_masks, groups_of, layouts_of
from .core.group_layout import GroupLayout
from .core.known_zeros import note_zeros
from .core.mask_storage import bool_masks
from .core.masking import in_format_of, initial_mask, seeded_generator
from .core.packed_masks import pack_mask, unpack_mask
from .core.records import Captured, Uncovered, WeightSite
from .core.sharded_tensors import refuse_sharded
from .flops import FlopReport, count_module, planned_cost
from .kernels import update_steps
from .lowering import LowerableModule
from .lowering.decisions import decision_report
from .mask_counts import MaskCounts
from .passes.group_channels import label_channels
from .passes.insert_masks import GATE, insert_masks
from .passes.lower_weights import RUN
from .passes.remove_masks import remove_masks
from .report import channel_lines, site_report, unit_lines
from .runtime.compaction import Compaction
from .runtime.methods import Method
from .runtime.rewirer import Rewirer
from .runtime.schedule import Schedule, UpdateSchedule
from .runtime.semantics import Semantics
from .runtime.sharded_site import holds_shards, shard_masks


class SparseModule(MaskCounts, LowerableModule):
    """A masked `torch.fx.GraphModule` that trains in the user's own loop. Made by `fxsparse.sparsify`.

    Attributes:
        sites: the masked weights (`WeightSite`), in execution order.
        uncovered: every other matrix-shaped parameter, with the reason.
        method: the training method that `attach` will run.
        target_sparsities: weight name -> the sparsity that it was given.
        schedule_options: of `UpdateSchedule.for_run`.
        seed: of the initial masks and of every random choice while rewiring.
        semantics: the choices on which published implementations differ.
        channels: the channel sites, where whole channels are dropped and grown; else None.
        granularity: what is dropped and grown as one.
        unit_layouts: weight name -> its units, where they are blocks of weights; else empty.
        group_layouts: weight name -> its groups, where each group of M weights keeps N active; else empty.
        left_dense: weight name -> why it has no such groups, and so stays dense.
        dense_gradient: whether `weight.grad` is dense in the present step (or the magnitude of it); the rewirer
            sets it.
    """

    sites: tuple[WeightSite, ...]
    uncovered: tuple[Uncovered, ...]
    method: Method
    target_sparsities: dict[str, float]
    schedule_options: dict[str, Any]
    seed: int
    semantics: Semantics
    channels: ChannelPlan | None
    granularity: Granularity
    unit_layouts: Mapping[str, UnitLayout]
    group_layouts: Mapping[str, GroupLayout]
    left_dense: Mapping[str, str]
    dense_gradient: bool | str
    _rewirer: Rewirer | None

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[WeightSite],
        uncovered: Sequence[Uncovered],
        sparsities: Mapping[str, float],
        method: Method,
        schedule_options: Mapping[str, Any],
        seed: int,
        semantics: Semantics | None = None,
        masks: Mapping[str, Tensor] | None = None,
        channels: ChannelPlan | None = None,
        granularity: Granularity = SINGLE_WEIGHTS,
        pack_masks: bool = False,
    ) -> None:
        """`sparsities` are what the method aims at; `masks`, where given, take the place of random ones.

        With `channels`, whole channels are dropped and grown, and `masks` have to be given. Of units such as blocks,
        `sparsities` are shares of them.
        """
        insert_masks(captured, sites)
        super().__init__(captured)
        self.sites = tuple(sites)
        self.uncovered = tuple(uncovered)
        self.target_sparsities = dict(sparsities)
        self.method = method
        self.schedule_options = dict(schedule_options)
        self.seed = seed
        self.semantics = semantics or Semantics()
        self.channels = channels
        self.granularity = granularity
        self.unit_layouts = layouts_of(granularity, sites)
        groups, self.left_dense = groups_of(granularity, sites, exact=not method.starts_dense)
        self.group_layouts = {name: layout for name, layout in groups.items() if sparsities[name] > 0.0}
        self.dense_gradient = False
        self.lowered_run = update_steps.new_run()
        self._rewirer = None
        self._storage = None
        for site in self.sites:
            weight = self.get_parameter(site.name)
            owner, _, parameter = site.name.rpartition(".")
            if masks is not None:
                mask = in_format_of(weight, masks[site.name])
            else:
                sparsity = method.initial_sparsity(sparsities[site.name])
                generator, drawn = seeded_generator(seed, "mask", site.name), self.semantics.initial_masks
                if site.name in self.group_layouts and sparsity > 0.0:
                    mask = in_format_of(weight, self.group_layouts[site.name].random_mask(weight, generator))
                else:
                    layout = self.unit_layouts.get(site.name)
                    mask = initial_mask(weight, sparsity, generator, drawn == "bernoulli", layout)
            self.get_submodule(owner).register_buffer(f"{parameter}_mask", pack_mask(mask) if pack_masks else mask)
        self.apply_masks_()

    # -- what is masked -----------------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Weight name -> bool mask of the weight's shape, in execution order. Change in place only.

        While training goes on at the compact size, of weights that are lowered, and where they are packed, they are
        copies.
        """
        made = {} if self._storage is None else self._storage.masks(self)
        with self._at_compact_or_full_size():
            return MappingProxyType(
                {site.name: made[site.name] if site.name in made else self._mask_of(site) for site in self.sites}
            )

    def _mask_of(self, site: WeightSite) -> Tensor:
        return unpack_mask(self.get_buffer(site.mask_name), torch.Size(site.shape))

    @property
    def is_lowered(self) -> bool:
        """Whether `lower(train=True)` is in force, even if it left every weight dense."""
        return self._storage is not None

    @property
    def channel_sites(self) -> tuple[ChannelSite, ...]:
        """The channel sites; none where single weights are dropped and grown."""
        return self.channels.sites if self.channels is not None else ()

    @property
    def active_channels(self) -> dict[str, Tensor]:
        """Channel site -> which of its atoms are active (bool, CPU)."""
        masks = self.masks
        return {site.name: alive_in(site, masks) for site in self.channel_sites}

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Sets every inactive weight to exactly 0 in storage; of inactive channels, biases and norms too."""
        if holds_shards(self):
            shard_masks(self)
            return
        with self._at_full_size():
            for site in self.sites:
                weight, mask = self.get_parameter(site.name), self.get_buffer(site.mask_name)
                weight.masked_fill_(~mask, 0)
                if self._rewirer is not None:  # which sees to it that they stay so
                    note_zeros(weight, mask)
            if self.channels is not None and not any(mask.is_meta for mask in self.masks.values()):
                for channels, alive in zip(self.channel_sites, self.active_channels.values(), strict=True):
                    clear_carriers(self, channels, ~alive)
        if self._rewirer is not None:
            self._rewirer.weights_loaded()

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        rewirer = getattr(self, "_rewirer", None)
        if mode and not self.training and rewirer is not None:
            rewirer.evaluated()
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; inactive weights are set to 0 afterwards.

        A dense model's checkpoint loads with `strict=False`; the masks stay as they are.
        """
        for site in self.sites:
            mask = state_dict.get(site.mask_name)
            if mask is not None and mask.dtype != torch.bool:
                raise RuntimeStateError(f"{site.mask_name} is {mask.dtype} in this state_dict; a mask is bool")
        given = {site.name: state_dict[site.mask_name] for site in self.sites if site.mask_name in state_dict}
        whole = all(site.name in given and given[site.name].shape == site.shape for site in self.sites)
        if self.channels is not None and whole:
            channels_in(self.channels, self.sites, given)
        check_masks(given, self.unit_layouts, self.group_layouts, self.granularity)
        with self._at_full_size():
            result = super().load_state_dict(state_dict, strict, assign)
            self.apply_masks_()
        if self._rewirer is not None:
            self._rewirer.patterns_loaded()
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`. Of a module that trains at the compact size: copies, at the full size."""
        was_resized = bool(self.lowered) or (self._rewirer is not None and self._rewirer.is_resized)
        with self._at_full_size():
            state = super().state_dict(*args, **kwargs)
            if was_resized:  # these tensors will not stay as they are
                for key, tensor in state.items():
                    state[key] = tensor.clone()
            return state

    # -- training -----------------------------------------------------------------------------------------

    def schedule(self, total_steps: int) -> Schedule:
        """When and how much this module's masks change in a run of `total_steps` optimizer steps."""
        return self.method.schedule(UpdateSchedule.for_run(total_steps, **self.schedule_options), total_steps)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        update_weights_first: bool | None = None,
        compact: bool = False,
    ) -> Rewirer:
        """Lets the method rewire the masks through `optimizer`'s step hooks; the user's loop stays as it is.

        Args:
            optimizer: built from this module's parameters, holding every site's.
            total_steps: length of the run in optimizer steps; rewiring stops at `stop_fraction` of it.
            update_weights_first: on update steps, True lets the optimizer step before rewiring, False has the
                rewiring take its place; None is as the module's `semantics` say (the paper's: as each method's own
                paper has it).
            compact: of a module that is sparse in channels: train at the compact size between rewirings. Parameters
                then hold the active channels alone, and their shapes change at rewirings; the optimizer's state goes
                along. What is saved, and what this module reports, is at the full size.

        Raises:
            RuntimeStateError: an optimizer that lacks this module's weights or what the method reads, or a second
                `attach`.
        """
        if self._rewirer is not None:
            raise RuntimeStateError("this module already has a rewirer; call rewirer.detach() before attaching anew")
        semantics = self.semantics
        if update_weights_first is not None:
            semantics = dataclasses.replace(semantics, weight_update="first" if update_weights_first else "replaced")
        targets: Mapping[str, int] = self.target_units
        compaction = None
        if self.channels is not None:
            targets = {**targets, **self.channels.targets}
        if compact:
            if self.channels is None:
                raise RuntimeStateError("compact=True is for channels; sparsify with granularity='channel'")
            labelled = label_channels(captured_for_channels(self))
            compaction = Compaction(self, optimizer, labelled, self.channels.sites)
        self._check_lowered_training(optimizer, semantics)
        schedule = self.schedule(total_steps)
        self._rewirer = Rewirer(self, optimizer, self.method, schedule, self.seed, targets, semantics, compaction)
        return self._rewirer

    # -- reports and rewrites -----------------------------------------------------------------------------

    def flops(self) -> FlopReport:
        """What a forward pass of the example costs, dense and at the present densities."""
        with self._at_full_size():
            return count_module(self, self.active_counts)

    def training_flops_ratio(self, total_steps: int) -> float:
        """Planned FLOPs of a training run over those of a dense run of the same length: `planned_cost(...).ratio`.

        A step costs `3 f_s`, one with dense gradients `2 f_s + f_d` (paper, appendix on FLOPs); the steps
        are those of the schedule. `f_s` and `f_d` are the forward FLOPs, sparse and dense.
        """
        return planned_cost(self, total_steps).ratio

    def report(self) -> str:
        """A table of all sites and of what has no mask, for a person to read; and of what lowering decided."""
        one_graph = self.graphs["train"] is self.graphs["eval"]
        heading = [
            f"method {self.method.name}: {self.method.summary}",
            f"captured by the {self.capture} tracer; "
            + ("one graph for both modes" if one_graph else "a graph for each mode"),
        ]
        if self.capture_reason:
            heading.append(f"not by the one before it: {self.capture_reason}")
        if self.channels is not None:
            heading += channel_lines(self.channels, self.active_channels)
        heading += unit_lines(self.granularity, self.unit_layouts, self.left_dense)
        report = site_report(heading, self.sites, self.active_counts, self.flops(), self.uncovered, self.notes)
        decisions = self.lowering_decisions
        return f"{report}\n\n{decision_report(decisions)}" if decisions else report

    def fold(self) -> CapturedModule:
        """A copy without masks, the zeros in its weights: plain keys, any mode, no runtime."""
        refuse_sharded(self, "fold")
        own = copy.deepcopy(self).raise_()
        own.apply_masks_()
        tree = nn.Module()
        mine = inspect.get_annotations(SparseModule) | inspect.get_annotations(LowerableModule)
        tree.__dict__.update({key: value for key, value in own.__dict__.items() if key not in mine})
        for site in self.sites:
            owner, _, mask = site.mask_name.rpartition(".")
            del tree.get_submodule(owner)._buffers[mask]
        graphs = {mode: remove_masks(graph) for mode, graph in own.graphs.items()}
        if own.graphs["train"] is own.graphs["eval"]:
            graphs["train"] = graphs["eval"]
        return CapturedModule(
            Captured(
                self._get_name(),
                tree,
                graphs,
                self.example,
                self.capture,
                self.notes,
                self.flags,
                self.mode_readers,
                self.capture_reason,
                own.units.replaced(remove_masks) if own.units else None,
            )
        )

    def compact(self, optimizer: torch.optim.Optimizer | None = None) -> CompactModule:
        """A copy of ordinary, smaller layers, without masks and without channels that no active weight reads.

        An optimizer of this module is moved over to the copy, its state cut, so that the training goes on there.
        """
        refuse_sharded(self, "compact")
        if self.lowered and optimizer is not None:
            raise RuntimeStateError("this module is lowered; raise_() it before its optimizer is moved over")
        with bool_masks(self, self.sites):
            return compact(copy.deepcopy(self).raise_() if self.lowered else self, optimizer=optimizer)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> nn.Module:
        """Copies the masked weights and all buffers into a model of the original class, and returns it."""
        refuse_sharded(self, "copy_to")
        self.apply_masks_()
        with self._at_full_size():
            own = {id(mask) for mask in self.masks.values()}
            masks = {name for name, buffer in self.named_buffers(remove_duplicate=False) if id(buffer) in own}
            state = self.state_dict()
            for name in masks:
                del state[name]
            versions: Any = model.state_dict()  # of its classes, by which some read a state
            state._metadata = versions._metadata
            model.load_state_dict(state)
        return model

    def __getstate__(self) -> dict[str, Any]:
        refuse_sharded(self, "a copy")
        if self._rewirer is not None and self._rewirer.is_resized:
            return copy.deepcopy(self).__getstate__()
        return super().__getstate__() | {"_rewirer": None, GATE: False, RUN: update_steps.new_run()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseModule":
        with self._at_compact_or_full_size():
            own = super().__deepcopy__(memo)
        assert isinstance(own, SparseModule)
        return own
