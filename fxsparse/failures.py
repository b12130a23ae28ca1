"""Errors at run time in terms of the graph: which node fails, and for which sizes."""

import re
import traceback
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .core.errors import BakedSizeError, FxSparseError, InputError
from .core.graphs import operation_name
from .core.records import TensorSpec, record_of, specs_of

_GENERATED = "<eval_with_key>"
"""How the file names of code begin that `torch.fx` generates."""


class CallNamingNodes:
    """Calls a captured module; what fails for other sizes than the example's is an error that names the node."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    @torch._dynamo.disable(recursive=False)
    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super(self.cls, module).__call__(*args, **kwargs)  # type: ignore[misc]
        except (FxSparseError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            explained = _explained(module, error, (args, kwargs))
            if explained is None:
                raise
            raise explained from error


def _explained(module: Any, error: Exception, given: tuple) -> InputError | None:
    """The error for sizes or dtypes that the example did not have; None where they are the same."""
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if _GENERATED in frame.filename]
    name = re.match(r"(\w+) =", lines[-1].strip()) if lines else None
    node = _node(module.graph, name[1]) if name else None
    place = f"node {node.name}" if node is not None else "the graph"
    if node is not None and record_of(node).module:
        place += f" in {record_of(node).module}"
    reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
    if node is not None and operation_name(node).startswith("_assert_tensor_metadata"):  # export's, before every `to`
        return InputError(
            f"{place} fails: {reason}; torch.export fixed the precision in which forward converts, so capture under "
            'the precision (autocast) in which you train, or with capture="concrete"'
        )
    expected, got = _tensors(module.example), _tensors(specs_of(given))
    if [(spec.shape, spec.dtype) for spec in expected] == [(spec.shape, spec.dtype) for spec in got]:
        return None
    return BakedSizeError(
        f"{place} fails for {_written(got)}: {reason}; the graph was captured for {_written(expected)}, so where the "
        "model itself takes these, a size was baked in: capture again with an example that has them"
    )


def _node(graph: fx.Graph, name: str) -> fx.Node | None:
    return next((node for node in graph.nodes if node.name == name), None)


def _tensors(tree: Any) -> list[TensorSpec]:
    leaves = pytree.tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]


def _written(specs: list[TensorSpec]) -> str:
    kinds = {spec.dtype for spec in specs}
    shapes = ", ".join(str(spec.shape) for spec in specs)
    return f"{shapes} ({', '.join(sorted(map(str, kinds)))})" if specs else "no tensors"
