"""What a training run costs: the ledger of every method, planned before a run and realised after it.

With f_d and f_s the FLOPs of a dense and a sparse forward pass of one example, the report's supplement (and
the paper's appendix on FLOPs) gives a training step, averaged over an update interval dT, these costs:

    dense                        3 f_d
    static, SET, small-dense     3 f_s      and so SNIP, Deep Rewiring and a lottery ticket
    RigL                         (3 dT f_s + 2 f_s + f_d) / (dT + 1)
    RigL-SG, RigL-SM             the same of E[f_s], as their densities move
    SNFS                         2 E[f_s] + f_d
    gradual pruning, DSR         3 E[f_s]

`average_step` is that table. `training_cost` adds up the steps of a run one kind at a time instead, following
its schedule: rewiring ends at `t_end`, and one step in dT, not in dT + 1, has a dense gradient.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import ConfigError, nearest
from ..runtime.methods import Method, Need
from ..runtime.rewirer import Rewirer
from ..runtime.schedule import Schedule
from .flop_report import FlopReport

AVERAGE_STEP: dict[str, Callable[[float, float, int], float]] = {
    "dense": lambda f_s, f_d, interval: 3 * f_d,
    "small-dense": lambda f_s, f_d, interval: 3 * f_s,
    "static": lambda f_s, f_d, interval: 3 * f_s,
    "set": lambda f_s, f_d, interval: 3 * f_s,
    "rigl": lambda f_s, f_d, interval: (3 * interval * f_s + 2 * f_s + f_d) / (interval + 1),
    "rigl-struct": lambda f_s, f_d, interval: (3 * interval * f_s + 2 * f_s + f_d) / (interval + 1),
    "rigl-sg": lambda f_s, f_d, interval: (3 * interval * f_s + 2 * f_s + f_d) / (interval + 1),
    "rigl-sm": lambda f_s, f_d, interval: (3 * interval * f_s + 2 * f_s + f_d) / (interval + 1),
    "snfs": lambda f_s, f_d, interval: 2 * f_s + f_d,
    "dsr": lambda f_s, f_d, interval: 3 * f_s,
    "deepr": lambda f_s, f_d, interval: 3 * f_s,
    "snip": lambda f_s, f_d, interval: 3 * f_s,
    "lottery": lambda f_s, f_d, interval: 3 * f_s,
    "pruning": lambda f_s, f_d, interval: 3 * f_s,
}
"""Method -> FLOPs of an average training step from f_s (its expectation, where densities move), f_d and dT."""


def average_step(method: str, sparse: float, dense: float, update_interval: int = 100) -> float:
    """FLOPs of an average training step, as the report's supplement defines them.

    Args:
        method: a key of `AVERAGE_STEP`.
        sparse, dense: FLOPs of a forward pass, f_s (over the run, where densities move) and f_d.
        update_interval: optimizer steps between rewirings (dT).

    Raises:
        ConfigError: an unknown method.
    """
    if method not in AVERAGE_STEP:
        choices = ", ".join(AVERAGE_STEP)
        raise ConfigError(f"method: {method!r} is not one of {choices}{nearest(method, AVERAGE_STEP)}")
    return AVERAGE_STEP[method](sparse, dense, update_interval)


@dataclass(frozen=True)
class StepCost:
    """MACs of one training step of the example, by kind of step.

    Attributes:
        sparse: forward and backward with the active weights only.
        dense_gradient: the same, but the gradient of every weight is computed (an update step of RigL).
        dense: with all weights.
    """

    sparse: int
    dense_gradient: int
    dense: int


def step_cost(report: FlopReport, exact_backward: bool = False) -> StepCost:
    """MACs of one training step.

    Args:
        report: the forward pass.
        exact_backward: count the gradients that autograd really computes (none for the input of the first
            layer, none for frozen weights) instead of twice the forward pass.
    """
    if exact_backward:
        return StepCost(
            report.macs + sum(node.sparse_backward for node in report.nodes),
            report.macs + sum(node.dense_gradient_backward for node in report.nodes),
            report.dense_macs + sum(node.backward for node in report.nodes),
        )
    return StepCost(3 * report.macs, 2 * report.macs + report.dense_macs, 3 * report.dense_macs)


@dataclass(frozen=True)
class TrainingCost:
    """MACs of a training run for one example of a batch a step; FLOPs are twice that.

    Attributes:
        steps: optimizer steps.
        dense_gradient_steps: how many of them compute the gradient of every weight.
        macs: of the run.
        dense_macs: of a dense run of the same length.
        exact_backward: how the backward pass was counted.
    """

    steps: int
    dense_gradient_steps: int
    macs: int
    dense_macs: int
    exact_backward: bool = False

    @property
    def flops(self) -> int:
        """Twice the MACs."""
        return 2 * self.macs

    @property
    def ratio(self) -> float:
        """Over a dense run of the same length."""
        return self.macs / self.dense_macs if self.dense_macs else 1.0

    def describe(self, word: str, batch: float = 1) -> str:
        """One line for a person; `word` is "planned" or "realised", `batch` the examples a step."""
        backward = "exact backward" if self.exact_backward else "backward = 2 x forward"
        return (
            f"training, {word}: {self.flops * batch:.4g} FLOPs in {self.steps:,} steps, {self.dense_gradient_steps:,} "
            f"with dense gradients; {self.ratio:.4f} of dense ({backward})"
        )


Phase = tuple[int, FlopReport]
"""Number of steps, and what a forward pass costs during them."""


def training_cost(
    phases: Sequence[Phase], dense_gradient_steps: int | Sequence[int], exact_backward: bool = False
) -> TrainingCost:
    """Adds up a run whose densities are constant within each phase.

    Args:
        phases: steps and forward pass, in order; one phase where densities do not move.
        dense_gradient_steps: the steps with dense gradients, each with the densities of its phase; or only their
            number, taken as spread evenly over the steps of the run.
        exact_backward: see `step_cost`.
    """
    steps = sum(length for length, _ in phases)
    macs = dense = spread = start = 0
    at = None if isinstance(dense_gradient_steps, int) else sorted(dense_gradient_steps)
    count = dense_gradient_steps if isinstance(dense_gradient_steps, int) else len(dense_gradient_steps)
    for length, report in phases:
        cost = step_cost(report, exact_backward)
        extra = cost.dense_gradient - cost.sparse
        macs += length * cost.sparse
        spread += length * extra
        if at is not None:
            macs += extra * (bisect_left(at, start + length) - bisect_left(at, start))
        dense += length * cost.dense
        start += length
    if at is None and steps:
        macs += spread * count // steps
    return TrainingCost(steps, count, macs, dense, exact_backward)


class Trainable(Protocol):
    """What the ledger needs of a `SparseModule`."""

    method: Method

    def schedule(self, total_steps: int) -> Schedule: ...

    def planned_counts(self, total_steps: int) -> list[tuple[int, dict[str, int]]]: ...

    def flops(self) -> FlopReport: ...


def planned_cost(sparse: Trainable, total_steps: int, exact_backward: bool = False) -> TrainingCost:
    """What a run of `total_steps` optimizer steps will cost by the module's method and schedule.

    Where densities will move by what the weights turn out to be (redistribution, a global threshold), the plan holds
    the allocated ones; `realised_cost` knows better afterwards.
    """
    dense_steps = sparse.method.dense_gradient_steps(sparse.schedule(total_steps), total_steps)
    phases = phases_of(sparse.flops(), sparse.planned_counts(total_steps), total_steps)
    return training_cost(phases, dense_steps, exact_backward)


def realised_cost(
    sparse: Trainable,
    rewirer: Rewirer,
    exact_backward: bool = False,
    active_counts: Sequence[tuple[int, Mapping[str, int]]] = (),
) -> TrainingCost:
    """What the steps that `rewirer` has made so far did cost.

    Args:
        sparse: the module.
        rewirer: the runtime of the run; its history says which steps had dense gradients, and how many weights were
            active after each rewiring.
        exact_backward: see `step_cost`.
        active_counts: in place of the history's: from which step on a weight had how many active elements, oldest
            first.
    """
    steps = rewirer.step_count
    made = [event for event in rewirer.history if event.step < steps]
    dense_steps: int | list[int] = rewirer.method.dense_gradient_steps(rewirer.schedule, steps)
    if dense_steps and rewirer.method.dense_gradient is Need.UPDATES:
        dense_steps = [event.step for event in made]
    counts = list(active_counts) or [(0, rewirer.initial_counts), *((event.step + 1, event.active) for event in made)]
    return training_cost(phases_of(sparse.flops(), counts, steps), dense_steps, exact_backward)


def phases_of(
    report: FlopReport, active_counts: Sequence[tuple[int, Mapping[str, int]]], total_steps: int
) -> list[Phase]:
    """The phases of a run from the steps at which its numbers of active weights changed.

    Args:
        report: any count of the model.
        active_counts: from which step on each weight has how many active elements, oldest first, the first from 0 on.
        total_steps: where the last phase ends.
    """
    changes: list[tuple[int, Mapping[str, int]]] = []
    for start, counts in active_counts:
        if start < total_steps and not (changes and changes[-1][1] == counts):
            changes.append((start, counts))
    ends = [start for start, _ in changes[1:]] + [total_steps]
    return [(end - start, report.at(counts)) for (start, counts), end in zip(changes, ends, strict=True)]


def expected_flops(
    report: FlopReport, active_at: Callable[[int], Mapping[str, int]], total_steps: int, stride: int = 1
) -> float:
    """E[f_s,t]: mean FLOPs of a forward pass over the steps 0, `stride`, ... of a run.

    Args:
        report: any count of the model.
        active_at: optimizer step -> weight name -> number of active weights.
        total_steps: length of the run.
        stride: how many steps share their densities, such as the interval of a pruning schedule.
    """
    steps = range(0, total_steps, stride)
    weights = [min(stride, total_steps - step) for step in steps]
    total = sum(weight * report.at(active_at(step)).flops for weight, step in zip(weights, steps, strict=True))
    return total / total_steps
