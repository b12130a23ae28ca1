"""Bytes that a module and its optimizer keep: every tensor that can be reached from them, each storage once."""

import gc
import types
from collections.abc import Sequence
from typing import Any

import torch

OUTSIDE = (types.ModuleType, type, types.BuiltinFunctionType, types.CodeType, types.FrameType, str, bytes, int, float)


def kept_bytes(*roots: Any) -> int:
    """Bytes of all tensor storages reachable from `roots`: parameters, gradients, optimizer state, patterns, masks.

    It goes wherever Python's garbage collector goes, but not into classes, Python modules and functions' globals,
    which hold what belongs to others. What objects of C++ keep to themselves is not seen.
    """
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # the objects with their ids, which must not be given to others meanwhile
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, OUTSIDE):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            waiting += _inside_tensor(item, storages)
        elif isinstance(item, types.FunctionType):
            waiting += [*(item.__closure__ or ()), item.__defaults__, item.__dict__]
        else:
            waiting += gc.get_referents(item)
    return sum(storages.values())


def _inside_tensor(tensor: torch.Tensor, storages: dict[int, int]) -> Sequence[Any]:
    """What a tensor leads to; the bytes of its own storage go to `storages`."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.device.type != "meta" and type(tensor) in (torch.Tensor, torch.nn.Parameter):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return tensor.grad if tensor.is_leaf else None, getattr(tensor, "__dict__", None)
