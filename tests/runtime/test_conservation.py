"""Laws that hold at every step of every method, on layer sets that hypothesis makes up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse

METHODS = {
    "static": ("static", {}),
    "set": ("set", {}),
    "rigl": ("rigl", {}),
    "deepr": ("deepr", {"noise": 1.0, "l1": 0.1}),
    "set by gradient": ("set", {"redistribution": "gradient"}),
    "set by momentum": ("set", {"redistribution": "momentum"}),
    "rigl-sg": ("rigl-sg", {}),
    "rigl-sm": ("rigl-sm", {}),
    "snfs": ("snfs", {}),
    "snfs by the optimizer": ("snfs", {"momentum": "optimizer"}),
    "dsr": ("dsr", {"threshold": 0.1}),
    "pruning": ("pruning", {}),
    "pruning globally": ("pruning", {"scope": "global"}),
    "snip": ("snip", {"batches": 2}),
    "snip globally": ("snip", {"batches": 2, "scope": "global"}),
}
CONSTANT = ("static", "set", "rigl", "deepr")
"""Methods that promise every layer its number of connections."""
STEPS = 8


class Layers(nn.Module):
    """Linears and convolutions side by side, each on as much of the input as it takes."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2], bias=False) for s in shapes
        )

    def forward(self, x):
        results = []
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                results.append(layer(x[:, 0, 0, : layer.in_features]).sum(1))
            else:
                results.append(layer(x[:, : layer.in_channels]).flatten(1).sum(1))
        return sum(result.square() for result in results)


@st.composite
def layer_sets(draw):
    linear = st.tuples(st.integers(1, 6), st.integers(1, 6))
    conv = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
    shapes = draw(st.lists(st.one_of(linear, conv), min_size=1, max_size=5))
    # Dense, nearly dense, nearly empty (one weight left), and anything between.
    share = st.one_of(st.just(0.0), st.just("one out"), st.just("one left"), st.floats(0.0, 0.97))
    return shapes, [draw(share) for _ in shapes], draw(st.floats(0.0, 1.0)), draw(st.integers(0, 3))


def sparsity_of(share, size):
    return {"one out": 1 / size, "one left": 1 - 1 / size}.get(share, share) if size > 1 else 0.0


@pytest.mark.filterwarnings("ignore:.*(about to be emptied|without a gradient)")
@pytest.mark.parametrize("case", METHODS)
@settings(max_examples=6, deadline=None)
@given(layer_sets())
def test_the_laws_of_conservation(case, layers):
    shapes, shares, alpha, seed = layers
    method, options = METHODS[case]
    torch.manual_seed(seed)
    model = Layers(shapes)
    names = [f"layers.{i}.weight" for i in range(len(shapes))]
    sizes = {name: layer.weight.numel() for name, layer in zip(names, model.layers, strict=True)}
    sparsities = {name: sparsity_of(share, sizes[name]) for name, share in zip(names, shares, strict=True)}
    sparse = fxsparse.sparsify(
        model, torch.randn(2, 3, 2, 6), method, distribution=sparsities, drop_fraction=alpha, decay="constant",
        update_interval=2, stop_fraction=1.0, seed=seed, verify=False, **options,
    )  # fmt: skip
    kept = {name: size - math.floor(sparsities[name] * size + 1e-9) for name, size in sizes.items()}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    sparse.attach(optimizer, total_steps=STEPS)
    starts_dense = method in ("pruning", "snip")
    assert sparse.active_counts == (sizes if starts_dense else kept)
    total = sum(sparse.active_counts.values())
    for _ in range(STEPS):
        optimizer.zero_grad()
        sparse(torch.randn(4, 3, 2, 6)).mean().backward()
        optimizer.step()
        counts = {name: int(mask.sum()) for name, mask in sparse.masks.items()}
        assert counts == sparse.active_counts
        if starts_dense:
            assert sum(counts.values()) <= total
            total = sum(counts.values())
        assert sum(counts.values()) == total
        for name, mask in sparse.masks.items():
            assert (sparse.get_parameter(name)[~mask] == 0).all()
            if kept[name] == sizes[name]:
                assert counts[name] == sizes[name]  # dense sites stay dense
            if case in CONSTANT:
                assert counts[name] == kept[name]
    assert sum(counts.values()) == sum(kept.values())
    if starts_dense and options.get("scope") != "global":
        assert counts == kept
