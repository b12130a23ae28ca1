"""Makes layers of torch show their weights while they are traced, where they would hide them in one call.

`nn.MultiheadAttention` and `F.multi_head_attention_forward` are recorded as the projections, products and
rearrangements that they consist of. A GRU, LSTM or RNN is one call of torch's function for it, which takes all
weights in a list. The older spectral norm is one call too (`weight_hooks.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from .weight_hooks import recorded_compute_weight


@contextmanager
def weights_shown(tracer: Any) -> Iterator[None]:
    """For the time of a trace; see the head of this file."""
    plain_attention, plain_mask = F.multi_head_attention_forward, F._canonical_mask

    def canonical_mask(mask: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(mask, Tensor) or isinstance(mask, fx.Proxy) or tracer.own_proxy(mask) is not None:
            return plain_mask(mask, *args, **kwargs)
        with tracer.values.apart():  # a constant: it is made additive in place, once and for all
            return plain_mask(mask, *args, **kwargs)

    def attention(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(F, "has_torch_function", _never):  # else it would be recorded as a whole
            return plain_attention(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "multi_head_attention_forward", attention))
        stack.enter_context(mock.patch.object(F, "_canonical_mask", canonical_mask))
        # Kernels for inference take all weights of a layer, and their sums differ in the last bits.
        stack.enter_context(fast_path_off())
        # A recurrent layer keeps a list of its weights beside them; anew, it holds what a parametrization computes.
        stack.enter_context(mock.patch.object(nn.RNNBase, "_flat_weights", property(_weights_of), create=True))
        stack.enter_context(mock.patch.object(nn.RNNBase, "_update_flat_weights", _nothing))
        stack.enter_context(mock.patch.object(SpectralNorm, "compute_weight", recorded_compute_weight))
        yield


@contextmanager
def fast_path_off() -> Iterator[None]:
    """Without the fused kernels that torch takes for attention in eval mode, where nothing needs a gradient."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _weights_of(layer: nn.RNNBase) -> list[Any]:
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


_never: Callable[[Any], bool] = lambda tensors: False  # noqa: E731
_nothing: Callable[[nn.RNNBase], None] = lambda layer: None  # noqa: E731
