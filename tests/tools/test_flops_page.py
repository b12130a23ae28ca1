"""docs/flops.md is what its script writes now."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("flops_page", ROOT / "tools" / "flops_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "flops.md").read_text(encoding="utf-8") == script.write_page()
