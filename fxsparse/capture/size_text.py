"""Texts that forward makes of sizes: a name that is looked up decides, the message of an assertion does not.

`f"stem{x.shape[1]}"` picks a submodule, so the graph holds for that size only. `assert ok, f"got {x.shape}"` would be
the same to a tracer, and is far more common. What a text is for is read from the source of the line that makes it.
"""

import ast
import linecache
import logging
import os
import sys
import warnings
from functools import lru_cache
from types import FrameType

import torch

_OWN = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_MESSENGERS = (os.path.dirname(logging.__file__) + os.sep, warnings.__file__)
_SAID = frozenset("_assert _check print warn warn_once warning warning_once info debug error critical log".split())
"""Functions and methods whose text is read by people."""


def text_decides() -> bool:
    """Whether the text that the caller's caller makes of a size may decide what forward does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith((_TORCH, *_MESSENGERS)):
        return False
    return not _is_message(frame)


def _is_message(frame: FrameType) -> bool:
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    tree = _tree(frame.f_code.co_filename)
    if tree is None or None in positions:
        return False
    line, end_line, column, end_column = positions
    place = ((line, column), (end_line, end_column))
    node: ast.AST | None = tree
    while node is not None:
        if isinstance(node, (ast.Raise, ast.Assert)) or (isinstance(node, ast.Call) and _name(node.func) in _SAID):
            return True
        node = next((child for child in ast.iter_child_nodes(node) if _holds(child, place)), None)
    return False


def _holds(node: ast.AST, place: tuple) -> bool:
    if not hasattr(node, "lineno"):
        return any(_holds(child, place) for child in ast.iter_child_nodes(node))
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return start <= place[0] and place[1] <= end


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


@lru_cache(maxsize=16)
def _tree(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file))) if linecache.getlines(file) else None
    except (SyntaxError, ValueError):
        return None
