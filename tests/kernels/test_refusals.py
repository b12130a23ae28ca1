"""What is wrong is one line that says what, before anything is read."""

import dataclasses

import pytest
import torch

from fxsparse import InputError
from fxsparse.kernels import SparsePattern

SETTINGS = {"weight": [4, 3, 3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "block": 1}
PATTERN = SparsePattern.of(torch.arange(108).reshape(4, 3, 3, 3) % 3 == 0)


def operands():
    x, dy, values = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6), torch.randn(PATTERN.count)
    return {"x": x, "dy": dy, "values": values, "pattern": PATTERN.tensors, "bias": torch.randn(4)}


CALLS = {
    "sparse_conv2d": lambda ops, o, s: ops.sparse_conv2d(o["x"], o["values"], o["pattern"], o["bias"], *s),
    "fused": lambda ops, o, s: ops.sparse_conv2d_fused(
        o["x"], o["values"], o["pattern"], o["bias"], o["dy"], *s, 0.0, None
    ),
    "input gradient": lambda ops, o, s: ops.sparse_conv2d_input_gradient(
        o["dy"], o["x"], o["values"], o["pattern"], *s
    ),
    "weight gradient": lambda ops, o, s: ops.sparse_conv2d_weight_gradient(o["dy"], o["x"], o["pattern"], *s),
}


def changed_pattern(place, change):
    pattern = [part.clone() for part in PATTERN.tensors]
    pattern[place] = change(pattern[place])
    return pattern


def at(index, number):
    def change(part):
        part[index] = number
        return part

    return change


# what is wrong: operands, settings, and the calls that must refuse (those that read it)
BOTH, ALL = ("sparse_conv2d", "fused"), tuple(CALLS)
WRONG = {
    "bfloat16": ({"x": torch.randn(2, 3, 5, 6).bfloat16()}, {}, ALL),
    "half": ({"x": torch.randn(2, 3, 5, 6).half()}, {}, ALL),
    "integers": ({"x": torch.ones(2, 3, 5, 6, dtype=torch.int64)}, {}, ALL),
    "another dtype": ({"x": torch.randn(2, 3, 5, 6).double()}, {}, ALL),
    "values' dtype": ({"values": torch.randn(PATTERN.count).double()}, {}, (*BOTH, "input gradient")),
    "bias's dtype": ({"bias": torch.randn(4).double()}, {}, BOTH),
    "channels": ({"x": torch.randn(2, 4, 5, 6)}, {}, ALL),
    "dimensions": ({"x": torch.randn(3, 5, 6)}, {}, ALL),
    "another image": ({"x": torch.randn(2, 3, 5, 7)}, {}, ("fused", "input gradient", "weight gradient")),
    "fewer images": ({"dy": torch.randn(1, 4, 5, 6)}, {}, ("fused", "input gradient", "weight gradient")),
    "gradient's channels": ({"dy": torch.randn(2, 5, 5, 6)}, {}, ("fused", "input gradient", "weight gradient")),
    "count of values": ({"values": torch.randn(PATTERN.count - 1)}, {}, (*BOTH, "input gradient")),
    "matrix of values": ({"values": torch.randn(PATTERN.count, 1)}, {}, (*BOTH, "input gradient")),
    "bias": ({"bias": torch.randn(3)}, {}, BOTH),
    "kernel too large": ({}, {"dilation": [9, 1]}, ALL),
    "stride 0": ({}, {"stride": [0, 1]}, ALL),
    "dilation 0": ({}, {"dilation": [1, 0]}, ALL),
    "negative padding": ({}, {"padding": [-1, 1]}, ALL),
    "three strides": ({}, {"stride": [1, 1, 1]}, ALL),
    "no groups": ({}, {"groups": 0}, ALL),
    "groups": ({}, {"groups": 3}, ALL),
    "block": ({}, {"block": 3}, ALL),
    "flat weight": ({}, {"weight": [4, 27]}, ALL),
    "weight": ({}, {"weight": [4, 3, 3, 2]}, ALL),
    "negative weight": ({}, {"weight": [4, -3, 3, 3]}, ALL),
    "pattern of int64": ({"pattern": [part.long() for part in PATTERN.tensors]}, {}, ALL),
    "part of a pattern": ({"pattern": PATTERN.tensors[:3]}, {}, ALL),
    "no rows": ({"pattern": PATTERN.tensors[:2]}, {}, ("input gradient",)),
    "strided pattern": ({"pattern": changed_pattern(1, lambda p: p.repeat_interleave(2)[::2])}, {}, ALL),
    "column beyond": ({"pattern": changed_pattern(1, at(5, 27))}, {}, (*BOTH, "weight gradient")),
    "column far beyond": ({"pattern": changed_pattern(1, at(5, 2**31 - 1))}, {}, (*BOTH, "weight gradient")),
    "column before": ({"pattern": changed_pattern(1, at(5, -1))}, {}, (*BOTH, "weight gradient")),
    "descending columns": (
        {"pattern": changed_pattern(1, lambda p: p.view(4, -1).flip(1).flatten().contiguous())},
        {},
        ("weight gradient",),
    ),
    "start beyond": ({"pattern": changed_pattern(0, at(2, 1000))}, {}, (*BOTH, "weight gradient")),
    "start before": ({"pattern": changed_pattern(0, at(2, -4))}, {}, (*BOTH, "weight gradient")),
    "last start": ({"pattern": changed_pattern(0, at(4, 35))}, {}, (*BOTH, "weight gradient")),
    "fewer rows": ({"pattern": changed_pattern(0, lambda p: p[:-1].contiguous())}, {}, (*BOTH, "weight gradient")),
    "row beyond": ({"pattern": changed_pattern(3, at(7, 4))}, {}, ("input gradient",)),
    "row before": ({"pattern": changed_pattern(3, at(7, -1))}, {}, ("input gradient",)),
    "place beyond": ({"pattern": changed_pattern(4, at(7, 36))}, {}, ("input gradient",)),
    "place before": ({"pattern": changed_pattern(4, at(7, -2))}, {}, ("input gradient",)),
    "column's start": ({"pattern": changed_pattern(2, at(7, 2**30))}, {}, ("input gradient",)),
    "fewer places": ({"pattern": changed_pattern(4, lambda p: p[:-1].contiguous())}, {}, ("input gradient",)),
}


@pytest.mark.parametrize("call, wrong", [(call, wrong) for wrong, (_, _, calls) in WRONG.items() for call in calls])
def test_wrong_calls(ops, call, wrong):
    changes, settings, _ = WRONG[wrong]
    with pytest.raises(ValueError, match=r"\w") as caught:
        CALLS[call](ops, operands() | changes, (SETTINGS | settings).values())
    assert "\n" not in str(caught.value)


def test_right_calls(ops):
    """So that each of the wrong ones is wrong by its one change."""
    for call in CALLS.values():
        call(ops, operands(), SETTINGS.values())


def test_what_dtypes_are_taken(ops):
    with pytest.raises(ValueError, match=r"float32.*float64"):
        CALLS["fused"](ops, operands() | WRONG["bfloat16"][0], SETTINGS.values())


@pytest.mark.parametrize("wrong", [name for name, (changes, _, _) in WRONG.items() if "pattern" in changes])
def test_wrong_patterns(wrong):
    parts = WRONG[wrong][0]["pattern"]
    if len(parts) < 5:
        return
    names = ("starts", "columns", "t_starts", "t_rows", "t_places")
    with pytest.raises(InputError, match=r"not a pattern of a weight of shape \(4, 3, 3, 3\)"):
        dataclasses.replace(PATTERN, **dict(zip(names, parts, strict=True)))


def test_patterns_whose_lists_differ():
    other = SparsePattern.of(torch.arange(108).reshape(4, 3, 3, 3) % 3 == 1)
    with pytest.raises(InputError, match="other positions"):
        dataclasses.replace(PATTERN, columns=other.columns)
    with pytest.raises(InputError, match="ascend"):
        dataclasses.replace(PATTERN, columns=PATTERN.columns.view(4, 9).flip(1).flatten().contiguous())


def test_masks_that_have_no_pattern():
    mask = torch.ones(6, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="do not divide 6"):
        SparsePattern.of(mask, block=4)
    mask[1, 0] = False
    with pytest.raises(InputError, match="masked in part"):
        SparsePattern.of(mask, block=2)


@pytest.mark.parametrize("groups, block", [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_patterns_keep_their_positions(groups, block):
    kept = torch.rand(12 // block, 1, 5, 3, 2) < 0.3
    mask = kept.expand(-1, block, -1, -1, -1).reshape(12, 5, 3, 2)
    pattern = SparsePattern.of(mask, groups, block)
    assert torch.equal(pattern.mask(), mask) and pattern.count == int(mask.sum())
    dense = torch.randn(mask.shape)
    assert torch.equal(pattern.scatter(pattern.gather(dense)), dense * mask)


def test_rows_longer_than_offsets_count(compiled):
    """Three rows of 300,000 pixels in 4,096 channels: what is kept at once passes what an int32 counts."""
    x, dy = (torch.zeros(1, 1, rows, 300_000).expand(1, 4096, -1, -1) for rows in (3, 1))
    settings = [1, 1], [0, 0], [1, 1], 1, 1
    weight = [1, 4096, 3, 1]
    pattern, values = SparsePattern.of(torch.ones(weight, dtype=torch.bool)), torch.ones(3 * 4096)
    with pytest.raises(ValueError, match="int32"):
        compiled.sparse_conv2d(x, values, pattern.tensors, None, weight, *settings)
    with pytest.raises(ValueError, match="int32"):
        compiled.sparse_conv2d_weight_gradient(dy[:, :1], x, pattern.tensors, weight, *settings)
    weight = [4096, 1, 3, 1]
    pattern = SparsePattern.of(torch.ones(weight, dtype=torch.bool))
    with pytest.raises(ValueError, match="int32"):
        compiled.sparse_conv2d_input_gradient(dy, x[:, :1], values, pattern.tensors, weight, *settings)
