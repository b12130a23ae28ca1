"""Comparisons of tensors whose outcome is certain without looking at the tensors.

`if torch.rand(()) < self.layer_drop` skips a layer at random. With a probability of 0 it never does: a number drawn
from [0, 1) is not below 0. The draw stays in the graph, so that the random numbers after it are the model's.
"""

import operator
from typing import Any, cast

import torch
from torch import fx

_LOWEST, _BELOW = 0.0, 1.0


def certain_truth(node: fx.Node) -> bool | None:
    """The truth of a node's value for every input: of uniform random numbers against a bound. None if open."""
    if node.op != "call_function" or len(node.args) != 2:
        return None
    drawn, bound = (cast(Any, argument) for argument in node.args)
    compare: Any = node.target
    if not _is_number(bound) or not isinstance(drawn, fx.Node) or drawn.target is not _UNIFORM:
        return None
    if "out" in drawn.kwargs or any(user.target not in _COMPARISONS for user in drawn.users):
        return None  # it may have been changed in place since
    least, past = bound <= _LOWEST, bound >= _BELOW  # all draws are >= such a bound; all are < such a bound
    outcomes = {
        operator.lt: (False if least else True if past else None),
        operator.ge: (True if least else False if past else None),
        operator.le: (False if bound < _LOWEST else True if past else None),
        operator.gt: (True if bound < _LOWEST else False if past else None),
    }
    return outcomes.get(compare)


_UNIFORM = torch.rand
_COMPARISONS = (operator.lt, operator.ge, operator.le, operator.gt)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
