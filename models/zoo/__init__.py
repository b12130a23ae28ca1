"""Small networks that are each hard to capture for one reason, which their docstrings give.

`ZOO` maps a name to a `ZooCase`, which makes the network and an example input and says what to expect of
them; `call(model, example)` runs one, `tensors(output)` lists what came out.
"""

from . import below_python, convolutions, interfaces, modes, mutation, refused, sequences, shapes, ties, weights
from .case import ZooCase, call, tensors

THEMES = (ties, convolutions, weights, modes, interfaces, shapes, mutation, sequences, below_python, refused)

ZOO: dict[str, ZooCase] = {name: case for theme in THEMES for name, case in theme.CASES.items()}

__all__ = ["ZOO", "ZooCase", "call", "tensors"]
