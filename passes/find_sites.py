"""Finds the weight sites of a captured model: by operand and parameter identity, not by module class."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from torch import fx, nn

from fxsparse.core.arguments import check_decision
from fxsparse.core.graphs import attribute, has_effect, operand, operation_name
from fxsparse.core.operations import EMBEDDINGS, PRODUCTS, WEIGHTED
from fxsparse.core.output_channels import input_channels, output_channels
from fxsparse.core.records import Captured, SiteUse, Uncovered, WeightSite, record_of
from fxsparse.core.weight_operands import WeightOperand, input_dependent, weight_operands
from fxsparse.core.weight_origin import Origin, origins_of, parameters_behind

from .annotate_shapes import annotate_shapes


@dataclass
class _Findings:
    """What the graphs do with one parameter."""

    uses: list[SiteUse] = field(default_factory=list)
    operands: list[tuple[WeightOperand, Origin]] = field(default_factory=list)
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
            return self.weights_of[0]
        return f"enters by {self.enters_by[0]}" if self.enters_by else "not used in forward"


def find_sites(captured: Captured) -> tuple[list[WeightSite], list[Uncovered]]:
    """The sites in execution order, and every other matrix-shaped parameter with the reason it is none.

    A site is a Parameter with two or more dimensions that some call takes as a weight
    (`core/weight_operands.py`), as it is or by way of what is made of it (`core/weight_origin.py`). A parameter that a
    module hides in its kernel, or that enters in no such way, is listed as not covered. Graphs without shapes get them.
    """
    model = captured.model
    if any(record_of(node).spec is None for _, graph in captured.distinct_graphs() for node in _with_values(graph)):
        annotate_shapes(captured)
    names: dict[int, list[str]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        parameters[id(parameter)] = parameter
    findings = {key: _Findings() for key in parameters}
    for mode, graph in captured.all_graphs():
        from_input = input_dependent(graph)
        for node in graph.nodes:
            _note_node(model, mode, node, from_input, findings)
    for name, reason in captured.units.hidden.items() if captured.units else ():
        findings[id(model.get_parameter(name))].obstacles.append(reason)

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
        matrix = _matrix(parameter, found.operands)
        output_dim, output_groups = output_channels(parameter, found.operands)
        input_dim, input_groups = input_channels(parameter, found.operands)
        owner = type(model.get_submodule(name.rpartition(".")[0]))
        sites.append(
            WeightSite(
                name=name,
                shape=tuple(parameter.shape),
                uses=tuple(found.uses),
                aliases=tuple(aliases),
                owner=owner,
                depthwise=all(item.groups > 1 and item.matrix[1] == 1 for item, _ in found.operands),
                tied_embedding=found.embeds,
                frozen=not parameter.requires_grad,
                matrix=matrix if matrix != tuple(parameter.shape) else (),
                form=_form(found.operands),
                looks_like_a_table=_looks_like_a_table(name, owner, found.uses),
                output_dim=output_dim,
                output_groups=output_groups,
                input_dim=input_dim,
                input_groups=input_groups,
            )
        )
    return sorted(sites, key=_execution_order(captured)), uncovered


def _with_values(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("get_attr", "call_module")]


def _execution_order(captured: Captured) -> Callable[[WeightSite], tuple[int, int]]:
    """Sort key: by first use in the eval graph; sites that only training uses come last."""
    position = {
        (mode, node.name): (rank, index)
        for rank, (mode, graph) in enumerate(captured.all_graphs())
        for index, node in enumerate(graph.nodes)
    }
    return lambda site: position[site.uses[0].mode, site.uses[0].node]


# -- one node -----------------------------------------------------------------------------------------------


def _note_node(
    model: nn.Module, mode: str, node: fx.Node, from_input: frozenset[fx.Node], findings: dict[int, _Findings]
) -> None:
    """Adds what one node does with each parameter that it touches."""
    if node.op == "call_module" and not record_of(node).opaque:
        module = model.get_submodule(str(node.target))
        for parameter in module.parameters():
            what = "of the normalisation" if isinstance(module, NORMS) else "hidden inside"
            findings[id(parameter)].obstacles.append(f"{what} {type(module).__name__} {node.target}")
    if node.op not in ("call_function", "call_method", "call_module"):
        return
    changed = _changed_parameter(model, node)
    if changed is not None:
        findings[id(changed)].obstacles.append(f"changed in place by {operation_name(node)} in {_place(node)}")
    weights = weight_operands(node, from_input)
    for weight in weights:
        _note_weight(model, mode, node, weight, findings)
    if node.target in WEIGHTED and not weights:
        computed = operand(node, WEIGHTED[node.target].weight, "weight")
        for parameter in parameters_behind(model, computed).values() if isinstance(computed, fx.Node) else ():
            reason = f"the weight of {operation_name(node)} in {_place(node)} is computed from it and from the input"
            findings[id(parameter)].weights_of.append(reason)
    taken = {weight.node for weight in weights}
    for source in node.all_input_nodes:
        if source.op != "get_attr" or source in taken:
            continue
        parameter = attribute(model, str(source.target))
        if not isinstance(parameter, nn.Parameter):
            continue
        found = findings[id(parameter)]
        if node.op == "call_function" and node.target in EMBEDDINGS:
            found.embeds = True
        else:
            found.enters_by.append(f"{operation_name(node)} in {_place(node)}")


def _note_weight(
    model: nn.Module, mode: str, node: fx.Node, weight: WeightOperand, findings: dict[int, _Findings]
) -> None:
    """Adds one weight of a node to the parameters from which it comes."""
    origins = origins_of(model, weight.node)
    of_whom = f"the weight of {operation_name(node)} in {_place(node)} is computed from it"
    behind = parameters_behind(model, weight.node)
    if isinstance(origins, str):
        for parameter in behind.values():
            findings[id(parameter)].weights_of.append(f"{of_whom}, and {origins}")
        return
    use = SiteUse(mode, node.name, weight.operation, record_of(node).module)
    roots = {origin.name for origin in origins}
    for name, parameter in behind.items():
        if name not in roots:
            findings[id(parameter)].weights_of.append(of_whom)
    for origin in origins:
        found = findings[id(behind[origin.name])]
        found.operands.append((weight, origin))
        if use not in found.uses:
            found.uses.append(use)


def _changed_parameter(model: nn.Module, node: fx.Node) -> nn.Parameter | None:
    """The parameter that an in-place operation changes, itself or through a view (`weight.data.clamp_()`)."""
    if node.op == "call_module" or not has_effect(node) or node.target is check_decision:
        return None
    changed = node.kwargs.get("out") or (node.args[0] if node.args else None)
    while isinstance(changed, fx.Node) and changed.op != "get_attr" and operation_name(changed) in VIEWS:
        changed = changed.args[0]
    if not isinstance(changed, fx.Node) or changed.op != "get_attr":
        return None
    value = attribute(model, str(changed.target))
    return value if isinstance(value, nn.Parameter) else None


VIEWS = frozenset(
    """getattr getitem detach view view_as reshape flatten unflatten t transpose permute squeeze unsqueeze expand narrow
    select chunk split unbind diagonal swapaxes movedim as_strided""".split()
)
"""Operations whose result may share its first argument's storage."""

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _place(node: fx.Node) -> str:
    return record_of(node).module or "the model's forward"


# -- what a site is like --------------------------------------------------------------------------------------


def _matrix(parameter: nn.Parameter, operands: list[tuple[WeightOperand, Origin]]) -> tuple[int, ...]:
    """`(out, in, *kernel)` of the weight: a matrix is one as a whole, of a bank it is one expert's."""
    matrix, size = tuple(operands[0][0].matrix), parameter.numel()
    if prod(matrix) == size or (parameter.ndim > 2 and prod(matrix) and size % prod(matrix) == 0):
        return matrix
    out, *rest = parameter.shape
    return (out, prod(rest)) if operands[0][0].operation not in CONVOLUTIONS else tuple(parameter.shape)


def _form(operands: list[tuple[WeightOperand, Origin]]) -> str:
    parts = ["used in parts"] if any(origin.is_part for _, origin in operands) else []
    for name, keeps in dict.fromkeys((origin.computed, origin.keeps_zeros) for _, origin in operands):
        if name:
            parts.append(f"computed by {name}" + ("" if keeps else ", where zeros do not stay"))
    return "; ".join(parts)


def _looks_like_a_table(name: str, owner: type, uses: list[SiteUse]) -> bool:
    words = name.rpartition(".")[2].lower().split("_")
    is_table = issubclass(owner, (nn.Embedding, nn.EmbeddingBag)) or not TABLE_WORDS.isdisjoint(words)
    return is_table and all(use.operation in FACTORS for use in uses)


CONVOLUTIONS = frozenset(operation.name for operation in WEIGHTED.values() if operation.kernel_rank)
FACTORS = frozenset([*(name.strip("_") for name in PRODUCTS), "rmatmul", "einsum"])
TABLE_WORDS = frozenset(
    "pos position positions positional rel relative embed embedding embeddings token tokens".split()
)
"""Words in the name of a parameter that is multiplied with the input, and that practitioners would not mask."""
