"""Replaces self-attention by `nn.MultiheadAttention` with the operations that it consists of.

The module hides its projections in one call; written out, its heads can be seen and removed, and its input's
channels are read by a weight like any other's. Only the plain case is written out: query, key and value are the same
tensor (N, T, E), batch first, without masks, extra keys, dropout or returned weights. Others stay a call.
"""

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxsparse.core.graphs import operation_name
from fxsparse.core.records import Captured, record_of, update_record


def open_attention(captured: Captured) -> bool:
    """Writes out what can be in all graphs; shapes have to be annotated anew.

    Returns:
        Whether anything changed.
    """
    changed = False
    for _, graph in captured.distinct_graphs():
        for node in graph.find_nodes(op="call_module"):
            module = captured.model.get_submodule(str(node.target))
            if type(module) is nn.MultiheadAttention and _is_plain(node, module):
                _open(node, module)
                changed = True
    return changed


def _is_plain(node: fx.Node, module: nn.MultiheadAttention) -> bool:
    named: dict[str, Any] = dict(zip(("query", "key", "value"), node.args, strict=False)) | dict(node.kwargs)
    tensors = {named.pop(name, None) for name in ("query", "key", "value")}
    returns_weights = named.pop("need_weights", True)
    named.pop("average_attn_weights", None)
    users = [user for user in node.users if not (operation_name(user) == "getitem" and user.args[1] == 0)]
    spec = record_of(node.args[0]).spec if node.args else None
    has_hooks = any(getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
    return (
        len(node.args) <= 3
        and len(tensors) == 1
        and isinstance(next(iter(tensors)), fx.Node)
        and spec is not None
        and len(spec.shape) == 3
        and not any(named.values())
        and (not returns_weights or not any(user.users for user in users))
        and all(operation_name(user) == "getitem" for user in users)
        and module.batch_first
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and module.dropout == 0.0
        and not has_hooks
    )


def _open(node: fx.Node, module: nn.MultiheadAttention) -> None:
    graph, path = node.graph, str(node.target)
    size = module.embed_dim // module.num_heads

    def parameter(name: str, tensor: Any) -> fx.Node | None:
        return None if tensor is None else graph.create_node("get_attr", f"{path}.{name}")

    with graph.inserting_before(node):
        weights = parameter("in_proj_weight", module.in_proj_weight), parameter("in_proj_bias", module.in_proj_bias)
        joined = graph.call_function(F.linear, (node.args[0], *weights))
        parted = graph.call_method("unflatten", (joined, -1, (3, module.num_heads, size)))
        moved = graph.call_method("permute", (parted, 2, 0, 3, 1, 4))
        query, key, value = (graph.call_function(operator.getitem, (moved, part)) for part in range(3))
        heads = graph.call_function(F.scaled_dot_product_attention, (query, key, value))
        rows = graph.call_method("flatten", (graph.call_method("transpose", (heads, 1, 2)), 2))
        weights = parameter("out_proj.weight", module.out_proj.weight), parameter("out_proj.bias", module.out_proj.bias)
        result = graph.call_function(F.linear, (rows, *weights))
    current = result
    while current is not node.args[0] and current.prev.op != "root":
        if not current.meta:
            update_record(current, module=path)
        current = current.prev
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
