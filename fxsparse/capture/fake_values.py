"""Runs graph nodes on fake tensors: shapes, dtypes and strides without arithmetic or side effects.

The tracer uses it to know the value that a node has for the example, the shape pass to annotate nodes.
Parameters and buffers get one fake twin each, so that real ones (and BatchNorm's statistics) are never
touched, and memory does not depend on the model's size.
"""

import builtins
import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ..core.arguments import map_leaves
from ..core.graphs import attribute
from ..core.records import TensorSpec
from ..core.sharded_tensors import is_sharded

_plain_isinstance = isinstance
_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class FakeEvaluator:
    """Evaluates what a graph node stands for, on the fake twins of `root`'s tensors."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.running = False
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def twin(self, tensor: Tensor) -> Tensor:
        """The fake tensor that stands for a real one; the same for every call."""
        if id(tensor) not in self._twins:
            with self.apart():
                # The real tensor is kept beside its twin: an id is only unique among living objects.
                self._twins[id(tensor)] = (tensor, self.mode.from_tensor(_whole(tensor)))
        return self._twins[id(tensor)][1]

    def twins(self, tree: Any) -> Any:
        """`tree` with every real tensor in it replaced by its twin."""
        return map_leaves(lambda leaf: self.twin(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def run(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        """The value of one node, given the values of its arguments.

        Args:
            kind: an fx opcode except `placeholder` and `output`.
            target: the node's target.
            args, kwargs: values; tensors among them fake.
        """
        if kind == "get_attr":
            with self.apart():
                value = attribute(self.root, target)
            return self.twin(value) if isinstance(value, Tensor) else value
        with self.apart(), self.mode:
            if kind == "call_function":
                return _STRICT_ON_FAKE.get(target, target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            module = self.root.get_submodule(target)
            tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
            tensors |= dict(module.named_buffers(remove_duplicate=False))
            twins = {name: self.twin(tensor) for name, tensor in tensors.items()}
            try:
                return torch.func.functional_call(module, twins, args, kwargs, tie_weights=False)
            except ZeroDivisionError:  # BatchNorm in train mode, with one value a channel
                with _in_eval_mode(module):
                    return torch.func.functional_call(module, twins, args, kwargs, tie_weights=False)
            except DataDependentOutputException:  # BatchNorm(momentum=None) reads its counter
                if any(tensor.is_meta for tensor in tensors.values()):
                    raise
        return self._run_for_real(module, args, kwargs)

    def _run_for_real(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The value of a call that looks at contents, from a copy of the module and from zeros."""

        def zeros(leaf: Any) -> Any:
            if not isinstance(leaf, FakeTensor):
                return leaf
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).zero_()

        with self.apart(), torch.random.fork_rng(), torch.no_grad():
            args, kwargs = pytree.tree_map(zeros, (args, kwargs))
            return self.twins(copy.deepcopy(module)(*args, **kwargs))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While a value is computed, the tracer's patches stand aside, and BatchNorm takes batches of one."""
        before, self.running = self.running, True
        patched, builtins.isinstance = builtins.isinstance, _plain_isinstance  # no proxies here, and many calls
        try:
            with (
                mock.patch.object(nn.functional, "_verify_batch_size", lambda size: None),
                mock.patch.object(_LOG, "disabled", True),  # the error says it all, and forward may catch it
            ):
                yield
        finally:
            builtins.isinstance = patched
            self.running = before


def _whole(tensor: Tensor) -> Tensor:
    """Of a DTensor a plain tensor of its whole shape, without values."""
    if not is_sharded(tensor):
        return tensor
    own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return own.requires_grad_(tensor.requires_grad)


def _grouped_mm(input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    """`grouped_mm`, which takes any floating point for real, but half precision only on fake tensors."""
    half = torch._grouped_mm(input.bfloat16(), weight.bfloat16(), **kwargs)
    return half.to(input.dtype)


_STRICT_ON_FAKE = {torch._grouped_mm: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}


@contextmanager
def _in_eval_mode(root: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def example_tensors(example: tuple[tuple, dict[str, Any]]) -> Any:
    """Uninitialised tensors in the shapes of a captured example, for passes that only need shapes."""

    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)

    return map_leaves(tensor, example)
