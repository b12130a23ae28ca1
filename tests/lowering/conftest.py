"""Settings for the tests of lowering."""

import pytest


