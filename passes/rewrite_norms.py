"""Writes a norm over channels for fewer of them: it keeps the original width in its statistics.

The channels that are gone were 0 at its input (`find_zeros`), so zeros stand for them: the input is filled up with
zeros, normalised as before, and cut again. Order does not matter to a LayerNorm; in a GroupNorm every channel goes back
to its place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.core.graphs import attribute, operand, operation_name
from fxsparse.core.records import record_of, update_record

Step = tuple[Any, tuple, dict[str, Any]]
"""`(function, arguments after the first, keyword arguments)`."""


def pad_norm(node: fx.Node, root: Any, kind: str, labels: Tensor, box: Any, indices: dict[str, Tensor]) -> bool:
    """Replaces a norm in a graph for fewer channels, under its name.

    Args:
        root: what the graph's submodules refer to, with its tensors as they were.
        kind: `"layer_norm"` (an RMSNorm too) or `"group_norm"`.
        labels: of the input, in full.
        box: what is left of the input, per dimension.
        indices: gets the indices that are needed, by the names of buffers to be.

    Returns:
        Whether that is possible; if not, nothing has changed.
    """
    module = attribute(root, str(node.target)) if node.op == "call_module" else None
    if module is not None and any(getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")):
        return False
    cut = [dim for dim, kept in enumerate(box) if kept is not None]
    own = range(labels.ndim - _rank(node, module), labels.ndim) if kind == "layer_norm" else (1,)
    if len(cut) != 1 or cut[0] not in own:
        return False
    (dim,) = cut
    weight, bias = _affine(node, module)
    write = _layer_norm if kind == "layer_norm" else _group_norm
    steps = write(node, module, labels, dim, box[dim], indices)
    view = [-1] + [1] * (labels.ndim - 2) if kind == "group_norm" else None
    _replace(node, steps, weight, bias, view)
    return True


def _rank(node: fx.Node, module: Any) -> int:
    """Number of dimensions that a LayerNorm normalises over."""
    return len(tuple(module.normalized_shape if module is not None else operand(node, 1, "normalized_shape")))


def _affine(node: fx.Node, module: Any) -> tuple[Any, Any]:
    """Names of parameters, or nodes."""
    if module is not None:
        names = [name if getattr(module, name, None) is not None else None for name in ("weight", "bias")]
        return tuple(f"{node.target}.{name}" if name else None for name in names)
    if operation_name(node) == "rms_norm":
        return operand(node, 2, "weight"), None
    return operand(node, 2, "weight"), operand(node, 3, "bias")


def _layer_norm(
    node: fx.Node, module: Any, labels: Tensor, dim: int, kept: Tensor, indices: dict[str, Tensor]
) -> list[Step]:
    shape = list(module.normalized_shape if module is not None else operand(node, 1, "normalized_shape"))
    name = type(module).__name__ if module is not None else operation_name(node)
    is_rms = "rms" in name.lower()
    eps = module.eps if module is not None else operand(node, 3 if is_rms else 4, "eps")
    if eps is None and not is_rms:
        eps = 1e-5
    missing = labels.shape[dim] - len(kept)
    normalise: Step = (F.rms_norm, (shape, None, eps), {}) if is_rms else (F.layer_norm, (shape, None, None, eps), {})
    return [
        (F.pad, ([0, 0] * (labels.ndim - 1 - dim) + [0, missing],), {}),
        normalise,
        (torch.narrow, (dim, 0, len(kept)), {}),
    ]


def _group_norm(
    node: fx.Node, module: Any, labels: Tensor, dim: int, kept: Tensor, indices: dict[str, Tensor]
) -> list[Step]:
    groups = module.num_groups if module is not None else operand(node, 1, "num_groups")
    eps = module.eps if module is not None else operand(node, 4, "eps")
    place = torch.full((labels.shape[dim],), len(kept))  # the channel of zeros that is added at the end
    place[kept] = torch.arange(len(kept))
    indices[f"_place_{node.name}"], indices[f"_kept_{node.name}"] = place, kept
    return [
        (F.pad, ([0, 0] * (labels.ndim - 2) + [0, 1],), {}),
        (torch.index_select, (dim, f"_place_{node.name}"), {}),
        (F.group_norm, (groups, None, None, 1e-5 if eps is None else eps), {}),
        (torch.index_select, (dim, f"_kept_{node.name}"), {}),
    ]


def _replace(node: fx.Node, steps: list[Step], weight: Any, bias: Any, view: list[int] | None) -> None:
    graph, record = node.graph, record_of(node)
    current = operand(node, 0, "input")

    def inserted(item: Any) -> Any:
        return graph.create_node("get_attr", item) if isinstance(item, str) else item

    with graph.inserting_before(node):
        for factor, function in ((weight, torch.mul), (bias, torch.add)):
            if factor is not None:
                factor = inserted(factor)
                if view is not None:
                    factor = graph.call_method("view", (factor, *view))
                steps.append((function, (factor,), {}))
        for function, rest, kwargs in steps[:-1]:
            current = graph.call_function(function, (current, *map(inserted, rest)), kwargs)
            update_record(current, module=record.module)
        function, rest, kwargs = steps[-1]
        node.op, node.target = "call_function", function
        node.args, node.kwargs = (current, *map(inserted, rest)), kwargs
