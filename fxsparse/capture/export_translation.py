"""ATen calls of an exported graph as the functions of `torch` that users write.

The tables of the passes (weights, channels, costs) speak of `F.linear`, `torch.conv2d`, `F.batch_norm`. An ATen
operator that `torch` exposes under its own name takes the same arguments there; the few whose arguments stand in
another order are in `SPECIAL`. What is neither stays an ATen call.
"""

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

Call = tuple[str, Any, tuple, dict[str, Any]]
"""An fx opcode, its target, positional and keyword arguments."""

_END = torch.iinfo(torch.int64).max
"""What ATen has for the end of a slice that goes to the end."""


def torch_call(overload: Any, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """The same call as a function or method of `torch`; None where there is none.

    Args:
        overload: an operator such as `torch.ops.aten.conv2d.default`.
        args, kwargs: as ATen's schema has them; nodes, numbers, lists.
    """
    schema = overload._schema
    namespace, name = schema.name.split("::")
    if namespace != "aten":
        return None
    if name in SPECIAL:
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        return SPECIAL[name](given)
    first = schema.arguments[0].name if schema.arguments else ""
    is_method = isinstance(getattr(torch.Tensor, name, None), types.MethodDescriptorType) and first == "self"
    if name.endswith("_") and is_method:
        return "call_method", name, args, kwargs
    for place, prefix in ((torch, ""), (torch._C._nn, ""), (torch.linalg, "linalg_"), (torch.special, "special_")):
        function = getattr(place, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        if isinstance(function, types.BuiltinFunctionType):
            return "call_function", function, args, kwargs
    return ("call_method", name, args, kwargs) if is_method else None


def _named(function: Callable, *names: str, **renamed: str) -> Callable[[dict[str, Any]], Call]:
    """A call of `function` with the arguments of these names in this order, and others under new names."""

    def rule(given: dict[str, Any]) -> Call:
        positional = tuple(given.get(name) for name in names)
        return "call_function", function, positional, {new: given[old] for new, old in renamed.items() if old in given}

    return rule


def _embedding(given: dict[str, Any]) -> Call:
    padding = given.get("padding_idx", -1)
    kwargs = {
        "padding_idx": None if isinstance(padding, int) and padding < 0 else padding,
        "scale_grad_by_freq": given.get("scale_grad_by_freq", False),
        "sparse": given.get("sparse", False),
    }
    return "call_function", F.embedding, (given["indices"], given["weight"]), kwargs


def _slice(given: dict[str, Any]) -> Call | None:
    dim, start, end = given.get("dim", 0), given.get("start"), given.get("end")
    if not isinstance(dim, int) or dim < 0:
        return None
    start = None if isinstance(start, int) and start == 0 else start
    end = None if isinstance(end, int) and end == _END else end
    ranges = (*[slice(None)] * dim, slice(start, end, given.get("step", 1)))
    return "call_function", operator.getitem, (given["self"], ranges), {}


def _index(given: dict[str, Any]) -> Call:
    places = tuple(slice(None) if index is None else index for index in given["indices"])
    return "call_function", operator.getitem, (given["self"], places), {}


def _to(given: dict[str, Any]) -> Call | None:
    if "layout" in given or "pin_memory" in given:
        return None
    target = [given[name] for name in ("other", "device", "dtype") if name in given]
    flags = {name: given[name] for name in ("non_blocking", "copy", "memory_format") if given.get(name)}
    return "call_method", "to", (given["self"], *target), flags


def _einsum(given: dict[str, Any]) -> Call:
    """A path, which torch chooses anew, is left out."""
    return "call_function", torch.einsum, (given["equation"], *given["tensors"]), {}


def _method(name: str, *names: str) -> Callable[[dict[str, Any]], Call]:
    return lambda given: ("call_method", name, tuple(given[n] for n in names if n in given), {})


SPECIAL: dict[str, Callable[[dict[str, Any]], Call | None]] = {
    "batch_norm": _named(
        F.batch_norm, "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    ),
    "instance_norm": _named(
        F.instance_norm,
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
    "layer_norm": _named(F.layer_norm, "input", "normalized_shape", "weight", "bias", eps="eps"),
    "group_norm": _named(F.group_norm, "input", "num_groups", "weight", "bias", eps="eps"),
    "dropout": _named(F.dropout, "input", "p", "train"),
    "embedding": _embedding,
    "slice": _slice,
    "index": _index,
    "to": _to,
    "einsum": _einsum,
    "split": lambda given: (
        "call_method",
        "split",
        (given["self"], given["split_size"] if "split_size" in given else given["split_sizes"]),
        {"dim": given.get("dim", 0)},
    ),
    "sym_size": _method("size", "self", "dim"),
    "sym_numel": _method("numel", "self"),
    "lift_fresh_copy": _method("clone", "self"),
}
"""ATen name -> the call, from the arguments by their names in the schema."""


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of `torch.ops`, and not a function of Python."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
