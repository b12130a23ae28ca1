"""Lowering: graphs that compute with active weights alone, for training and for inference."""

from .checks import check_lowered, check_trains_lowered
from .decisions import Decision, captured_by, decide, decision_table, kernel_block
from .inference import LoweredModule, lower_for_inference
from .recurrences import decide_recurrences
from .storage import LoweredStorage

__all__ = [
    "Decision",
    "LoweredModule",
    "LoweredStorage",
    "captured_by",
    "check_lowered",
    "check_trains_lowered",
    "decide",
    "decide_recurrences",
    "decision_table",
    "kernel_block",
    "lower_for_inference",
]
