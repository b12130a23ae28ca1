"""`SparseModule`: a captured model whose weights go through masks."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .captured_module import CapturedModule
from .channels import CompactModule, compact
from .channels.analysis import captured_for_channels
from .channels.channel_plan import channels_in
from .core.channel_allocation import extents_of, kept_elements
from .core.channel_sites import ChannelPlan, ChannelSite, alive_in, clear_carriers
from .core.errors import ConfigError, RuntimeStateError
from .core.granularity import SINGLE_WEIGHTS, Granularity, UnitLayout, check_units, layouts_of
from .core.masking import bernoulli_mask, floor_count, random_mask, seeded_generator
from .core.records import Captured, Uncovered, WeightSite, specs_of
from .flops import FlopReport, count_module, planned_cost
from .kernels import update_steps
from .lowering import (
    LoweredStorage,
    captured_by,
    check_lowered,
    check_trains_lowered,
    decide,
    decide_recurrences,
    kernel_block,
    lower_for_inference,
)
from .passes.group_channels import label_channels
from .passes.insert_masks import GATE, insert_masks
from .passes.lower_recurrent import SparseRecurrence
from .passes.lower_weights import RUN
from .passes.remove_masks import remove_masks
from .passes.trace import split_example
from .report import channel_lines, site_report, unit_lines
from .runtime.compaction import Compaction
from .runtime.lowered_site import Storage
from .runtime.methods import Method
from .runtime.rewirer import Rewirer
from .runtime.schedule import Schedule, UpdateSchedule
from .runtime.semantics import Semantics


class SparseModule(CapturedModule):
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
        dense_gradient: whether `weight.grad` is dense in the present step (or the magnitude of it); the rewirer
            sets it.
        lowered_run: under which number lowered calls remember what a dense gradient is made of.
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
    dense_gradient: bool | str
    lowered_run: int
    _rewirer: Rewirer | None
    _storage: LoweredStorage | None

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
        self.dense_gradient = False
        self.lowered_run = update_steps.new_run()
        self._rewirer = None
        self._storage = None
        for site in self.sites:
            weight = self.get_parameter(site.name)
            owner, _, parameter = site.name.rpartition(".")
            if masks is not None:
                mask = masks[site.name].to(weight.device).clone()
            else:
                mask = self._initial_mask(site, weight, method.initial_sparsity(sparsities[site.name]))
            self.get_submodule(owner).register_buffer(f"{parameter}_mask", mask)
        self.apply_masks_()

    def _initial_mask(self, site: WeightSite, weight: Tensor, sparsity: float) -> Tensor:
        if weight.is_meta:
            return torch.empty(weight.shape, dtype=torch.bool, device="meta")
        generator = seeded_generator(self.seed, "mask", site.name)
        draw = bernoulli_mask if self.semantics.initial_masks == "bernoulli" else random_mask
        layout = self.unit_layouts.get(site.name)
        if layout is not None:
            return layout.spread(draw(torch.Size(layout.grid), sparsity, generator)).to(weight.device)
        return draw(weight.shape, sparsity, generator).to(weight.device)

    # -- what is masked -----------------------------------------------------------------------------------

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Weight name -> bool mask of the weight's shape, in execution order. Change in place only.

        While training goes on at the compact size, or of weights that are lowered, they are copies.
        """
        made = {} if self._storage is None else self._storage.masks(self)
        with self._at_compact_or_full_size():
            return MappingProxyType(
                {
                    site.name: made[site.name] if site.name in made else self.get_buffer(site.mask_name)
                    for site in self.sites
                }
            )

    @property
    def active_counts(self) -> dict[str, int]:
        """Weight name -> number of active weights."""
        first = self.method.initial_sparsity
        return {
            name: self._elements(name, self._kept_units(name, first(self.target_sparsities[name])))
            if mask.is_meta
            else int(mask.sum())
            for name, mask in self.masks.items()
        }

    @property
    def lowered(self) -> Mapping[str, Storage]:
        """Weight name -> how it is stored, of the weights that are stored as their active values alone."""
        return {} if self._storage is None else self._storage.weights

    @property
    def target_counts(self) -> dict[str, int]:
        """Weight name -> number of active weights that the allocation gives it; the masks need not be there yet."""
        return {name: self._elements(name, kept) for name, kept in self.target_units.items()}

    @property
    def target_units(self) -> dict[str, int]:
        """Weight name -> number of active units (weights, or blocks of them) that the allocation gives it."""
        return {site.name: self._kept_units(site.name, self.target_sparsities[site.name]) for site in self.sites}

    @property
    def unit_counts(self) -> dict[str, int]:
        """Weight name -> number of its units: of its elements, or of blocks of them."""
        layouts = self.unit_layouts
        return {site.name: layouts[site.name].units if layouts else site.numel for site in self.sites}

    def _kept_units(self, name: str, sparsity: float) -> int:
        units = self.unit_counts[name]
        return units - floor_count(sparsity, units)

    def _elements(self, name: str, units: int) -> int:
        """How many elements of a weight so many units have; on average, where they differ in size."""
        return self.unit_layouts[name].elements(units) if self.unit_layouts else units

    @property
    def target_parameters(self) -> int:
        """Number of parameters with the allocation's active weights: those, and all that has no mask."""
        masked_out = sum(site.numel for site in self.sites) - sum(self.target_counts.values())
        return sum(parameter.numel() for parameter in self.parameters()) - masked_out

    @property
    def densities(self) -> dict[str, float]:
        """Weight name -> fraction of its elements that are active now."""
        counts = self.active_counts
        return {site.name: counts[site.name] / site.numel for site in self.sites}

    @property
    def sparsity(self) -> float:
        """Fraction of the elements of all sites that are masked out now."""
        return 1.0 - sum(self.active_counts.values()) / sum(site.numel for site in self.sites)

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
        with self._at_full_size():
            for site in self.sites:
                self.get_parameter(site.name).masked_fill_(~self.get_buffer(site.mask_name), 0)
            if self.channels is not None and not any(mask.is_meta for mask in self.masks.values()):
                for channels, alive in zip(self.channel_sites, self.active_channels.values(), strict=True):
                    clear_carriers(self, channels, ~alive)
        if self._rewirer is not None:
            self._rewirer.weights_loaded()

    @contextmanager
    def _at_full_size(self) -> Iterator[None]:
        """All parameters and masks dense, and at their full size, for a while."""
        with ExitStack() as stack:
            stack.enter_context(self._at_compact_or_full_size())
            if self._storage is not None:
                stack.enter_context(self._storage.at_full_size(self, self._optimizer))
            yield

    def _at_compact_or_full_size(self) -> AbstractContextManager[None]:
        return nullcontext() if self._rewirer is None else self._rewirer.at_full_size()

    @property
    def _optimizer(self) -> torch.optim.Optimizer | None:
        return None if self._rewirer is None else self._rewirer.optimizer

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; inactive weights are set to 0 afterwards.

        A dense model's checkpoint loads with `strict=False`; the masks stay as they are.
        """
        for site in self.sites:
            mask = state_dict.get(site.mask_name)
            if mask is not None and mask.dtype != torch.bool:
                raise RuntimeStateError(f"{site.mask_name} is {mask.dtype} in this state_dict; a mask is bool")
        if self.channels is not None and all(site.mask_name in state_dict for site in self.sites):
            given = {site.name: state_dict[site.mask_name] for site in self.sites}
            if all(given[site.name].shape == site.shape for site in self.sites):
                channels_in(self.channels, self.sites, given)
        for name, layout in self.unit_layouts.items():
            if f"{name}_mask" in state_dict:
                check_units(name, state_dict[f"{name}_mask"], layout, self.granularity)
        with self._at_full_size():
            result = super().load_state_dict(state_dict, strict, assign)
            self.apply_masks_()
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

    def planned_counts(self, total_steps: int) -> list[tuple[int, dict[str, int]]]:
        """From which step of a run on each weight will have how many active elements, as far as it can be known."""
        if self.channels is not None:
            return self._planned_by_channels(self.channels, total_steps)
        if self.method.initial_sparsity(0.5) == 0.5:
            sizes, targets = {site.name: site.numel for site in self.sites}, self.active_counts
            return self.method.planned_counts(sizes, targets, self.schedule(total_steps), total_steps)
        planned = self.method.planned_counts(
            self.unit_counts, self.target_units, self.schedule(total_steps), total_steps
        )
        return [(step, {name: self._elements(name, kept) for name, kept in counts.items()}) for step, counts in planned]

    def _planned_by_channels(self, plan: ChannelPlan, total_steps: int) -> list[tuple[int, dict[str, int]]]:
        sizes = {site.name: site.size for site in plan.sites}
        planned = self.method.planned_counts(sizes, plan.targets, self.schedule(total_steps), total_steps)
        extents = extents_of(plan.sites, {site.name: site.shape for site in self.sites})
        return [
            (step, {name: kept_elements(extent, plan.sites, kept) for name, extent in extents.items()})
            for step, kept in planned
        ]

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
        schedule = self.schedule(total_steps)
        self._rewirer = Rewirer(self, optimizer, self.method, schedule, self.seed, targets, semantics, compaction)
        return self._rewirer

    def lower(
        self,
        backend: str = "cpu",
        train: bool = False,
        *,
        example_input: Any = None,
        layers: str | Sequence[str] = "auto",
        verify: bool = True,
    ) -> Any:
        """Has masked layers compute with their active weights alone, on sparse kernels.

        For inference: a copy that only runs, with batch normalisation folded in; one-layer `nn.GRU`s are lowered as
        well, and an embedding that one reads is multiplied with its weight beforehand. With `train`, before or during
        training: this module itself. Parameters, gradients and the optimizer's state of its lowered weights then hold
        active weights alone; `state_dict` still speaks of dense ones. `raise_()` is the way back. Build the optimizer
        afterwards, or attach it before: an attached one goes on, its state moved along.

        Args:
            backend: `"cpu"`.
            train: whether to train.
            example_input: as for `sparsify`: with the batch size that counts; by default the example of the capture.
            layers: `"auto"`, which leaves dense what the cost model finds faster dense; `"all"`; or globs of weights.
            verify: whether to compare outputs with the masked module's (for inference).

        Returns:
            A `LoweredModule`, or with `train` this module.

        Raises:
            ConfigError: another backend, or `layers` that is none of these.
            RuntimeStateError: a method or optimizer that needs dense weights; training at the compact size.
        """
        if backend != "cpu":
            raise ConfigError(f"backend: {backend!r} is not one of: cpu")
        example = self.example if example_input is None else specs_of(split_example(example_input))
        if train:
            self._lower_for_training(example, layers)
            return self
        own = copy.deepcopy(self)
        own._lower(example, layers, False, None)
        assert own._storage is not None
        storage = own._storage
        lowered = lower_for_inference(captured_by(own, own.example), storage.decisions, storage.recurrences)
        if verify and not any(parameter.is_meta for parameter in self.parameters()):
            check_lowered(self._get_name(), self, lowered, self.example)
        return lowered

    def raise_(self) -> "SparseModule":
        """Undoes `lower(train=True)`: dense parameters and masks again; returns this module."""
        if self._storage is not None:
            graphs = self._storage.masked_graphs
            self._storage.restore(self, self._optimizer)
            self._storage = None
            self.set_graphs(graphs)
            if self._rewirer is not None:
                self._rewirer.storage_changed()
        return self

    def _lower_for_training(self, example: tuple, layers: str | Sequence[str]) -> None:
        check_trains_lowered(self.method, self.semantics, self._rewirer, self.channels)
        self.raise_()
        self._lower(example, layers, True, self._optimizer)
        if self._rewirer is not None:
            self._rewirer.storage_changed()

    def _lower(
        self, example: tuple, layers: str | Sequence[str], train: bool, optimizer: torch.optim.Optimizer | None
    ) -> None:
        if self._storage is not None:
            return
        blocks = {site.name: kernel_block(site, self.granularity) for site in self.sites}
        captured = captured_by(self, example)
        decisions, calls = decide(captured, self.sites, self.active_counts, blocks, layers, train)
        recurrences: Sequence[SparseRecurrence] = ()
        if not train:
            decisions, recurrences = decide_recurrences(captured, self.sites, decisions, layers)
        shapes = {site.name: site.shape for site in self.sites}
        planned = {name: Storage(shapes[name], blocks[name], tuple(found)) for name, found in calls.items()}
        storage = LoweredStorage(decisions, planned, self.graphs, recurrences)
        graphs = storage.lowered_graphs(captured, train)
        storage.store(self, optimizer)
        self._storage = storage
        self.set_graphs(graphs)

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
        """A table of all sites and of what has no mask, for a person to read."""
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
        heading += unit_lines(self.granularity, self.unit_layouts)
        return site_report(heading, self.sites, self.active_counts, self.flops(), self.uncovered, self.notes)

    def fold(self) -> CapturedModule:
        """A copy without masks, the zeros in its weights: plain keys, any mode, no runtime."""
        own = copy.deepcopy(self)
        own.apply_masks_()
        tree = nn.Module()
        mine = inspect.get_annotations(SparseModule)
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
        return compact(self, optimizer=optimizer)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> nn.Module:
        """Copies the masked weights and all buffers into a model of the original class, and returns it."""
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
        if self._rewirer is not None and self._rewirer.is_resized:
            return copy.deepcopy(self).__getstate__()
        return super().__getstate__() | {"_rewirer": None, GATE: False, RUN: update_steps.new_run()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseModule":
        with self._at_full_size():
            own = super().__deepcopy__(memo)
        assert isinstance(own, SparseModule)
        return own
