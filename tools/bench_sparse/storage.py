"""Bytes that a module and its optimizer keep: every tensor that can be reached from them, each storage once."""

import types
from typing import Any

import torch

OUTSIDE = (types.ModuleType, type, types.BuiltinFunctionType, types.CodeType, str, bytes, int, float)


def kept_bytes(*roots: Any) -> int:
    """Bytes of all tensor storages reachable from `roots`: parameters, gradients, optimizer state, patterns, masks.

    It goes through containers, attributes, slots, bound methods, closures and gradients, not through functions'
    globals, classes and Python modules. What C++ objects hold is not seen.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(roots)
    alive = []  # objects made on the way must keep their ids
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        alive.append(item)
        if isinstance(item, torch.Tensor):
            waiting += _of_tensor(item, storages)
        elif isinstance(item, types.FunctionType):
            waiting += [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        elif isinstance(item, types.MethodType):
            waiting += [item.__self__, item.__func__]
        elif not isinstance(item, OUTSIDE):
            waiting += _inside(item)
    return sum(storages.values())


def _of_tensor(tensor: torch.Tensor, storages: dict[int, int]) -> list[Any]:
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        parts: list[Any] = [tensor.values()]
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        return parts + ([tensor.crow_indices(), tensor.col_indices()] if rows else [tensor.ccol_indices()])
    if tensor.layout != torch.strided:
        return [tensor._indices(), tensor._values()]
    if tensor.device.type != "meta" and not type(tensor).__name__.startswith("Fake"):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    inner = [tensor.grad] if tensor.is_leaf else []
    return [*inner, vars(tensor)] if hasattr(tensor, "__dict__") else inner


def _inside(item: Any) -> list[Any]:
    found: list[Any] = []
    if isinstance(item, dict):
        found += [*item.keys(), *item.values()]
    elif isinstance(item, (list, tuple, set, frozenset)):
        found += item
    if hasattr(item, "__dict__"):
        found.append(vars(item))
    for kind in type(item).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            found.append(getattr(item, name, None))
    return found


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
