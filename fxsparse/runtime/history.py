"""The record of a run's rewirings; what was counted and decided on a device stays there until somebody reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rewiring:
    """What one rewiring did.

    Attributes:
        step: the optimizer step at which it happened.
        drop_fraction: what the schedule said: the decayed alpha, or for pruning the share of the way to the final
            sparsity.
        changed: site name -> number of connections that are active now and were not before.
        skipped: why nothing was rewired, or None.
        active: site name -> number of active connections afterwards.
        grown_gradient_norm: site name -> 2-norm of the gradient over the connections that were grown, for methods
            that read gradients.
    """

    step: int
    drop_fraction: float
    changed: dict[str, int]
    skipped: str | None = None
    active: dict[str, int] = field(default_factory=dict)
    grown_gradient_norm: dict[str, float] = field(default_factory=dict)


NOT_FINITE = "a dense gradient was not finite"


class History:
    """Every rewiring of a run, oldest first."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        """`notice` is given what to say of a rewiring that turns out to have been skipped."""
        self._notice = notice
        self._read: list[Rewiring] = []
        self._pending: list[Callable[[], Rewiring]] = []

    def __len__(self) -> int:
        """Number of records; waits for nothing."""
        return len(self._read) + len(self._pending)

    def read(self) -> list[Rewiring]:
        """All of them. Waits for the device, once for each record that was not read before."""
        self._read += [finish() for finish in self._pending]
        self._pending.clear()
        return list(self._read)

    def add(
        self,
        step: int,
        fraction: float,
        names: Sequence[str],
        counts: Tensor,
        active: Mapping[str, int | Tensor],
        norms: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """A rewiring of the sites `names`; `counts` and `norms` have an element for each.

        With `finite` (0-dim, bool) it is one that was skipped unless that is True.
        """

        def finish() -> Rewiring:
            if finite is not None and not finite.item():
                self._notice(skipped_message(step))
                return _skipped(step, fraction, NOT_FINITE, active)
            changed = dict(zip(names, counts.tolist(), strict=True))
            lengths = {} if norms is None else dict(zip(names, norms.tolist(), strict=True))
            return Rewiring(step, fraction, changed, None, _known(active), lengths)

        self._pending.append(finish)

    def add_skipped(self, step: int, fraction: float, reason: str, active: Mapping[str, int | Tensor]) -> None:
        """A rewiring that was due and did not take place."""
        self._pending.append(lambda: _skipped(step, fraction, reason, active))

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(rewiring) for rewiring in self.read()]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._read, self._pending = [Rewiring(**row) for row in state], []


def skipped_message(step: int) -> str:
    """What to say of a rewiring that was skipped for `NOT_FINITE`."""
    return f"the rewiring at step {step} was skipped: {NOT_FINITE}"


def _skipped(step: int, fraction: float, reason: str, active: Mapping[str, int | Tensor]) -> Rewiring:
    return Rewiring(step, fraction, {}, reason, _known(active))


def _known(counts: Mapping[str, int | Tensor]) -> dict[str, int]:
    return {name: int(count) for name, count in counts.items()}
