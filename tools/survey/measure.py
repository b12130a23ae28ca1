"""Takes one model through `fxsparse.sparsify` and puts it beside the eager model. Returns a row of plain data."""

import copy
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import fxsparse

from . import sets

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "distribution": "uniform",
    "verify": False,  # what it compares is compared here, and written down
    "semantics": {"preset": "paper", "initial_masks": "bernoulli"},  # quicker to draw than an exact number
}

BIG = 150_000_000
"""Parameters from which a model's gradients are not compared, to save memory."""

_HOLDERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_PRODUCTS = frozenset(
    """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm addmm baddbmm einsum
    __matmul__ __rmatmul__ mv addmv bilinear _grouped_mm grouped_mm""".split()
)


def measure(which: str, name: str) -> dict[str, Any]:
    """The row of one model.

    Returns:
        Plain data. `status` is `"captured"`, `"refused"` (an error of fxsparse) or `"failed"` (any other), with
        `reason`. Differences are relative to the largest magnitude of the tensor, 0 where all bits are the same;
        None where the model itself does not run that way.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)  # makes the pool anew after the fork, which autograd's threads must not do at once
    model, example = sets.build(which, name)
    row: dict[str, Any] = {"set": which, "model": name, "class": type(model).__name__}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    weights = weight_names(model, example)
    keys = list(model.state_dict()), [key for key, _ in model.named_parameters()]
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparse = fxsparse.sparsify(model, example, **OPTIONS)
    except Exception as error:
        known = isinstance(error, fxsparse.FxSparseError)
        reason = str(error).split("\n")[0] if known else f"{type(error).__name__}: {error}".split("\n")[0]
        seconds = time.perf_counter() - start
        return row | {"status": "refused" if known else "failed", "reason": reason, "seconds": round(seconds, 2)}
    row |= {"status": "captured", "mechanism": sparse.capture, "seconds": round(time.perf_counter() - start, 2)}
    row |= _coverage(model, sparse, weights)
    masks = {id(mask) for mask in sparse.masks.values()}  # one of a shared module has several names
    hidden = {name for name, buffer in sparse.named_buffers(remove_duplicate=False) if id(buffer) in masks}
    own = [key for key in sparse.state_dict() if key not in hidden]
    row["keys"] = own == keys[0] and [key for key, _ in sparse.named_parameters()] == keys[1]
    sparse.copy_to(model)  # from here on, the eager model with the masks multiplied in
    try:
        row["eval"] = _difference(model, sparse, example, train=False)
        row["other_batch"] = _other_batch(model, sparse, example)
        row["train"] = _difference(model, sparse, example, train=True)
    except Exception as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    row["notes"] = sparse.notes
    row["total_seconds"] = round(time.perf_counter() - began, 2)
    return row


# -- which parameters count --------------------------------------------------------------------------------


class _Products(TorchFunctionMode):
    """Notes which parameters enter a matrix product or convolution as its weight, by their memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {_memory(p): n for n, p in model.named_parameters() if p.ndim > 1 and p.numel()}
        self.found: set[str] = set()
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        operands = pytree.tree_leaves((args, dict(kwargs or {})))
        if name != "__get__":
            memories = [_memory(operand) for operand in operands if isinstance(operand, Tensor)]
            self.used.update(self.names[memory] for memory in memories if memory in self.names)
        if name in _PRODUCTS:
            if "conv" in name or name in ("linear", "bilinear"):  # a learned input is no weight
                operands = operands[1:]
            for operand in operands:
                if isinstance(operand, Tensor) and operand.ndim > 1 and _memory(operand) in self.names:
                    self.found.add(self.names[_memory(operand)])
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr()
        except NotImplementedError:  # inside vmap
            return None


def weight_names(model: nn.Module, example: Any) -> dict[str, int]:
    """Name -> number of elements of every convolution or linear weight, found without fxsparse.

    Those are parameters of two or more dimensions that a convolution, linear, attention or recurrent module holds
    (parametrized ones too, but not gains, which are longer than 1 in one dimension alone), and those that a run of
    the eager model uses as one. Left out are embedding tables,
    also where an output layer shares them, which keep their weights by default, and what no run uses at all.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    held = set()
    for prefix, module in model.named_modules():
        if isinstance(module, _HOLDERS):
            own = [*module.named_parameters(prefix, recurse=False)]
            own += [item for item in module.named_parameters(prefix) if ".parametrizations." in item[0]]
            held |= {id(parameter) for _, parameter in own if sum(size > 1 for size in parameter.shape) > 1}
    mode = _Products(model)
    state = copy.deepcopy([*model.buffers()])
    training = model.training
    try:
        with torch.no_grad(), mode:
            _call(model.eval(), example)
            try:
                _call(model.train(), example)
            except Exception:
                mode.used.update(mode.names.values())
    finally:
        model.train(training)
        for buffer, before in zip(model.buffers(), state, strict=True):
            buffer.data.copy_(before)
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and id(parameter) not in embeddings
        and name in mode.used
        and (id(parameter) in held or name in mode.found)
    }


def _coverage(model: nn.Module, sparse: Any, weights: Mapping[str, int]) -> dict[str, Any]:
    masked = set()
    for site in sparse.sites:
        masked |= {site.name, *site.aliases}
    missing = {name: count for name, count in weights.items() if name not in masked}
    reasons = {item.name: item.reason for item in sparse.uncovered}
    largest = sorted(missing, key=lambda name: -missing[name])
    total = sum(weights.values())
    return {
        "weights": total,
        "masked": total - sum(missing.values()),
        "unmasked": [f"{name}: {reasons.get(name, 'not listed')}" for name in largest[:5]],
        "silent": sum(name not in reasons for name in missing),
    }


# -- beside the eager model --------------------------------------------------------------------------------


def _call(model: nn.Module, example: Any) -> Any:
    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    example = pytree.tree_map(copied, example)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def _difference(model: nn.Module, sparse: nn.Module, example: Any, *, train: bool) -> float | None:
    """Of outputs; in train mode of buffers and gradients, too."""
    model.train(train)
    sparse.train(train)
    try:
        expected = list(tensors(_call(model, example)))
    except Exception:
        return None  # the model itself does not run in this mode
    actual = list(tensors(_call(sparse, example)))
    worst = _largest(expected, actual)
    if not train:
        return worst
    own = dict(sparse.named_buffers())
    worst = max(worst, _largest([b for _, b in model.named_buffers()], [own[n] for n, _ in model.named_buffers()]))
    if sum(parameter.numel() for parameter in model.parameters()) > BIG:
        return worst
    for outputs in (expected, actual):
        _loss(outputs).backward()
    ours = dict(sparse.named_parameters())
    masks = dict(sparse.masks)
    for name, parameter in model.named_parameters():
        wanted, got = parameter.grad, ours[name].grad
        if wanted is None or got is None:
            if wanted is not got:
                raise RuntimeError(f"the gradient of {name} is there in one of eager and graph only")
            continue
        if name in masks:
            wanted = torch.where(masks[name], wanted, 0)
        worst = max(worst, _largest([wanted], [got]))
    return worst


def _loss(outputs: list[Tensor]) -> Tensor:
    trained = [tensor for tensor in outputs if tensor.requires_grad and tensor.is_floating_point()]
    parts = [(tensor * torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)).mean() for tensor in trained]
    return torch.stack(parts).sum()


def _largest(expected: list[Tensor], actual: list[Tensor]) -> float:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in actual]:
        raise RuntimeError("outputs of other shapes than the eager model's")
    worst = 0.0
    for wanted, got in zip(expected, actual, strict=True):
        if not torch.equal(torch.nan_to_num(wanted.detach()), torch.nan_to_num(got.detach())):
            # as double: differences of halves and booleans count too
            wanted, got = wanted.detach().double(), got.detach().double()
            scale = wanted.abs().max().item() or 1.0
            worst = max(worst, ((wanted - got).abs().max() / scale).item())
    return worst


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested containers and output objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for item in vars(value).values():
            yield from tensors(item)


def _other_batch(model: nn.Module, sparse: nn.Module, example: Any) -> str:
    """Whether a batch of three comes out as from the eager model: `"same"`, `"refused: ..."` or `"differs"`."""
    larger = _resized(example)
    try:
        expected = list(tensors(_call(model, larger)))
    except Exception:
        return "the model itself takes no other"
    try:
        worst = _largest(expected, list(tensors(_call(sparse, larger))))
    except fxsparse.FxSparseError as error:
        return f"refused: {error}".split("\n")[0][:200]
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}".split("\n")[0][:200]
    return "same" if worst == 0 else f"differs by {worst:.2g}"


def _resized(example: Any) -> Any:
    if isinstance(example, tuple) and any(isinstance(item, list) for item in example):  # detection: lists of samples
        return tuple([*item, item[0]] if isinstance(item, list) else item for item in example)
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim]
    batch = sizes[0] if sizes else 0

    def larger(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
        return torch.cat([leaf, leaf[:1]]) if fits else leaf

    return pytree.tree_map(larger, example)


Measure = Callable[[str, str], dict[str, Any]]
