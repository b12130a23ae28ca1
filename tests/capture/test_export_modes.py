"""Modes of torch around or inside forward that an exported graph has no node for."""

import pytest
import torch

import fxsparse
from fxsparse.models.zoo.two_linears import net

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def inference_block(self, x):
    with torch.inference_mode():
        y = self.fc(x)
    return self.head(y.clone())


def decorated_inference(self, x):
    return self.head(torch.inference_mode()(self.fc)(x).clone())


@pytest.mark.parametrize("forward", [inference_block, decorated_inference])
def test_an_inference_region_gets_no_gradient_by_export_either(forward):
    with pytest.raises(fxsparse.CaptureError, match="inference_mode region"):
        fxsparse.sparsify(net(forward), ROWS, capture="export")
    with pytest.warns(fxsparse.FxSparseWarning, match="kept as one call"):
        sparse = fxsparse.sparsify(net(forward), ROWS)
    sparse(ROWS).sum().backward()
    assert sparse.get_parameter("fc.weight").grad is None and sparse.get_parameter("head.weight").grad is not None


def test_another_precision_than_that_of_the_capture_is_an_error_of_ours():
    def forward(self, x):
        return self.head(self.fc(x).to(x.dtype))

    sparse = fxsparse.sparsify(net(forward), ROWS, capture="export")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(fxsparse.InputError, match=r"fails: Tensor dtype mismatch.*capture under the precision"):
            sparse(ROWS)
        assert fxsparse.sparsify(net(forward), ROWS, capture="concrete")(ROWS).dtype == torch.bfloat16
        assert fxsparse.sparsify(net(forward), ROWS, capture="export")(ROWS).dtype == torch.bfloat16
