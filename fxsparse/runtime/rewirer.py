"""`Rewirer`: runs a method through an optimizer's step hooks, so that the user's loop stays as it is.

    loss.backward()        gradients arrive; dense ones if this is an update step
    optimizer.step()       -> before: rewire if this is an update step, and take the gradients away,
                              so that the optimizer moves nothing
                           -> after: count the step, open or close the gate for the next one

The gate is the module's `dense_gradient` flag that every `apply_mask` node reads. Step `t` is the number of
`optimizer.step()` calls already made: gradient accumulation counts once, and a step that a GradScaler skips
does not count.
"""

import inspect
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FxSparseWarning, RuntimeStateError
from .masked_site import MaskedModule, MaskedSite
from .methods import Method, Moment, Need
from .schedule import UpdateSchedule


@dataclass(frozen=True)
class Rewiring:
    """What one rewiring did.

    Attributes:
        step: the optimizer step whose weight update it replaced.
        drop_fraction: the decayed alpha at that step.
        changed: site name -> number of connections that are active now and were not before.
        skipped: why nothing was rewired, or None.
    """

    step: int
    drop_fraction: float
    changed: dict[str, int]
    skipped: str | None = None


class Rewirer:
    """The runtime of one module in one run. Made by `SparseModule.attach`.

    Attributes:
        step_count: optimizer steps made.
        schedule: the `UpdateSchedule`.
        skipped_updates: rewirings that were due and skipped; `history` says why.
    """

    def __init__(
        self,
        module: MaskedModule,
        optimizer: torch.optim.Optimizer,
        method: Method,
        schedule: UpdateSchedule,
        seed: int,
        update_weights_first: bool = False,
    ) -> None:
        _check_optimizer(module, optimizer)
        self.method = method
        self.schedule = schedule
        self.seed = seed
        self.step_count = 0
        self.skipped_updates = 0
        self._module = module
        self._optimizer = optimizer
        self._sites = [MaskedSite(module, site.name, site.mask_name) for site in module.sites]
        self._update_weights_first = update_weights_first
        self._stashed: list[Tensor | None] | None = None
        self._remask_every_step = False
        self._scaler_skips = False
        self._warned: set[str] = set()
        self._history: list[Rewiring] = []
        self._pending: list[tuple[int, float, list[str], Tensor]] = []  # counts still on the device
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._set_gate()

    # -- what the user reads ------------------------------------------------------------------------------

    @property
    def history(self) -> list[Rewiring]:
        """Every rewiring so far, oldest first. Reading it waits for the device, once for each new rewiring."""
        for step, fraction, names, counts in self._pending:
            self._history.append(Rewiring(step, fraction, dict(zip(names, counts.tolist(), strict=True))))
        self._pending.clear()
        return list(self._history)

    def is_update_step(self) -> bool:
        """Whether the coming `optimizer.step()` rewires instead of moving weights."""
        return self.method.rewires and self.schedule.is_update_step(self.step_count)

    def detach(self) -> None:
        """Removes the hooks; the masks stay as they are, and the module can be attached anew."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._module.dense_gradient = False
        self._module._rewirer = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resumption needs beside the module's and the optimizer's own state."""
        return {
            "method": self.method.name,
            "method_state": self.method.state_dict(),
            "schedule": asdict(self.schedule),
            "seed": self.seed,
            "step_count": self.step_count,
            "skipped_updates": self.skipped_updates,
            "remask_every_step": self._remask_every_step,
            "history": [asdict(rewiring) for rewiring in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. The module's and the optimizer's state are loaded by the user.

        Raises:
            RuntimeStateError: a state of another method, schedule or seed.
        """
        if not isinstance(state, dict) or "step_count" not in state:
            raise RuntimeStateError(f"not the state of a rewirer: {state!r}"[:200])
        own = {"method": self.method.name, "schedule": asdict(self.schedule), "seed": self.seed}
        for key, value in own.items():
            if state.get(key) != value:
                raise RuntimeStateError(
                    f"the saved rewirer has {key} {state.get(key)!r}, this one {value!r}; attach with the same settings"
                )
        self.method.load_state_dict(state["method_state"])
        self.step_count = state["step_count"]
        self.skipped_updates = state["skipped_updates"]
        self._remask_every_step = state["remask_every_step"]
        self._history = [Rewiring(**row) for row in state["history"]]
        self._pending = []
        self._set_gate()

    # -- the hooks ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(callable(argument) for argument in (*args, *kwargs.values())):
            raise RuntimeStateError(
                "optimizer.step(closure) is not supported: the gradients would come after the rewiring; "
                "call loss.backward() and then optimizer.step()"
            )
        # A fused optimizer under GradScaler is called even when it will skip the step by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        self._scaler_skips = found_inf is not None and bool(found_inf.item())
        if self._scaler_skips:
            return
        if self.method.dense_gradient is Need.ALWAYS:
            self.method.observe(self._sites, self.step_count)
        if not self.is_update_step():
            if self.method.dense_gradient is Need.ALWAYS:
                for site in self._sites:
                    site.mask_gradient_()
            return
        gradients = self._dense_gradients()
        if self._update_weights_first:
            self._stashed = [None if g is None else g.clone() for g in gradients]
            for site in self._sites:
                site.mask_gradient_()
            return
        self._rewire(gradients)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._scaler_skips:
            return
        if self._remask_every_step:
            for site in self._sites:
                site.apply_mask_()
        if self._stashed is not None:
            self._rewire(self._stashed)
            self._stashed = None
        self.step_count += 1
        # At steps 1, 2, 4, 8, ...: a warm-up may hide it at first, and every look costs a host synchronisation.
        if not self._remask_every_step and self.step_count.bit_count() == 1:
            self._notice_stray_weights()
        self._set_gate()

    # -- rewiring -----------------------------------------------------------------------------------------

    def _dense_gradients(self) -> list[Tensor | None]:
        if self.method.dense_gradient is Need.NEVER:
            return [None] * len(self._sites)
        return [site.dense_gradient() for site in self._sites]

    @torch.no_grad()
    def _rewire(self, gradients: list[Tensor | None]) -> None:
        step, fraction = self.step_count, self.schedule.fraction(self.step_count)
        needs_gradient = self.method.dense_gradient is not Need.NEVER
        present = [g for g in gradients if g is not None]
        if needs_gradient and present and not _all_finite(present):
            self._skip(step, fraction, "a dense gradient was not finite")
            self._warn_once(f"the rewiring at step {step} was skipped: a dense gradient was not finite")
            return
        ready = [
            (site, gradient)
            for site, gradient in zip(self._sites, gradients, strict=True)
            if gradient is not None or not needs_gradient
        ]
        if len(ready) < len(self._sites):
            lacking = [site.name for site, g in zip(self._sites, gradients, strict=True) if g is None]
            self._warn_once(f"sites without a gradient are not rewired: {', '.join(lacking)}")
        if not ready:
            self._skip(step, fraction, "no site had a gradient")
            return
        moment = Moment(step, fraction, self.seed, self._optimizer)
        quotas = self.method.quotas([site for site, _ in ready], moment)
        grown = []
        for (site, gradient), quota in zip(ready, quotas, strict=True):
            mask = self.method.rewire(site, gradient, quota, moment)
            grown.append(site.take_over(mask, site.active - quota.drop + quota.grow, self._optimizer))
        self._pending.append((step, fraction, [site.name for site, _ in ready], torch.stack(grown)))

    def _skip(self, step: int, fraction: float, reason: str) -> None:
        self.skipped_updates += 1
        self._history = [*self.history, Rewiring(step, fraction, {}, reason)]

    def _notice_stray_weights(self) -> None:
        stray = torch.stack([site.stray_weights() for site in self._sites]).tolist()
        if any(stray):
            name = next(site.name for site, count in zip(self._sites, stray, strict=True) if count)
            self._remask_every_step = True
            self._warn_once(
                f"{type(self._optimizer).__name__} moved inactive weights ({name}); "
                "they are set back to 0 after every step"
            )
            for site in self._sites:
                site.apply_mask_()

    def _set_gate(self) -> None:
        need = self.method.dense_gradient
        self._module.dense_gradient = need is Need.ALWAYS or (need is Need.UPDATES and self.is_update_step())

    def _warn_once(self, message: str) -> None:
        kind = message.split(":")[0].split(" at step")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FxSparseWarning, stacklevel=2)


def _all_finite(tensors: list[Tensor]) -> bool:
    """One answer for all tensors, with one host synchronisation."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _check_optimizer(module: MaskedModule, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RuntimeStateError(
            f"attach needs a torch.optim.Optimizer, whose step hooks it uses; got a {type(optimizer).__name__}"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise RuntimeStateError(
            f"{type(optimizer).__name__}.step needs a closure, which computes gradients after the rewiring is due; "
            "use an optimizer that steps on the gradients it finds, such as SGD or AdamW"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [site.name for site in module.sites if id(module.get_parameter(site.name)) not in held]
    if len(missing) == len(module.sites):
        raise RuntimeStateError(
            "the optimizer holds none of this module's weights: it was built from another model, perhaps from the "
            "one before sparsify, which returns a copy; build it from sparse.parameters()"
        )
    if missing:
        raise RuntimeStateError(
            f"the optimizer lacks {len(missing)} of {len(module.sites)} masked weights ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); give it all of them, or exclude them in sparsify"
        )
