"""`apply_mask`, the one operation that fxsparse puts into a graph, and the masks it is given.

A plain `weight * mask` cannot train RigL: its backward pass gives positions outside the mask no gradient,
and those gradients are what RigL grows by. `apply_mask` multiplies in the forward pass and lets a flag
decide what the backward pass hands to `weight.grad`: the masked gradient on ordinary steps, the dense
gradient (the loss gradient with respect to the *masked* weight, at all positions) on update steps.

Between rewirings the stored weight is 0 already wherever the mask is False, and stays so. Where that is known
(`known_zeros`) the product is the weight itself, and the forward pass costs nothing.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from .host import is_traced
from .known_zeros import has_zeros, note_masked
from .packed_masks import unpack_mask
from .sharded_tensors import MAGNITUDE, gathered_weight, is_sharded
from .zeroing import zero_outside_

STORED = ("stored", "stored magnitude")
"""Values of the gate under which the weight is read as it is stored, and gets the gradient of every position."""


class _MaskedWeight(torch.autograd.Function):
    """weight, mask -> weight * mask, or the stored weight; backward masks the gradient unless `dense_gradient`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, dense_gradient: bool | str, own: bool) -> Tensor:
        if dense_gradient in STORED:
            return weight.clone(memory_format=torch.preserve_format)
        product = weight * unpack_mask(mask, weight.shape)
        # Of a dimension of size one the product may have another stride than the weight, and a convolution then
        # takes another kernel, whose sums differ in the last bit.
        same_memory = all(
            n == 1 or a == b for n, a, b in zip(weight.shape, product.stride(), weight.stride(), strict=True)
        )
        if same_memory and product.stride() != weight.stride():
            product = product.as_strided(weight.shape, weight.stride())
        return product

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, mask, ctx.dense_gradient, ctx.own = inputs
        if not ctx.dense_gradient:
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.dense_gradient in MAGNITUDE:
            return gradient.abs(), None, None, None
        if ctx.dense_gradient:
            return gradient, None, None, None
        (stored,) = ctx.saved_tensors
        mask = unpack_mask(stored, gradient.shape)
        if ctx.own and _is_plain(gradient):
            zero_outside_(gradient, mask)  # while it is in the cache
            note_masked(gradient, stored)
            return gradient, None, None, None
        return torch.where(mask, gradient, 0), None, None, None  # a product would turn infinite gradients into NaN


class _StoredWeight(torch.autograd.Function):
    """The same for a weight that is 0 where it is masked out: in its own memory, of its very strides.

    In a form that takes a sixth of the time to call, and that function transforms do not accept.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, dense_gradient: bool | str, own: bool) -> Tensor:
        _MaskedWeight.setup_context(ctx, (weight, mask, dense_gradient, own), None)
        return torch.ops.aten.alias(weight)

    backward = _MaskedWeight.backward


def _is_plain(gradient: Tensor) -> bool:
    """Whether nobody compiles, differentiates or batches the backward pass."""
    return not torch.is_grad_enabled() and type(gradient) is Tensor and not is_traced(gradient)


def apply_mask(
    weight: Tensor, mask: Tensor, dense_gradient: bool | str = False, *, own_gradient: bool = False
) -> Tensor:
    """The masked weight, `weight * mask`, as the convolutions and linears of a sparse graph see it.

    Args:
        weight: any shape, floating point.
        mask: bool, the same shape, or its bits (`packed_masks`); True keeps a position. A sharded one is known to be in
            the weight already.
        dense_gradient: whether `weight` receives the gradient of every position (update steps) or only
            that of the active ones. A plain Python value, so that a compiler sees two variants and no more.
            `"magnitude"` gives the absolute value at every position: what accumulates over micro-batches, and is
            averaged over replicas, is then the magnitude. `"stored"` and `"stored magnitude"` are as True and
            `"magnitude"`, of the weight as it is stored: what stands at inactive positions takes part.
        own_gradient: whether the gradient that comes back is made for this call alone, as that of a convolution's or
            a linear's weight is (that of a sum is its other term's too); it is then masked in place.

    Returns:
        A tensor of the weight's shape and dtype: the weight's own memory where gradients are recorded and the weight is
        known to be 0 where it is masked out, or where the mask is sharded; else a new one.
    """
    if is_sharded(mask):
        return gathered_weight(weight, dense_gradient)
    # Without gradients (an evaluation) and on update steps, whose gradients reach every position, weights may come by
    # ways that nobody sees; the product is rare there.
    trusted = torch.is_grad_enabled() and not dense_gradient and not is_traced(weight) and has_zeros(weight, mask)
    function = _StoredWeight if trusted else _MaskedWeight
    return function.apply(weight, mask, dense_gradient, own_gradient)


def floor_count(fraction: float, count: int) -> int:
    """`floor(fraction * count)`, with the product taken as the number that was meant.

    `0.29 * 100` is 28.999999999999996 in floating point; the answer is 29. Only products that are an
    integer up to the rounding of a few operations are affected.
    """
    product = fraction * count
    nearest = round(product)
    if abs(product - nearest) <= 1e-9 + 1e-13 * abs(product):
        return nearest
    return math.floor(product)


def ceil_count(fraction: float, count: int) -> int:
    """`ceil(fraction * count)`, with the product taken as the number that was meant, as in `floor_count`."""
    return -floor_count(-fraction, count)


def seeded_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator whose stream depends on `seed` and `labels` alone.

    Every random choice of fxsparse draws from one of these, keyed by what is chosen (a site's name, a
    step), so that it does not depend on the order of the sites, the device, the rank or the user's own
    random numbers.
    """
    key = "/".join(str(part) for part in (seed, *labels)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))


def random_mask(shape: torch.Size, sparsity: float, generator: torch.Generator) -> Tensor:
    """A bool mask with exactly `floor(sparsity * numel)` positions False, drawn without replacement (CPU)."""
    mask = torch.ones(shape, dtype=torch.bool)
    removed = floor_count(sparsity, mask.numel())
    if removed:
        narrow = torch.int32 if mask.numel() < 2**31 else torch.int64  # the same permutation, in half the memory
        order = torch.randperm(mask.numel(), generator=generator, dtype=narrow)
        mask.view(-1).numpy()[order[:removed].numpy()] = False
    return mask


def bernoulli_mask(shape: torch.Size, sparsity: float, generator: torch.Generator) -> Tensor:
    """A bool mask whose positions are False with probability `sparsity`, each by itself (CPU)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) >= sparsity


def initial_mask(
    weight: Tensor, sparsity: float, generator: torch.Generator, bernoulli: bool = False, layout: Any = None
) -> Tensor:
    """A random mask (bool) of a weight, on its device; on the meta device without values.

    Args:
        sparsity: the fraction that is masked out, exactly, or with `bernoulli` in expectation.
        layout: the weight's units (`UnitLayout`) where they are not its elements; they are masked as one.
    """
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.bool)
    draw = bernoulli_mask if bernoulli else random_mask
    if layout is None:
        return in_format_of(weight, draw(weight.shape, sparsity, generator))
    return in_format_of(weight, layout.spread(draw(torch.Size(layout.grid), sparsity, generator)))


def in_format_of(weight: Tensor, mask: Tensor) -> Tensor:
    """A copy of a mask on the weight's device and in its memory format: what reads both reads them in one order."""
    return torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(mask)
