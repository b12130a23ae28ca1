"""Finds the line of the user's code that is being traced, for messages."""

import linecache
import os
import sys
import traceback
from types import FrameType

import torch
from torch import fx

_OWN = os.path.dirname(__file__) + os.sep
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, _OWN, "<")
_ENTRY = (_OWN + "concrete_tracer.py", "capture")
"""The frame below which the trace begins: whoever asked for a capture is not what is captured."""


def calling_line() -> tuple[str, str] | None:
    """`file:line` and source text of the innermost frame of the trace outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != _ENTRY:
        if not frame.f_code.co_filename.startswith(_SKIPPED):
            return _described(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def user_line(frames: traceback.StackSummary) -> tuple[str, str] | None:
    """The same of extracted frames, such as those of an error."""
    for frame in reversed(frames):
        if (frame.filename, frame.name) == _ENTRY:
            return None
        if not frame.filename.startswith(_SKIPPED):
            return _described(frame.filename, frame.lineno or 0)
    return None


def instruction() -> tuple[FrameType | None, int]:
    """The instruction of Python code outside of this folder and of `torch.fx` that is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_OWN, os.path.dirname(fx.__file__))):
        frame = frame.f_back
    return frame, frame.f_lasti if frame is not None else 0


def _described(file: str, line: int) -> tuple[str, str]:
    return f"{file}:{line}", linecache.getline(file, line).strip()
