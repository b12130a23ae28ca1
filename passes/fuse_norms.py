"""For training: batch normalisation among lowered layers, with the sum and the ReLU that follow it, as one call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.kernels.normalisation import norm_activation

from .chains import addition_after, has_hooks, may_move, only_user, replace_chain
from .choose_layout import find_outermost, is_batch_norm

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def fuse_norms(root: nn.Module, graph: fx.Graph) -> int:
    """Rewrites a lowered graph in place.

    Args:
        root: what the graph's attributes and submodules refer to.
        graph: annotated with shapes.

    Returns:
        Number of calls that were made one with what follows them.
    """
    outermost = find_outermost(root, graph)
    count = 0
    for norm in list(graph.nodes):
        if norm not in outermost or not is_batch_norm(root, norm):
            continue
        arguments = _norm_arguments(root, norm)
        if arguments is not None:
            _fuse(root, norm, arguments)
            count += 1
    return count


def _norm_arguments(root: nn.Module, norm: fx.Node) -> tuple[list[Any], list[Any]] | None:
    """Affine parameters and statistics, then training, momentum and eps: names of attributes, or values."""
    if norm.op == "call_module":
        module = attribute(root, str(norm.target))
        present = {name for name in ("weight", "bias", *_STATISTICS) if getattr(module, name) is not None}
        names = [f"{norm.target}.{name}" if name in present else None for name in ("weight", "bias", *_STATISTICS)]
        return names, [f"{norm.target}.training", module.momentum, module.eps]
    training = operand(norm, 5, "training")
    if not isinstance(training, bool):
        return None
    given = [operand(norm, place, name) for place, name in ((3, "weight"), (4, "bias"), (1, "running_mean"))]
    given += [operand(norm, 2, "running_var"), None]
    momentum, eps = operand(norm, 6, "momentum"), operand(norm, 7, "eps")
    return given, [training, 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps]


def _fuse(root: nn.Module, norm: fx.Node, arguments: tuple[list[Any], list[Any]]) -> None:
    chain, residual, source = [norm], None, operand(norm, 0, "input")
    addition = addition_after(norm)
    if addition is not None and may_move(root, chain, addition[0]):
        chain.append(addition[0])
        residual = addition[1]
    relu = len(chain[-1].users) == 1 and _is_relu(root, only_user(chain[-1]))
    if relu and may_move(root, chain, only_user(chain[-1])):
        chain.append(only_user(chain[-1]))
    else:
        relu = False
    graph = norm.graph
    with graph.inserting_before(chain[-1]):
        tensors, settings = (
            [graph.create_node("get_attr", item) if isinstance(item, str) else item for item in items]
            for items in arguments
        )
        new = graph.call_function(norm_activation, (source, residual, *tensors, *settings, relu))
    replace_chain(chain, new)


def _is_relu(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        return type(module) is nn.ReLU and not has_hooks(module)
    known = node.op == "call_method" or node.target in (F.relu, F.relu_, torch.relu, torch.relu_)
    return known and operation_name(node) in ("relu", "relu_")
