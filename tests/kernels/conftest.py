"""What computes: the operators, with whatever kernels there are, and the fallback by itself."""

import sys
from pathlib import Path

import pytest
import torch

from fxsparse.kernels import fallback, kernels_in_use

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["operators", "fallback"])
def ops(request):
    return torch.ops.fxsparse if request.param == "operators" else fallback


@pytest.fixture
def compiled():
    """Only with the C++ kernels; a machine without a compiler skips."""
    if kernels_in_use() == "torch.sparse":
        pytest.skip("no C++ kernels on this machine")
    return torch.ops.fxsparse
