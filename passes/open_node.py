"""Looks inside one call: runs it on fake tensors and adds up what it consists of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.capture.fake_values import FakeEvaluator
from fxsparse.core.aten_costs import aten_cost
from fxsparse.core.function_costs import FUNCTIONS, einsum_order
from fxsparse.core.records import TensorSpec


@dataclass(frozen=True)
class Opened:
    """What one call consists of.

    Attributes:
        macs: products of its contractions.
        other: FLOPs of everything else, by category.
        backward: MACs of its backward pass, for the gradients that are needed.
        unknown: operations without a rule, by name.
        detail: how it was counted, where there was a choice.
    """

    macs: int = 0
    other: Mapping[str, int] = field(default_factory=dict)
    backward: int = 0
    unknown: tuple[str, ...] = ()
    detail: str = ""


def open_call(
    evaluator: FakeEvaluator, kind: str, target: Any, args: tuple, kwargs: dict, trained: Sequence[bool]
) -> Opened:
    """Opens one call.

    Args:
        evaluator: runs calls on fake tensors.
        kind, target: the fx opcode and target.
        args, kwargs: arguments with a `TensorSpec` in place of every tensor.
        trained: whether each tensor among the arguments, in their order, needs a gradient.
    """
    counts = _Counts()
    with _plain_kernels():
        with evaluator.mode:
            values = _tensors_for((args, kwargs))
        with torch.no_grad(), _FunctionCounts(counts), _AtenCounts(counts):
            evaluator.run(kind, target, *values)
        backward = 0
        if counts.macs:
            backward = _backward_macs(evaluator, kind, target, args, kwargs, trained, counts)
    return Opened(counts.macs, counts.other, backward, tuple(sorted(counts.unknown)), counts.detail)


class _Counts:
    def __init__(self) -> None:
        self.macs = 0
        self.by_function = 0  # the part of `macs` that rules for whole functions gave
        self.other: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.detail = ""
        self.paused = False


class _AtenCounts(TorchDispatchMode):
    """Adds up the ATen operations that run inside it."""

    def __init__(self, counts: _Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counts.paused:
            return result
        cost = aten_cost(func, args, kwargs or {}, result)
        if cost is None:
            self.counts.unknown.add(str(func._overloadpacket))
        else:
            self.counts.macs += cost.macs
            for category, flops in cost.other.items():
                self.counts.other[category] = self.counts.other.get(category, 0) + flops
        return result


class _FunctionCounts(TorchFunctionMode):
    """Adds up the functions that have a rule of their own, and hides what they consist of from the other."""

    def __init__(self, counts: _Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTIONS.get(func)
        if rule is None:
            return func(*args, **kwargs)
        self.counts.paused = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.counts.paused = False
        macs = rule(args, kwargs, result)
        self.counts.macs += macs
        self.counts.by_function += macs
        if func is torch.einsum:
            operands = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args))
            if operands > 2:
                self.counts.detail = f"einsum of {operands} operands, contracted {einsum_order(operands)}"
        return result


def _backward_macs(
    evaluator: FakeEvaluator,
    kind: str,
    target: Any,
    args: tuple,
    kwargs: dict,
    trained: Sequence[bool],
    forward: _Counts,
) -> int:
    """MACs of the gradients that are needed: autograd runs on fake tensors, and its products are added up."""
    with evaluator.mode:
        flat, structure = pytree.tree_flatten(_tensors_for((args, kwargs)))
        flags = iter(trained)
        leaves = [t.requires_grad_() for t in flat if isinstance(t, Tensor) and next(flags) and t.is_floating_point()]
        # A call may change its arguments in place, which autograd refuses of leaves.
        flat = [t.clone() if isinstance(t, Tensor) and t.requires_grad else t for t in flat]
        args, kwargs = pytree.tree_unflatten(flat, structure)
    if forward.by_function == forward.macs and len(trained) <= 2:
        return forward.macs * len(leaves)
    counts = _Counts()
    counts.paused = True
    with torch.enable_grad(), _AtenCounts(counts):
        result = evaluator.run(kind, target, args, kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if kind == "call_module":
            module = evaluator.root.get_submodule(target)
            leaves += [evaluator.twin(p) for p in module.parameters() if p.requires_grad]
        if not outputs or not leaves:
            return 0
        counts.paused = False
        with evaluator.mode:
            torch.autograd.grad(
                outputs, leaves, [torch.ones_like(output) for output in outputs], allow_unused=True, retain_graph=False
            )
    return counts.macs


def _tensors_for(tree: Any) -> Any:
    """Fake tensors in the shapes of the specs; the evaluator's mode is on."""

    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)

    return pytree.tree_map(tensor, tree, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused kernels that would hide several operations behind one name."""
    fast_path, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    cudnn = torch._C._get_cudnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)
