"""Settings for the tests of lowering."""

import pytest


# TO BE REMOVED AT MERGE: until operators build their kernels by themselves.
@pytest.fixture(scope="session", autouse=True)
def kernels():
    from fxsparse.kernels.build import load_kernels

    load_kernels()
