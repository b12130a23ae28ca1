"""Finds the weight sites of a captured model: by operand and parameter identity, not by module class."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from fxsparse.core.arguments import check_decision
from fxsparse.core.graphs import attribute, has_effect, operand, operation_name
from fxsparse.core.operations import EMBEDDINGS, WEIGHTED
from fxsparse.core.records import Captured, SiteUse, Uncovered, WeightSite, record_of


@dataclass
class _Findings:
    """What the graphs do with one parameter."""

    uses: list[SiteUse] = field(default_factory=list)
    depthwise: list[bool] = field(default_factory=list)
    embeds: bool = False
    weights_of: list[str] = field(default_factory=list)
    enters_by: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def why_no_site(self) -> str | None:
        """The reason why this parameter cannot be masked, or None for a site."""
        if self.obstacles:
            return self.obstacles[0]
        if self.uses:
            return None
        if self.embeds:
            return "an embedding table"
        if self.weights_of:
            return f"the weight of {self.weights_of[0]} is computed from it"
        return f"enters by {self.enters_by[0]}" if self.enters_by else "not used in forward"


def find_sites(captured: Captured) -> tuple[list[WeightSite], list[Uncovered]]:
    """The sites in execution order, and every other matrix-shaped parameter with the reason it is none.

    A site is a Parameter with two or more dimensions that some call takes as the weight of a convolution,
    transposed convolution or linear. A parameter that reaches such a call only through other operations,
    that a module hides in its kernel, or that enters by another operation, is listed as not covered.
    """
    model = captured.model
    names: dict[int, list[str]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        parameters[id(parameter)] = parameter
    findings = {key: _Findings() for key in parameters}
    for mode, graph in captured.distinct_graphs():
        for node in graph.nodes:
            _note_node(model, mode, node, findings)

    sites: list[WeightSite] = []
    uncovered: list[Uncovered] = []
    for key, found in findings.items():
        parameter, (name, *aliases) = parameters[key], names[key]
        if parameter.ndim < 2:
            continue
        reason = found.why_no_site()
        if reason is not None:
            uncovered.append(Uncovered(name, tuple(parameter.shape), reason))
            continue
        sites.append(
            WeightSite(
                name=name,
                shape=tuple(parameter.shape),
                uses=tuple(found.uses),
                aliases=tuple(aliases),
                owner=type(model.get_submodule(name.rpartition(".")[0])),
                depthwise=all(found.depthwise),
                tied_embedding=found.embeds,
                frozen=not parameter.requires_grad,
            )
        )
    return sorted(sites, key=_execution_order(captured)), uncovered


def _execution_order(captured: Captured) -> Callable[[WeightSite], tuple[int, int]]:
    """Sort key: by first use in the eval graph; sites that only training uses come last."""
    position = {
        (mode, node.name): (rank, index)
        for rank, (mode, graph) in enumerate(captured.distinct_graphs())
        for index, node in enumerate(graph.nodes)
    }
    return lambda site: position[site.uses[0].mode, site.uses[0].node]


def _note_node(model: nn.Module, mode: str, node: fx.Node, findings: dict[int, _Findings]) -> None:
    """Adds what one node does with each parameter that it touches."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        for parameter in module.parameters():
            findings[id(parameter)].obstacles.append(f"hidden inside {type(module).__name__} {node.target}")
    if node.op not in ("call_function", "call_method", "call_module"):
        return
    changed = _changed_parameter(model, node)
    if changed is not None:
        findings[id(changed)].obstacles.append(f"changed in place by {operation_name(node)} in {_place(node)}")
    weight = _weight_operand(node)
    if weight is not None:
        parameter = _parameter(model, weight)
        if parameter is not None:
            operation = WEIGHTED[node.target]
            found = findings[id(parameter)]
            found.uses.append(SiteUse(mode, node.name, operation.name, record_of(node).module))
            groups = operand(node, 6, "groups") if operation.kernel_rank else 1
            found.depthwise.append((groups or 1) > 1 and parameter.shape[1] == 1)
        for key in _ancestors(model, weight) if weight.op != "get_attr" else ():
            findings[key].weights_of.append(f"{operation_name(node)} in {_place(node)}")
    for source in node.all_input_nodes:
        parameter = _parameter(model, source)
        if parameter is None or source is weight:
            continue
        found = findings[id(parameter)]
        if node.op == "call_function" and node.target in EMBEDDINGS:
            found.embeds = True
        else:
            found.enters_by.append(f"{operation_name(node)} in {_place(node)}")


def _weight_operand(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or node.target not in WEIGHTED:
        return None
    weight = operand(node, WEIGHTED[node.target].weight, "weight")
    return weight if isinstance(weight, fx.Node) else None


def _parameter(model: nn.Module, node: fx.Node) -> nn.Parameter | None:
    if node.op != "get_attr":
        return None
    value = attribute(model, str(node.target))
    return value if isinstance(value, nn.Parameter) else None


def _changed_parameter(model: nn.Module, node: fx.Node) -> nn.Parameter | None:
    """The parameter that an in-place operation changes, itself or through a view (`weight.data.clamp_()`)."""
    if node.op == "call_module" or not has_effect(node) or node.target is check_decision:
        return None
    changed = node.kwargs.get("out") or (node.args[0] if node.args else None)
    while isinstance(changed, fx.Node) and changed.op != "get_attr" and operation_name(changed) in VIEWS:
        changed = changed.args[0]
    return _parameter(model, changed) if isinstance(changed, fx.Node) else None


def _ancestors(model: nn.Module, node: fx.Node) -> set[int]:
    """Parameters (by id) from which the value of `node` is computed."""
    seen, open_nodes, found = {node}, [node], set()
    while open_nodes:
        current = open_nodes.pop()
        parameter = _parameter(model, current)
        if parameter is not None:
            found.add(id(parameter))
        if current.op == "call_module":
            found.update(id(p) for p in model.get_submodule(str(current.target)).parameters())
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        open_nodes.extend(fresh)
    return found


VIEWS = frozenset(
    """getattr getitem detach view view_as reshape flatten unflatten t transpose permute squeeze unsqueeze expand narrow
    select chunk split unbind diagonal swapaxes movedim as_strided""".split()
)
"""Operations whose result may share its first argument's storage."""


def _place(node: fx.Node) -> str:
    return record_of(node).module or "the model's forward"
