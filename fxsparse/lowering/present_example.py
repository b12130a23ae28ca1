"""The example of a capture, for a module that has been converted to another dtype since."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..core.records import TensorSpec, record_of


def present_example(example: Any, module: nn.Module, graph: fx.Graph) -> Any:
    """The example in the module's present dtype: `sparse.double()` and `.to(torch.bfloat16)` take other inputs.

    Leaves it as it is where the parameters had, or have, several floating dtypes: which input would follow which of
    them is not known.

    Args:
        example: of specs.
        graph: of the capture, whose nodes say what dtype the parameters had.
    """
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    specs = [record_of(node).spec for node in graph.find_nodes(op="get_attr") if str(node.target) in names]
    before = _floating({spec.dtype for spec in specs if isinstance(spec, TensorSpec)})
    now = _floating({parameter.dtype for parameter in module.parameters()})
    if len(before) != 1 or len(now) != 1 or before == now:
        return example
    [old], [new] = before, now

    def converted(leaf: Any) -> Any:
        return replace(leaf, dtype=new) if isinstance(leaf, TensorSpec) and leaf.dtype == old else leaf

    return pytree.tree_map(converted, example, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))


def _floating(dtypes: set[torch.dtype]) -> set[torch.dtype]:
    return {dtype for dtype in dtypes if dtype.is_floating_point}
