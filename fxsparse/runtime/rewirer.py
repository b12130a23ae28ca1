"""`Rewirer`: runs a method through an optimizer's step hooks, so that the user's loop stays as it is.

    loss.backward()        gradients arrive; dense ones if this is an update step
    optimizer.step()       -> before: rewire if this is an update step, and take the gradients away,
                              so that the optimizer moves nothing
                           -> after: count the step, open or close the gate for the next one

The gate is the module's `dense_gradient` flag that every `apply_mask` node reads. Step `t` is the number of
`optimizer.step()` calls already made: gradient accumulation counts once, and a step that a GradScaler skips
does not count.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..core.zeroing import norm_within
from .channel_state import ChannelState
from .choose_patterns import Chosen, Gradient, choose_patterns
from .compaction import Compaction
from .history import NOT_FINITE, History, Rewiring, skipped_message
from .kept_zeros import KeptZeros
from .lowered_site import weight_site
from .lowered_state import LoweredState
from .masked_blocks import MaskedBlocks
from .masked_channels import MaskedChannels
from .masked_site import MaskedModule, MaskedSite
from .methods import Method, Moment, Need
from .optimizer_check import check_optimizer, refuse_closure
from .run_settings import check_saved, run_settings
from .schedule import Schedule
from .semantics import Semantics
from .sharded_site import check_still_whole, holds_shards, shard_masks
from .sites import Site, Watched
from .telemetry import SiteTelemetry, Telemetry, is_thin, telemetry_table, thin_message
from .warn_once import WarnOnce


class Rewirer:
    """The runtime of one module in one run. Made by `SparseModule.attach`.

    Attributes:
        step_count: optimizer steps made.
        optimizer: whose steps it follows.
        schedule: the `UpdateSchedule`.
        initial_counts: site name -> number of active weights at step 0.
    """

    def __init__(
        self,
        module: MaskedModule,
        optimizer: torch.optim.Optimizer,
        method: Method,
        schedule: Schedule,
        seed: int,
        targets: Mapping[str, int],
        semantics: Semantics,
        compaction: Compaction | None = None,
    ) -> None:
        """`targets` are active units by site (weights, blocks, channels).

        With a `compaction`, training goes on at the compact size.
        """
        sharded = holds_shards(module)  # before the others: gathered parameters are cut again by it
        check_optimizer(module, optimizer)
        method.check(optimizer)
        if sharded:
            shard_masks(module, method)
        self.method = copy.deepcopy(method)  # what it remembers is this run's
        self.schedule = schedule
        self.seed = seed
        self.semantics = semantics
        self.step_count = 0
        self._module = module
        self.optimizer = optimizer
        self._targets = targets
        self._weights: list[MaskedSite] = []
        self._sites: Sequence[Site] = ()
        self._channels: ChannelState | None = None
        self.storage_changed()
        watched: Sequence[Watched] = self._weights
        if module.channel_sites:
            self._channels = ChannelState(module, optimizer, module.channel_sites, seed, compaction)
            score = semantics.channel_score
            channels = [MaskedChannels(self._channels, s, targets[s.name], score) for s in module.channel_sites]
            self._sites = watched = channels
        for site in self._sites:
            _ = site.active  # counted here, which waits for the device, and not by the first rewiring
        self.initial_counts = self._active_counts()
        self._telemetry = Telemetry(watched)
        self._weights_first = not method.replaces_weight_update(semantics)
        self._stashed: list[Gradient] | None = None
        self._sharded = sharded
        self._scaler_skips = False
        self._postponed = False
        self._rewired_now = False
        self._warn_once = WarnOnce()
        remask = method.feeds_optimizer or semantics.optimizer_state != "masked"
        self._zeros = KeptZeros(self._weights, optimizer, remask, self._warn_once, sharded)
        self._history = History(self._warn_once)
        self._walks = type(method).after_step is not Method.after_step
        self._walked: Tensor | None = None  # connections woken by `after_step` since the last record, by site
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._lowered_state = LoweredState(module, optimizer)
        self._handles += self._lowered_state.hooks()
        self._handles.append(self._zeros.handle)
        if compaction is not None:
            self._handles += compaction.hooks()
        self._set_gate()

    def storage_changed(self) -> None:
        """Called when the module stores weights in another way than before: lowered, or dense again."""
        module, targets = self._module, self._targets
        self._weights[:] = [weight_site(module, site, targets.get(site.name, site.numel)) for site in module.sites]
        if module.unit_layouts:
            layouts = module.unit_layouts
            self._sites = [MaskedBlocks(site, layouts[site.name], targets[site.name]) for site in self._weights]
        elif self._channels is None:
            self._sites = self._weights

    # -- what the user reads ------------------------------------------------------------------------------

    @property
    def history(self) -> list[Rewiring]:
        """Every rewiring so far, oldest first. Reading it waits for the device, once for each new rewiring."""
        return self._history.read()

    @property
    def update_count(self) -> int:
        """Number of records in `history`, without waiting for the device."""
        return len(self._history)

    @property
    def skipped_updates(self) -> int:
        """How many rewirings were due and skipped; `history` says why, and like it this waits for the device."""
        return sum(record.skipped is not None for record in self.history)

    def telemetry(self) -> list[SiteTelemetry]:
        """What the run has done to each site so far: density, exploration, churn, dead units. Waits for the device."""
        return self._telemetry.read(self.history)

    def report(self) -> str:
        """`telemetry` as a table for a person to read."""
        return telemetry_table(self.telemetry())

    def is_update_step(self) -> bool:
        """Whether the masks change at the coming `optimizer.step()`."""
        return self.method.rewires and self.schedule.is_update_step(self.step_count)

    def detach(self) -> None:
        """Removes the hooks; the masks stay as they are, and the module can be attached anew."""
        if self._channels is not None:
            self._channels.full_size()
            self._channels.close()
        while self._handles:
            self._handles.pop().remove()
        self._forget()
        self._zeros.forget()
        self._module.dense_gradient = False
        self._module._rewirer = None

    def weights_loaded(self) -> None:
        """Called when somebody has loaded the module's weights or masks: channels that were open are opened anew."""
        if self._channels is not None and self._channels.is_open:
            self._channels.is_open = False
            self._channels.open(self.step_count)

    def evaluated(self) -> None:
        """Called when training goes on after an evaluation, for which weights may have been others for a while."""
        self._zeros.forget()

    def patterns_loaded(self) -> None:
        """Called when somebody has loaded the module's patterns: the optimizer's state may have come before them."""
        self._lowered_state.patterns_loaded()

    @property
    def is_resized(self) -> bool:
        """Whether the module has another size than its own now, or other values at inactive channels than 0."""
        return self._channels is not None and (self._channels.is_small or self._channels.is_open)

    def at_full_size(self) -> AbstractContextManager[None]:
        """The module and the optimizer's state at their full size for a while, with inactive channels at 0."""
        return nullcontext() if self._channels is None else self._channels.at_full_size()

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resumption needs beside the module's and the optimizer's own state."""
        return {
            **self._settings(),
            "method_state": self.method.state_dict(),
            "step_count": self.step_count,
            "skipped_updates": self.skipped_updates,
            "remask_every_step": self._zeros.remask,
            "history": self._history.state_dict(),
            "initial_counts": self.initial_counts,
            "ever_active": self._telemetry.state_dict(),
            "walked": self._walked,
        }

    def _settings(self) -> dict[str, Any]:
        return run_settings(self.method, self.schedule, self.semantics, self.seed, self._module.granularity)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. The module's and the optimizer's state are loaded by the user.

        Raises:
            RuntimeStateError: a state of another method, schedule or seed.
        """
        check_saved(state, self._settings())
        self.method.load_state_dict(state["method_state"])
        self.step_count = state["step_count"]
        self._zeros.remask = state["remask_every_step"]
        self._history.load_state_dict(state["history"])
        self.initial_counts = dict(state["initial_counts"])
        self._telemetry.load_state_dict(state["ever_active"])
        self._walked = state["walked"]
        self._set_gate(resize=False)

    # -- the hooks ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        refuse_closure(args, kwargs)
        if not self._sharded:
            check_still_whole(self._module)
        self._lowered_state.stepped()
        # A fused optimizer under GradScaler is called even when it will skip the step by itself. That is read at every
        # step: the number of steps made decides which the next update step is, and with it the graph that runs.
        found_inf = getattr(optimizer, "found_inf", None)
        self._scaler_skips = found_inf is not None and bool(found_inf.item())
        if self._scaler_skips:
            return
        self._zeros.before_step()
        if self.step_count == 0:
            self.method.start_run(self._sites, self.seed)
        always = self.method.dense_gradient is Need.ALWAYS
        if always:
            # None is deferred: the weights of such a method are not lowered.
            gradients = cast(list[Tensor | None], self._gradients(self._sites))
            self.method.observe(self._sites, gradients, self.step_count)
        self._rewired_now = self.is_update_step()
        if self._rewired_now and not self._weights_first:
            self._rewire(self._gradients(self._sites))
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return
        if self._rewired_now:
            self._stashed = [g.clone() if isinstance(g, Tensor) else g for g in self._gradients(self._sites)]
            if self._channels is not None:
                self._channels.close()
        dense = always or (self._rewired_now and self.method.dense_gradient is Need.UPDATES)
        if dense:
            for site in self._weights:
                site.mask_gradient_(only_infinite=self.method.feeds_optimizer)
        else:
            self._zeros.mask_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._scaler_skips:
            return
        self._zeros.set_back()
        if self._stashed is not None:
            self._rewire(self._stashed)
            self._stashed = None
        if self._walks and (self._weights_first or not self._rewired_now):
            self._walk()
        self._zeros.after_step()
        if self._postponed:
            self._postponed = False
            return
        self.step_count += 1
        self._zeros.look(self.step_count, may_wait=not self._rewired_now)
        self._set_gate()

    # -- rewiring -----------------------------------------------------------------------------------------

    def _gradients(self, sites: Sequence[Site]) -> list[Gradient]:
        if not self.method.reads_gradient:
            return [None] * len(sites)
        # A fused optimizer under GradScaler is handed scaled gradients, and the scale.
        scale, magnitude = getattr(self.optimizer, "grad_scale", None), self.semantics.gradient == "magnitude"
        gradients = [site.deferred_gradient(magnitude) or site.gradient() for site in sites]
        return gradients if scale is None else [g / scale if isinstance(g, Tensor) else g for g in gradients]

    def _movable(self, site: Site) -> bool:
        """A site that the allocation makes dense stays so: there is nothing to choose in it."""
        return site.target < site.size or site.active < site.size

    def _moment(self) -> Moment:
        fraction = self.schedule.fraction(self.step_count)
        return Moment(self.step_count, fraction, self.seed, self.optimizer, self.semantics)

    @torch.no_grad()
    def _rewire(self, gradients: Sequence[Gradient]) -> None:
        moment = self._moment()
        pairs = [pair for pair in zip(self._sites, gradients, strict=True) if self._movable(pair[0])]
        scale = getattr(self.optimizer, "grad_scale", None)
        # Channels are opened and closed by the host, and only if there is a rewiring.
        chosen = choose_patterns(self.method, pairs, moment, scale, wait=self._channels is not None)
        if chosen is None:
            return
        if chosen.finite is False:
            self._postponed = self.method.one_shot
            self._skip(moment, NOT_FINITE)
            self._warn_once(skipped_message(moment.step))
            return
        if chosen.lacking:
            names = ", ".join(site.name for site in chosen.lacking)
            self._warn_once(f"sites without a gradient are not rewired: {names}")
        if not chosen.sites:
            self._postponed = self.method.one_shot and bool(pairs)
            self._skip(moment, "no site had a gradient" if pairs else "every site is dense")
            return
        self._take_over(chosen, moment)

    def _take_over(self, chosen: Chosen, moment: Moment) -> None:
        state = "kept" if self.method.feeds_optimizer else self.semantics.optimizer_state
        zeroed = self.semantics.regrown == "zeroed"
        counts, norms = [], []
        self._telemetry.observe()
        if self._channels is not None:
            self._channels.open(moment.step)
        for site, pattern, gradient in zip(chosen.sites, chosen.patterns, chosen.gradients, strict=True):
            if is_thin(site, pattern.active):
                self._warn_once(thin_message(site, pattern.active, self.step_count))
            kept = pattern.kept if zeroed else None
            grown = site.take_over(pattern.mask, pattern.active, self.optimizer, kept, state)
            counts.append(grown.count_nonzero())
            if gradient is not None and self.method.dense_gradient is not Need.NEVER:
                norms.append(gradient if gradient.dim() == 0 else norm_within(gradient, grown))
        if self._channels is not None:
            self._channels.close()
        finite = chosen.finite if isinstance(chosen.finite, Tensor) else None
        shards = chosen.sites[0].shards
        lengths = shards.norms(torch.stack(norms)) if norms else None
        self._record(moment, chosen.sites, shards.add_up(torch.stack(counts)), lengths, finite)

    def _record(
        self, moment: Moment, sites: Sequence[Site], counts: Tensor, norms: Tensor | None = None, finite: Any = None
    ) -> None:
        names = [site.name for site in sites]
        active = {site.name: site.count() for site in self._weights}
        self._history.add(moment.step, moment.fraction, names, counts, active, norms, finite)

    def _active_counts(self) -> dict[str, int]:
        return {site.name: site.active for site in self._weights}

    @torch.no_grad()
    def _walk(self) -> None:
        """Lets a method that rewires all the time do so; one record every interval."""
        moment = self._moment()
        sites = [site for site in self._sites if self._movable(site)]
        patterns = self.method.after_step(sites, moment) if sites else None
        if patterns is None:
            return
        self._telemetry.observe()
        grown = torch.stack(
            [
                site.take_over(pattern.mask, pattern.active, self.optimizer, pattern.kept).sum()
                for site, pattern in zip(sites, patterns, strict=True)
            ]
        )
        self._walked = grown if self._walked is None else self._walked.to(grown.device) + grown
        if (moment.step + 1) % getattr(self.schedule, "interval", 1) == 0:
            self._record(moment, sites, self._walked)
            self._walked = None

    def _skip(self, moment: Moment, reason: str) -> None:
        if self._channels is not None:
            self._channels.close()
        self._history.add_skipped(moment.step, moment.fraction, reason, self._active_counts())

    def _set_gate(self, resize: bool = True) -> None:
        """Opens or closes the gate for the next step; without `resize` the module has its full size in it."""
        need = self.method.dense_gradient
        on_update = need is Need.UPDATES and self.is_update_step()
        magnitude = on_update and self.semantics.gradient == "magnitude" and not self._weights_first
        gate = "magnitude" if magnitude else need is Need.ALWAYS or on_update
        if self._channels is not None:
            if resize and not self.is_update_step():
                self._channels.compact_size()
            else:
                self._channels.full_size()  # after a load, masks or the optimizer's state may still be to come
            if on_update:
                self._channels.open(self.step_count)
                gate = "stored magnitude" if magnitude else "stored"
        self._module.dense_gradient = gate
        if not gate:
            self._forget()

    def _forget(self) -> None:
        """Lets go of what sites have remembered for a dense gradient."""
        for site in self._weights:
            site.forget()
