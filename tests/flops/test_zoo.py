"""The hard small networks: everything in them has a rule, and the totals are PyTorch's own.

FlopCounterMode sees no products in fused kernels of the CPU (attention, LSTM), so those are switched off for it.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse.models.zoo import ZOO, call

CAPTURED = [name for name, case in ZOO.items() if case.refused is None]


NOT_SEEN = {"spectral_norm": 2 * (4 * 27 + 4)}
"""FLOPs of a product with a vector and one of two vectors, which PyTorch's counter leaves out."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CAPTURED)
def test_dense_macs_of(name):
    torch.manual_seed(0)
    model = ZOO[name].make().eval()
    report = fxsparse.count_flops(model, ZOO[name].example())
    assert not report.unknown
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call(model, ZOO[name].example())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert report.dense_flops == counter.get_total_flops() + NOT_SEEN.get(name, 0)
