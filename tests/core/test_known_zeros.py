"""What is known of zeros in storage saves the product, and is forgotten when it may no longer be true."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from fxsparse import apply_mask
from fxsparse.core import zeroing
from fxsparse.core.known_zeros import has_zeros, note_zeros

F = nn.functional


def zeroed(shape=(6, 5), dtype=torch.float32):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.4
    weight = nn.Parameter(torch.randn(shape, dtype=dtype).masked_fill(~mask, 0))
    note_zeros(weight, mask)
    return weight, mask


def test_a_weight_that_is_known_to_be_zeroed_is_not_copied():
    weight, mask = zeroed()
    assert apply_mask(weight, mask).data_ptr() == weight.data_ptr()
    weight = nn.Parameter(weight.detach().clone())
    assert apply_mask(weight, mask).data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    "write",
    [
        lambda weight, mask: weight.detach().add_(1.0),
        lambda weight, mask: nn.init.ones_(weight),
        lambda weight, mask: torch._foreach_add_([weight.detach()], 1.0),
        lambda weight, mask: setattr(weight, "data", torch.ones_like(weight)),
        lambda weight, mask: mask.logical_not_(),
        lambda weight, mask: mask.view(-1)[:3].fill_(False),
        lambda weight, mask: torch.optim.SGD([weight], lr=0.1).step(),
    ],
)
def test_it_is_forgotten_once_somebody_writes(write):
    weight, mask = zeroed()
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        write(weight, mask)
    assert not has_zeros(weight, mask)
    assert torch.equal(apply_mask(weight, mask), weight * mask)


def test_copies_and_what_is_loaded_are_other_tensors():
    weight, mask = zeroed()
    other, other_mask = copy.deepcopy((weight, mask))
    assert not has_zeros(other, other_mask)
    assert not has_zeros(other, mask) and not has_zeros(weight, other_mask)
    buffer = io.BytesIO()
    torch.save({"mask": mask}, buffer)  # nothing of it is saved along


def test_inference_tensors_have_no_version_and_are_multiplied():
    with torch.inference_mode():
        weight, mask = zeroed()
        assert not has_zeros(weight, mask)
        weight[~mask] = 1.0
        assert torch.equal(apply_mask(weight, mask), weight * mask)


@pytest.mark.parametrize("shape", [(24, 24, 1, 1), (24, 1, 3, 3)])
def test_it_has_the_strides_of_the_weight(shape):
    # Of dimensions of size one too: torch reads a memory format from them, and picks a kernel by it.
    mask = torch.rand(shape) > 0.5
    weight = torch.randn(shape).masked_fill(~mask, 0).to(memory_format=torch.channels_last)
    note_zeros(weight, mask)
    assert apply_mask(weight, mask).stride() == weight.stride()


@pytest.mark.parametrize("threads", [1, zeroing.FEW_THREADS + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gradient_masked_in_place_has_the_bits_of_one_that_is_chosen_from(dtype, threads, monkeypatch):
    weight, mask = zeroed((4, 3, 3, 3), dtype)
    values = torch.randn(weight.shape, dtype=dtype)
    values.view(-1)[::4] = torch.tensor([np.inf, -np.inf, np.nan, -0.0] * 7, dtype=dtype)[: len(values.view(-1)[::4])]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = values.clone().to(memory_format=layout)
        expected = torch.where(mask, given, 0)
        apply_mask(weight, mask, own_gradient=True).backward(given)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(weight.grad.view(bits), expected.view(bits))
        assert torch.equal(given.view(bits), expected.view(bits))  # in place
        weight.grad = None


def test_a_gradient_that_others_see_is_left_alone():
    weight, mask = zeroed()
    other = nn.Parameter(torch.randn_like(weight))
    (apply_mask(weight, mask) + other).square().sum().backward()
    assert (other.grad[~mask] != 0).all()
    assert (weight.grad[~mask] == 0).all() and (weight.grad[mask] == other.grad[mask]).all()


def test_second_derivatives_and_batching_take_the_plain_way():
    weight, mask = zeroed()
    x = torch.randn(3, 5)
    (first,) = torch.autograd.grad(
        F.linear(x, apply_mask(weight, mask, own_gradient=True)).pow(3).sum(), weight, create_graph=True
    )
    assert (first[~mask] == 0).all()
    (second,) = torch.autograd.grad(first.sum(), weight)
    plain = weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(x, plain * mask).pow(3).sum(), plain, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), plain)[0])
    rows = torch.func.vmap(lambda row: F.linear(row, apply_mask(weight, mask)))(x)
    torch.testing.assert_close(rows, F.linear(x, weight))
    each = torch.func.vmap(
        torch.func.grad(lambda w, row: F.linear(row, apply_mask(w, mask, own_gradient=True)).square().sum()),
        in_dims=(None, 0),
    )(weight, x)
    assert (each[:, ~mask] == 0).all() and (each[:, mask] != 0).any()


def test_without_gradients_there_is_a_product():
    """Averaged weights, say, that were put in place through `.data` for an evaluation."""
    weight, mask = zeroed()
    weight.data.copy_(torch.ones_like(weight))
    with torch.no_grad():
        assert torch.equal(apply_mask(weight, mask), mask.float())
