"""A captured model as an ordinary module: the model's own tree, run by graphs instead of by its `forward`."""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import fx, nn

from .core.errors import CaptureError, InputError
from .core.graphs import pack_graph, unpack_graph
from .core.records import Captured
from .core.units import Units
from .failures import CallNamingNodes
from .plain_module import plain_module
from .unit_calls import ROOT_CALL, install_units, units_apart

_REBUILT = (
    "_unit_codes",
    "_graph",
    "_graphs",
    "_code",
    "_codes",
    "_lineno_map",
    "_prologue_start",
    "forward_train",
    "forward_eval",
)
"""Attributes that are made anew from the graphs when a module is copied or unpickled."""


class CapturedModule(fx.GraphModule):
    """A `torch.fx.GraphModule` over a captured model, right in train and in eval mode.

    Parameters, buffers and submodules are those of the captured copy, all of them and in its order, so
    `state_dict` keys are the model's. Where `forward` does something else in train mode than in eval mode
    (auxiliary heads, functional dropout), there are two graphs, and `train()` and `eval()` switch between
    them; `graph` and `code` are those of the present mode.

    Attributes:
        example: `(args, kwargs)` of the capture, with a `TensorSpec` in place of every tensor.
        capture: the mechanism that made the graphs: `"concrete"` or `"export"`.
        capture_reason: why the mechanisms before it did not; empty for the first.
        notes: what the user should know, a sentence each.
        flags, mode_readers, units: as of `Captured`.
    """

    example: tuple[tuple, dict[str, Any]]
    capture: str
    capture_reason: str
    notes: list[str]
    flags: dict[str, dict[str, bool]]
    mode_readers: tuple[str, ...]
    units: Units | None
    forward_train: Callable
    forward_eval: Callable
    _wrapped_call: Any

    def __init__(self, captured: Captured) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=captured.name)
        _refuse_name_clashes(captured, _defining_class(self))
        for key, value in captured.model.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
                self.__dict__[key] = value
            elif key not in self.__dict__:
                self.__dict__[key] = value  # plain attributes: constants that the graph may read
        self.example = captured.example
        self.capture = captured.mechanism
        self.capture_reason = captured.reason
        self.notes = list(captured.notes)
        self.flags = captured.flags
        self.mode_readers = captured.mode_readers
        self.units = captured.units
        self._graphs = dict(captured.graphs)
        self.recompile()

    # -- two graphs, one module ---------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The graph of the present mode. Call `recompile()` after changing it."""
        graphs = self.__dict__.get("_graphs")
        return graphs[self._mode()] if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        """Replaces the graph of the present mode; of both, where they share one."""
        graphs = self.__dict__.get("_graphs")
        if graphs:
            old = graphs[self._mode()]
            self._graphs = {mode: graph if g is old else g for mode, g in graphs.items()}
        self._graph = graph
        graph.owning_module = self
        self.recompile()

    @property
    def code(self) -> str:
        """The Python code that the graph of the present mode was compiled to."""
        codes = self.__dict__.get("_codes")
        return codes[self._mode()] if codes else super().code

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """`"train"` and `"eval"`: the graphs of both modes, the same object where they do not differ."""
        return dict(self._graphs)

    def set_graphs(self, graphs: Mapping[str, fx.Graph]) -> None:
        """Runs other graphs over the same tree from now on: `"train"` and `"eval"`, which may be one."""
        self._graphs = dict(graphs)
        self.recompile()

    def train(self, mode: bool = True) -> "CapturedModule":
        super().train(mode)
        if "_graphs" in self.__dict__:
            for name, training in self.flags.get("train" if mode else "eval", {}).items():
                self.get_submodule(name).training = training
            self._graph = self._graphs[self._mode()]
        whole = self.__dict__.get(ROOT_CALL)
        if whole is not None:
            whole.model.__dict__["training"] = mode
        return self

    def recompile(self) -> Any:
        """Compiles the Python code of both graphs."""
        graphs = self.__dict__.get("_graphs")
        if not graphs:
            return super().recompile()
        own_class = type(self)
        self._codes = {}
        for mode in ("train", "eval"):
            self._graph = graphs[mode]
            self._graph.owning_module = self
            code = super().recompile()
            self._codes[mode] = self._code
            setattr(own_class, f"forward_{mode}", own_class.forward)
        own_class._wrapped_call = CallNamingNodes(own_class)
        if graphs["train"] is not graphs["eval"]:
            own_class.forward = _forward_by_mode
        self._graph = graphs[self._mode()]
        self._unit_codes = install_units(self)
        return code

    def graph_module(self, training: bool | None = None, *, share: bool = False) -> fx.GraphModule:
        """The graph of one mode as a plain `torch.fx.GraphModule`: to save, export or run without fxsparse.

        Its layers are calls of `nn.Conv2d`, `nn.Linear` and the like, its keys those of this module, in their order.
        Where both modes share one graph, it is right in both; else in the one that was asked for.

        Args:
            training: the mode; None for the present one.
            share: use the parameters and modules of this one instead of copies.

        Raises:
            CaptureError: the graph needs fxsparse (masks: `fold()` or `compact()` first), or holds what fx, which
                saves a graph as code and traces it again, would not load as the same; the node is named.
        """
        mode = self._mode() if training is None else "train" if training else "eval"
        module = plain_module(self, self._graphs[mode], self._get_name(), share=share)
        return module if share else module.train(mode == "train")

    def units_apart(self) -> AbstractContextManager:
        """A context in which the submodules run as they are written, and not by the graphs of units."""
        return units_apart(self)

    def _mode(self) -> str:
        return "train" if self.training else "eval"

    # -- copying ------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        shared = self._graphs["train"] is self._graphs["eval"]
        state["packed_graphs"] = {
            mode: pack_graph(graph) for mode, graph in self._graphs.items() if mode == "eval" or not shared
        }
        if self.units is not None:
            state["units"] = self.units.replaced(pack_graph)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        packed = state.pop("packed_graphs")
        super().__setstate__(state)
        if self.units is not None:
            self.units = self.units.replaced(unpack_graph)
        graphs = {mode: unpack_graph(rows) for mode, rows in packed.items()}
        self._graphs = {"train": graphs.get("train", graphs["eval"]), "eval": graphs["eval"]}
        self.recompile()

    def __reduce__(self) -> tuple:
        return _empty_instance, (_defining_class(self),), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedModule":
        own = _empty_instance(_defining_class(self))
        memo[id(self)] = own
        own.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return own

    def __copy__(self) -> "CapturedModule":
        own = _empty_instance(_defining_class(self))
        own.__setstate__(self.__getstate__())
        return own


def _forward_by_mode(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
    for name in self.mode_readers:
        expected = self.flags.get(self._mode(), {}).get(name, self.training)
        if self.get_submodule(name).training != expected:
            raise InputError(
                f"{name} is in {'eval' if expected else 'train'} mode while the model is in {self._mode()} mode, and "
                "the graph was captured otherwise; let the train() of the model's class set it so, and capture again"
            )
    if self.training:
        return self.forward_train(*args, **kwargs)
    return self.forward_eval(*args, **kwargs)


def _defining_class(module: fx.GraphModule) -> type[CapturedModule]:
    """The class as written, without the one that `GraphModule` makes for every instance."""
    return next(cls for cls in type(module).__mro__ if "GraphModuleImpl" not in cls.__qualname__)


def _empty_instance(cls: type[CapturedModule]) -> CapturedModule:
    return cls.__new__(cls)


def _refuse_name_clashes(captured: Captured, cls: type) -> None:
    """An attribute of the model under the name of one of ours would be hidden from the graph."""
    model = captured.model
    ours = set(_REBUILT)
    for base in cls.__mro__:
        if issubclass(base, fx.GraphModule):
            ours |= vars(base).keys() | inspect.get_annotations(base).keys()
    read = {
        str(node.target).partition(".")[0]
        for _, graph in captured.distinct_graphs()
        for node in graph.nodes
        if node.op == "get_attr" and node.target in model.__dict__
    }
    for name in (*model._modules, *model._parameters, *model._buffers, *read):
        if name in ours:
            raise CaptureError(f"{captured.name}.{name} has the name of an attribute of {cls.__name__}; rename it")
