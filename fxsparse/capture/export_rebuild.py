"""Rebuilds what `torch.export` gives as a graph of ordinary nodes over the model's own module tree.

Export hands over a flat graph: every parameter, buffer and constant an argument, arguments and outputs without
their containers, regions as graphs of their own. Here the tensors get the model's names back, arguments and outputs
the form that forward has, and a `no_grad` region becomes what it does: its operands are detached.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..core.arguments import check_argument, structure_of
from ..core.graphs import attribute, drop_unused_arithmetic
from .export_guards import Refusal
from .export_sizes import SizeChecks
from .export_translation import is_operator, torch_call
from .fake_values import FakeEvaluator
from .no_grad_regions import IN_PLACE, storages, written_operands


class ExportRebuilder:
    """Writes a graph of ordinary nodes, node by node, each run once on fake tensors of the example's sizes."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, refused: Refusal) -> None:
        self.model = model
        self.program = program
        self.refused = refused
        self.graph = fx.Graph()
        self.values = FakeEvaluator(model)
        self.results: dict[fx.Node, Any] = {}
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self._attributes: dict[str, fx.Node] = {}
        self._assigned: dict[fx.Node, fx.Node] = {}
        self._outside: set[int] = set()  # memory that a no_grad region may not change

    def graph_of(self, example: Any) -> fx.Graph:
        leaves = self._arguments(example)
        inputs: dict[fx.Node, Any] = {}
        targets: dict[fx.Node, str] = {}
        checks = SizeChecks(self.graph)
        placeholders = self.program.graph.find_nodes(op="placeholder")
        remaining = iter(leaves)
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                name, own = next(remaining)
                inputs[node] = own
                if isinstance(node.meta.get("val"), Tensor):
                    checks.add_input(own, node.meta["val"], name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                targets[node] = str(spec.target)
            else:
                raise self.refused(f"the input {spec.target} is a {spec.kind.name.lower()}")
        checks.finish()
        self._write_checks()
        for node, target in targets.items():
            inputs[node] = self._attribute(target, node)
        self._read_before_assignment(inputs)
        outputs = self._run(self.program.graph_module, inputs)
        specs = self.program.graph_signature.output_specs
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in specs):
            raise self.refused("torch.export turned a change in place into an output")
        tree = pytree.tree_unflatten(list(outputs), self.program.call_spec.out_spec)
        self.graph.output(self._container(tree))
        drop_unused_arithmetic(self.graph)
        return self.graph

    # -- arguments and outputs ----------------------------------------------------------------------------

    def _arguments(self, example: Any) -> list[tuple[str, Any]]:
        """A placeholder for every parameter of forward; name and node of every leaf of the example, in order."""
        for parameter in example.signature.parameters.values():
            self._placeholder(parameter, example.arguments)
        leaves, _ = pytree.tree_flatten_with_path(dict(example.arguments))
        found: list[tuple[str, Any]] = []
        nodes = {str(node.target).lstrip("*"): node for node in self.graph.nodes if node.op == "placeholder"}
        steps: dict[tuple, fx.Node] = {(): None}  # type: ignore[dict-item]
        for path, leaf in leaves:
            name: str = path[0].key  # type: ignore[attr-defined]
            node = nodes[name]
            if isinstance(leaf, Tensor):
                for length, key in enumerate(path[1:], 2):
                    if path[:length] not in steps:
                        steps[path[:length]] = self._step(node, key)
                    node = steps[path[:length]]
            found.append((name + pytree.keystr(path[1:]), node if isinstance(leaf, Tensor) else leaf))
        return found

    def _step(self, node: fx.Node, key: Any) -> fx.Node:
        if isinstance(key, pytree.GetAttrKey):
            return self._call("call_function", getattr, (node, key.name), {})
        return self._call(
            "call_function", operator.getitem, (node, key.key if isinstance(key, pytree.MappingKey) else key.idx), {}
        )

    def _placeholder(self, parameter: Any, arguments: dict[str, Any]) -> None:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        has_default = not stars and parameter.default is not parameter.empty
        optional = has_default or parameter.kind is parameter.KEYWORD_ONLY
        default = parameter.default if has_default else None
        is_given = parameter.name in arguments
        value = arguments.get(parameter.name, {"*": (), "**": {}}.get(stars, default))
        if has_default and not _is_plain(default):
            if not is_given:
                raise self.refused(f"the default of {parameter.name} is a {type(default).__name__}")
            default = None
        node = self.graph.create_node(
            "placeholder", stars + parameter.name, (default,) if optional else (), {}, parameter.name
        )
        self.results[node] = self.values.twins(value)
        if optional or not isinstance(value, Tensor):
            self.graph.call_function(check_argument, (node, structure_of(value), parameter.name))

    def _write_checks(self) -> None:
        """Values of the nodes that the checks consist of."""
        for node in self.graph.nodes:
            if node not in self.results and node.op != "placeholder":
                self.results[node] = self._evaluate(node)

    def _container(self, tree: Any) -> Any:
        """Output leaves in the containers of forward; a class is made by a node that calls it."""
        if isinstance(tree, (fx.Node, int, float, str, bool, type(None), torch.dtype, torch.device)):
            return tree
        if type(tree) in (list, tuple):
            return type(tree)(self._container(item) for item in tree)
        if type(tree) is dict:
            return {key: self._container(item) for key, item in tree.items()}
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return self.graph.call_function(type(tree), tuple(self._container(item) for item in tree))
        if isinstance(tree, dict):
            items = {key: self._container(item) for key, item in tree.items()}
            is_record = hasattr(tree, "__dataclass_fields__")
            return self.graph.call_function(type(tree), () if is_record else (items,), items if is_record else {})
        if hasattr(tree, "__dataclass_fields__"):
            fields = {name: self._container(getattr(tree, name)) for name in tree.__dataclass_fields__}
            return self.graph.call_function(type(tree), (), fields)
        raise self.refused(f"forward returns a {type(tree).__name__}")

    # -- the model's own tensors --------------------------------------------------------------------------

    def _attribute(self, target: str, node: fx.Node) -> fx.Node | None:
        """The node that reads a parameter, buffer or constant, under the first of its names; None if unused."""
        if not node.users:
            return None
        tensor = self._tensor(target)
        name = self._names.get(id(tensor))
        if name is None:
            name = self._constant(tensor, target, is_fresh=all(user.target is _FRESH for user in node.users))
        if name not in self._attributes:
            own = self._attributes[name] = self.graph.create_node("get_attr", name)
            own.meta["nn_module_stack"] = {"": (name.rpartition(".")[0], None)}
            self.results[own] = self.values.twin(tensor)
        return self._attributes[name]

    def _tensor(self, target: str) -> Tensor:
        value: Any = self.model
        for atom in target.split("."):
            value = getattr(value, atom, None)
        return value if isinstance(value, Tensor) else self.program.constants[target]

    def _constant(self, tensor: Tensor, target: str, is_fresh: bool) -> str:
        """The name of a tensor that is neither parameter nor buffer: an attribute's own, or a new one.

        What forward makes anew at every call (`is_fresh`) is never changed, so both modes read the same constant.
        """
        owner, _, attribute = target.rpartition(".")
        try:
            if self.model.get_submodule(owner).__dict__.get(attribute) is tensor:
                return target
        except AttributeError:
            pass
        if tensor.requires_grad:
            raise self.refused("a tensor that is not in the model takes part, and it has a gradient")
        taken = self.model.__dict__
        for name, other in taken.items() if is_fresh else ():
            if name.startswith("_tensor_constant") and _is_equal(other, tensor):
                return name
        name = next(f"_tensor_constant{i}" for i in range(len(taken) + 1) if f"_tensor_constant{i}" not in taken)
        self.model.__dict__[name] = tensor
        self._names[id(tensor)] = name
        return name

    def _read_before_assignment(self, inputs: dict[fx.Node, Any]) -> None:
        """A buffer that forward assigns is read from a copy, since the new value is written into it at the end."""
        for node in reversed(self.program.graph.nodes):
            if node.op == "output":
                continue
            if node.target is not torch.ops.aten.copy_.default or node.args[0].op != "placeholder":
                break
            buffer = node.args[0]
            if getattr(inputs[buffer], "op", "") != "get_attr" or sum(map(_changes_first, buffer.users)) > 1:
                continue
            self._assigned[node] = inputs[buffer]
            if len(buffer.users) > 1:
                inputs[buffer] = self._call("call_method", "clone", (inputs[buffer],), {}, like=node)

    # -- nodes --------------------------------------------------------------------------------------------

    def _run(self, module: fx.GraphModule, environment: dict[fx.Node, Any]) -> Any:
        """Writes the nodes of one (sub)graph; `environment` says what its placeholders are."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                environment[node] = getattr(module, str(node.target))
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), environment.__getitem__)
            if node in self._assigned:
                args = (self._assigned[node], *args[1:])
                if self.results[args[1]].requires_grad:
                    raise self.refused(
                        f"forward assigns the buffer {args[0].target} anew, with a value that has a gradient; assign "
                        "its detach()"
                    )
            if node.op == "output":
                return args[0]
            environment[node] = self._written(node, args, kwargs)
        raise AssertionError("a graph without output")

    def _written(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._region(node, args, kwargs)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]  # a region's output
        if self._outside and is_operator(node) and self._outside & self._written_memory(node, args, kwargs):
            raise self.refused(IN_PLACE)
        if node.target is torch.ops.aten.detach_.default and _is_fresh(node.args[0]):
            return args[0]
        candidates = [("call_function", node.target, args, kwargs)]
        if is_operator(node):
            translated = torch_call(node.target, args, kwargs)
            candidates[:0] = [translated] if translated is not None else []
        for position, call in enumerate(candidates):
            own = self._call(*call, name=node.name, like=node, final=position == len(candidates) - 1)
            if own is not None:
                return own
        raise AssertionError

    def _call(
        self,
        kind: str,
        target: Any,
        args: tuple,
        kwargs: dict[str, Any],
        name: str | None = None,
        like: fx.Node | None = None,
        final: bool = True,
    ) -> Any:
        """A new node with its value; None where it does not give what `like` gave, unless there is no other way."""
        own = self.graph.create_node(kind, target, args, kwargs, name)
        try:
            value = self.results[own] = self._evaluate(own)
        except Exception:
            self.graph.erase_node(own)
            if final:
                raise
            return None
        if like is not None:
            own.meta["nn_module_stack"] = {"": (_module_of(like), None)}
            if not final and not _same_kind(value, like.meta.get("val")):
                self.graph.erase_node(own)
                return None
        return own

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.results.__getitem__)
        return self.values.run(node.op, node.target, args, kwargs)

    def _region(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A `no_grad` region, written as what it does: its operands are detached, so nothing in it has a gradient.

        What such a region changes in place would lose its history, which eager keeps; only buffers have none.
        """
        name = str(node.target)
        if name != "wrap_with_set_grad_enabled":
            reason = "an autocast region" if "autocast" in name else f"a region of {name}"
            raise self.refused(f"{reason} inside forward cannot be kept in a graph")
        enabled, module, *operands = args
        if enabled:
            raise self.refused("an enable_grad region inside a no_grad region cannot be kept in a graph")
        environment = {
            placeholder: self._call("call_method", "detach", (operand,), {}, like=node)
            if isinstance(operand, fx.Node) and isinstance(self.results[operand], Tensor)
            else operand
            for placeholder, operand in zip(module.graph.find_nodes(op="placeholder"), operands, strict=True)
        }
        before = self._outside
        if not before:  # in a region within a region, what the outer one has made may be changed
            values = [self.results[operand] for operand in operands if isinstance(operand, fx.Node)]
            buffers = [self.results[own] for own in self._attributes.values() if not self._is_parameter(own)]
            self._outside = storages(values) - storages(buffers)
        try:
            return self._run(module, environment)
        finally:
            self._outside = before

    def _is_parameter(self, node: fx.Node) -> bool:
        return isinstance(attribute(self.model, str(node.target)), nn.Parameter)

    def _written_memory(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> set[int]:
        changed = list(written_operands(node.target, args, kwargs))  # type: ignore[arg-type]
        return storages(fx.map_arg(changed, self.results.__getitem__))


_FRESH = torch.ops.aten.lift_fresh_copy.default
"""The copy of a constant that forward makes by `torch.tensor(...)`."""


def _is_fresh(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is _FRESH


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _changes_first(node: fx.Node) -> bool:
    return is_operator(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _module_of(node: fx.Node) -> str:
    """Qualified name of the submodule that made a node; export marks repeated calls with `@1`."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("@")[0]


def _same_kind(value: Any, expected: Any) -> bool:
    """Whether a value has the sizes and dtypes that export has found for it."""
    if isinstance(expected, Tensor):
        return (
            isinstance(value, Tensor)
            and value.dtype == expected.dtype
            and value.ndim == expected.ndim
            and all(_hint(b) in (None, a) for a, b in zip(value.shape, expected.shape, strict=True))
        )
    if isinstance(expected, (tuple, list)):
        return len(value) == len(expected) and all(map(_same_kind, value, expected))
    return True


def _hint(size: Any) -> Any:
    """The example's size; None where there is none."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else None
