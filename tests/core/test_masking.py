"""`apply_mask` and random masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import apply_mask
from fxsparse.core.masking import random_mask, seeded_generator


def gradient_of(weight, mask, dense):
    weight = weight.clone().requires_grad_()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    torch.nn.functional.linear(x, apply_mask(weight, mask, dense)).sum().backward()
    return weight.grad


def test_the_gradient_is_masked_on_ordinary_steps_and_dense_on_update_steps():
    weight = torch.tensor([[5.0, 6.0, 7.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(apply_mask(weight, mask), torch.tensor([[5.0, 0.0, 7.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(gradient_of(weight, mask, False), torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 3.0]]))
    assert torch.equal(gradient_of(weight, mask, True), torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))


def test_the_dense_gradient_is_taken_at_the_masked_weight():
    # loss = (w0 m0 + w1 m1)^2, so d loss / d w1 = 2 (w0 m0 + w1 m1) at the *masked* weight: 2 * 3, not 2 * 8.
    weight = torch.tensor([[3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    apply_mask(weight, mask, True).sum().pow(2).backward()
    assert torch.equal(weight.grad, torch.tensor([[6.0, 6.0]]))


def test_it_works_under_vmap_and_in_half_precision():
    weight, mask = torch.randn(4, 3, 2), torch.rand(4, 3, 2) > 0.5
    assert torch.equal(torch.vmap(apply_mask, in_dims=(0, 0, None))(weight, mask, False), weight * mask)
    assert apply_mask(weight.bfloat16(), mask).dtype == torch.bfloat16


@given(st.integers(1, 200), st.integers(1, 5), st.floats(0, 1), st.integers(0, 3))
def test_random_masks_have_exactly_floor_of_s_n_zeros(rows, columns, sparsity, seed):
    mask = random_mask(torch.Size((rows, columns)), sparsity, seeded_generator(seed, "site"))
    removed = mask.numel() - int(mask.sum())
    assert removed == pytest.approx(sparsity * mask.numel(), abs=1.0)
    assert removed <= sparsity * mask.numel() + 1e-6


def test_random_masks_depend_on_seed_and_name_alone():
    def draw(*key):
        return random_mask(torch.Size((100, 10)), 0.5, seeded_generator(*key))

    torch.manual_seed(1)
    first = draw(0, "mask", "a")
    torch.manual_seed(2)
    assert torch.equal(first, draw(0, "mask", "a"))
    assert not torch.equal(first, draw(1, "mask", "a"))
    assert not torch.equal(first, draw(0, "mask", "b"))


@pytest.mark.parametrize("shape", [(24, 24, 1, 1), (24, 1, 3, 3), (8, 4, 3, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_masked_weight_has_the_strides_of_the_weight(shape, memory_format):
    # Also of dimensions of size one: torch reads a memory format from them, and picks a kernel by it.
    weight = torch.randn(shape).to(memory_format=memory_format)
    mask = torch.rand(shape) > 0.5
    assert apply_mask(weight, mask).stride() == weight.stride()
    assert torch.equal(apply_mask(weight, mask), weight * mask)
