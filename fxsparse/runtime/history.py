"""The record of a run's rewirings; its counts stay on the device until somebody reads them."""

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


class History:
    """Every rewiring of a run, oldest first."""

    def __init__(self) -> None:
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
        active: Mapping[str, int],
        norms: Tensor | None = None,
    ) -> None:
        """A rewiring of the sites `names`; `counts` and `norms` have an element for each."""

        def finish() -> Rewiring:
            changed = dict(zip(names, counts.tolist(), strict=True))
            lengths = {} if norms is None else dict(zip(names, norms.tolist(), strict=True))
            return Rewiring(step, fraction, changed, None, dict(active), lengths)

        self._pending.append(finish)

    def add_skipped(self, step: int, fraction: float, reason: str, active: Mapping[str, int]) -> None:
        """A rewiring that was due and did not take place."""
        self._pending.append(lambda: Rewiring(step, fraction, {}, reason, dict(active)))

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(rewiring) for rewiring in self.read()]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._read, self._pending = [Rewiring(**row) for row in state], []
