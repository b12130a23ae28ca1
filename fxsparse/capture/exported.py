"""Captures a module's forward with `torch.export`: the second mechanism, for what the concrete tracer refuses.

`export` runs forward on fake tensors below Python, so that Python which wants real tensors (`vmap`, `no_grad`, code
that looks at types) is content. What it gives is rebuilt here as a graph of ordinary nodes over the model's own
tree: parameters and buffers under the model's names, arguments and outputs as forward has them, ATen calls as the
functions of `torch` (`export_translation.py`), conditions on sizes as nodes (`export_sizes.py`). Every submodule is
inlined, and one mode is captured at a time.
"""

import functools
import inspect
import traceback
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ..core.arguments import is_object
from ..core.errors import CaptureError
from .bound_example import bound_example
from .export_guards import OutsideGradientsRefused, quiet_export
from .export_rebuild import ExportRebuilder
from .export_sizes import every_size_dynamic
from .guards import changed_attributes, modes_read, module_state_kept, randomness_unchanged, snapshot
from .leftovers import fake_leftovers_removed
from .user_code import user_line


class Exported:
    """One capture of one module in its present mode.

    Attributes, to be read after `capture`:
        changed: attributes that forward changes, and the graph does not.
        modes_read: modules whose `training` flag forward looked at.
        notes: what the user should know.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        self.changed: list[str] = []
        self.modes_read: set[nn.Module] = set()
        self.notes: list[str] = []

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> fx.Graph:
        """The graph of `model.forward` for the example.

        Raises:
            CaptureError: the reason that `torch.export` gives, in one line.
            InputError: the example does not fit the arguments of `forward`.
        """
        example = bound_example(self.model, args, kwargs)
        for leaf in pytree.tree_leaves(dict(example.arguments)):
            if is_object(leaf):
                raise self._refused(f"an argument is a {type(leaf).__name__}, which torch.export does not take apart")
        with fake_leftovers_removed(self.notes):
            return self._captured(example)

    def _captured(self, example: Any) -> fx.Graph:
        try:
            return self._rebuilt(self._program(example, dynamic=True), example)
        except CaptureError:
            raise
        except Exception as error:
            reason = _one_line(error)
        try:
            graph = self._rebuilt(self._program(example, dynamic=False), example)
        except CaptureError:
            raise
        except Exception as error:
            raise self._refused(_one_line(error)) from error
        self.notes.append(f"the graph holds for the example's sizes only: {reason}")
        return graph

    def _refused(self, reason: str) -> CaptureError:
        return CaptureError(f"cannot capture {self.title}: {reason}")

    def _program(self, example: Any, dynamic: bool) -> torch.export.ExportedProgram:
        with (
            randomness_unchanged(self.title),
            module_state_kept(self.model) as changed,
            modes_read(self.modes_read),
            quiet_export(self._refused),
            OutsideGradientsRefused([*self.model.parameters(), *self.model.buffers()], self._refused) as outside,
        ):
            given = _aliased(example, outside)
            self._watch_forward()
            program = torch.export.export(
                self.model,
                given.args,
                given.kwargs,
                dynamic_shapes=every_size_dynamic(example.arguments) if dynamic else None,
                strict=False,
            )
        if changed["modules"]:
            raise self._refused(
                f"forward adds or replaces parameters or submodules of {changed['modules'][0] or 'the model'}"
            )
        return program

    def _watch_forward(self) -> None:
        """Notes which attributes forward changes: export puts them back, and says nothing of numbers."""
        forward = self.model.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = snapshot(self.model)
            try:
                return forward(*args, **kwargs)
            finally:
                self.changed = changed_attributes(before)

        self.model.forward = watched

    def _rebuilt(self, program: torch.export.ExportedProgram, example: Any) -> fx.Graph:
        try:
            return ExportRebuilder(self.model, program, self._refused).graph_of(example)
        finally:
            _let_go(program)


def _let_go(program: torch.export.ExportedProgram) -> None:
    """Takes the fake tensors out of a program, which torch keeps: they would look like leftovers of forward."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.tracked_fakes = []
            node.meta.clear()


def _aliased(example: Any, outside: OutsideGradientsRefused) -> Any:
    """The example in tensors of their own, since export leaves marks on those that it is given."""
    own: dict[int, Tensor] = {}

    def alias(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in own:
            own[id(leaf)] = outside.allow(leaf.detach().requires_grad_(leaf.requires_grad))
        return own[id(leaf)]

    arguments = {name: pytree.tree_map(alias, value) for name, value in example.arguments.items()}
    return inspect.BoundArguments(example.signature, OrderedDict(arguments))


def _one_line(error: Exception) -> str:
    """What an error says, with the line of the user's code that it comes from."""
    place = user_line(traceback.extract_tb(error.__traceback__))
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    reason = lines[0] if lines else ""
    if not reason or isinstance(error, (AssertionError, KeyError)):
        reason = f"{type(error).__name__} {reason}".strip()
    if isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)):
        reason = "the result depends on the data of a tensor, so the graph would only be right for the example"
    return f"{place[0]}: `{place[1]}`: {reason}" if place else reason
