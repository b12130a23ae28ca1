"""Replaces calls of small modules, of which nothing is known, by what their forward does.

Capture keeps every module without a matrix-shaped parameter as one call, so that it behaves by itself in both
modes. Where such a module is the user's (or a `Sequential`), its operations are recorded here, so that an
analysis sees them. One that reads its training flag, keeps something or has hooks stays a call.
"""

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxsparse.capture.concrete_tracer import ConcreteTracer
from fxsparse.core.arguments import check_argument
from fxsparse.core.channel_rules import module_rule
from fxsparse.core.errors import FxSparseError
from fxsparse.core.records import Captured, TensorSpec, record_of, specs_of, update_record


def open_leaves(captured: Captured) -> bool:
    """Opens what can be opened in all graphs, which are annotated with shapes before and after.

    Returns:
        Whether anything changed.
    """
    changed = False
    model = captured.model
    modes = {module: module.training for module in model.modules()}
    try:
        for mode, graph in captured.distinct_graphs():
            nn.Module.train(model, mode == "train")
            for name, training in captured.flags.get(mode, {}).items():
                model.get_submodule(name).training = training
            for node in graph.find_nodes(op="call_module"):
                module = model.get_submodule(str(node.target))
                if _may_open(module):
                    changed |= _open(node, module)
    finally:
        for module, training in modes.items():
            module.training = training
    return changed


def _may_open(module: nn.Module) -> bool:
    if module_rule(type(module)) is not None or any(parameter.ndim > 1 for parameter in module.parameters()):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(inner, name) for inner in module.modules() for name in hooks):
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn.")


class _LeafTracer(ConcreteTracer):
    """Goes through the modules that nothing is known of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self.model and not _may_open(m)


def _open(node: fx.Node, module: nn.Module) -> bool:
    specs = fx.map_arg((node.args, node.kwargs), lambda source: record_of(source).spec)
    args, kwargs = pytree.tree_map(_example, specs, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))
    tracer = _LeafTracer(module)
    try:
        inner, changes = tracer.capture(args, kwargs)
    except FxSparseError:
        return False
    output = inner.output_node().args[0]
    if changes or tracer.modes_read or tracer.leaves_values or tracer.constants or not isinstance(output, fx.Node):
        return False
    placeholders = inner.find_nodes(op="placeholder")
    if node.kwargs or len(node.args) > len(placeholders) or any("*" in str(item.target) for item in placeholders):
        return False
    given = dict(zip(placeholders, node.args, strict=False))
    if any(item.users and item not in given and not item.args for item in placeholders):
        return False
    _inline(node, inner, output, given, tracer.results)
    return True


def _inline(node: fx.Node, inner: fx.Graph, output: fx.Node, given: dict[fx.Node, Any], values: dict) -> None:
    own: dict[fx.Node, Any] = {}
    for item in inner.nodes:
        if item.op == "output" or item.target is check_argument:
            continue
        if item.op == "placeholder":
            own[item] = given.get(item, item.args[0] if item.args else None)
            continue
        args, kwargs = fx.map_arg((item.args, item.kwargs), lambda source: own[source])
        path = record_of(node).module or str(node.target)
        with node.graph.inserting_before(node):
            target = f"{node.target}.{item.target}" if item.op in ("get_attr", "call_module") else item.target
            copy = node.graph.create_node(item.op, target, args, kwargs, name=f"{node.name}_{item.name}")
        copy.meta.clear()
        update_record(copy, module=path, spec=specs_of(values.get(item)))
        own[item] = copy
    node.replace_all_uses_with(own[output])
    node.graph.erase_node(node)


def _example(leaf: Any) -> Any:
    if not isinstance(leaf, TensorSpec):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)
