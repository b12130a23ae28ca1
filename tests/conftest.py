"""Settings for all tests."""

import dataclasses
import os
from collections.abc import Mapping

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def assert_same():
    """Compares outputs of any structure: tensors bit for bit, everything else by `==`."""
    return _assert_same


def _assert_same(expected, actual):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, Mapping):
        assert type(actual) is type(expected) and list(actual) == list(expected)
        for key in expected:
            _assert_same(expected[key], actual[key])
    elif isinstance(expected, (tuple, list)):
        kind = tuple if isinstance(expected, torch.Size) else type(expected)
        assert isinstance(actual, kind) and len(actual) == len(expected)
        for item, other in zip(expected, actual, strict=True):
            _assert_same(item, other)
    elif dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected)
        for field in dataclasses.fields(expected):
            _assert_same(getattr(expected, field.name), getattr(actual, field.name))
    else:
        assert type(actual) is type(expected) and actual == expected


@pytest.fixture
def concrete_only(monkeypatch):
    """Leaves the concrete tracer as the only mechanism of capture: what it refuses is then refused."""
    from fxsparse.passes import trace

    monkeypatch.setattr(trace, "MECHANISMS", {"concrete": trace.MECHANISMS["concrete"]})
