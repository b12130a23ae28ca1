"""What a model costs: counting, reports in every form, the training ledger, and budgets in FLOPs."""

from .counting import count_flops, count_module
from .flop_report import FlopReport
from .planning import plan_flops
from .training import TrainingCost, average_step, planned_cost, realised_cost, step_cost, training_cost

__all__ = [
    "FlopReport",
    "TrainingCost",
    "average_step",
    "count_flops",
    "count_module",
    "plan_flops",
    "planned_cost",
    "realised_cost",
    "step_cost",
    "training_cost",
]
