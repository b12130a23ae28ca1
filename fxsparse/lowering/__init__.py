"""Lowering: graphs that compute with active weights alone, for training and for inference."""

from .checks import check_trains_lowered
from .decisions import Decision, captured_by
from .inference import LoweredModule, lower_for_inference
from .lowerable import LowerableModule, lower
from .storage import LoweredStorage

__all__ = [
    "Decision",
    "LowerableModule",
    "LoweredModule",
    "LoweredStorage",
    "captured_by",
    "check_trains_lowered",
    "lower",
    "lower_for_inference",
]
