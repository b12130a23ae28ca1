"""Puts the graphs of units in the place of their modules' `forward`, on the original objects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .capture.opaque_submodules import ROOT_CALL
from .capture.unit_graphs import compile_graph

__all__ = ["ROOT_CALL", "UnitForward", "install_units", "units_apart"]

_APART = "_units_are_apart"


class UnitForward:
    """The `forward` of a unit: the graph of the captured module's present mode, or what the user wrote.

    It stands in the submodule's own attributes, so that hooks, and whoever else calls the submodule, see no change.
    """

    def __init__(self, whole: nn.Module, name: str, module: nn.Module) -> None:
        self.whole = whole
        self.name = name
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole: Any = self.whole
        code = whole._unit_codes["train" if whole.training else "eval"].get(self.name)
        if code is None or whole.__dict__.get(_APART):
            return type(self.module).forward(self.module, *args, **kwargs)
        return code(whole, *args, **kwargs)


def install_units(whole: Any) -> dict[str, dict[str, Callable]]:
    """Compiles the graphs of a captured module's units and has its submodules call them.

    Returns:
        Mode -> name -> the function of `(whole, *args, **kwargs)`.
    """
    codes: dict[str, dict[str, Callable]] = {"train": {}, "eval": {}}
    if whole.units is None:
        return codes
    compiled: dict[int, Callable] = {}
    for mode, graphs in whole.units.graphs.items():
        for name, graph in graphs.items():
            if id(graph) not in compiled:
                compiled[id(graph)] = compile_graph(graph)
            codes[mode][name] = compiled[id(graph)]
            module = whole.get_submodule(name)
            module.__dict__["forward"] = UnitForward(whole, name, module)
    return codes


@contextmanager
def units_apart(whole: nn.Module) -> Iterator[None]:
    """While it lasts, submodules run as they are written."""
    whole.__dict__[_APART] = True
    try:
        yield
    finally:
        del whole.__dict__[_APART]
