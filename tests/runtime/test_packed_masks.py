"""Masks stored as bits: the same masks, weights and checkpoints as with bool ones, in an eighth of the memory."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxsparse
from fxsparse.core import packed_masks
from fxsparse.core.packed_masks import pack_mask, unpack_mask

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7, bias=False)
    )
    return fxsparse.sparsify(model, X, sparsity=0.7, update_interval=3, **options)


def train(sparse, steps=13, forward=None, **options):
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    rewirer = sparse.attach(optimizer, total_steps=20, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (sparse if forward is None else forward)(
            torch.randn(4, 3, 8, 8, generator=generator)
        ).square().mean().backward()
        optimizer.step()
    return rewirer, optimizer


def same(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_bits_are_those_of_the_elements_in_order(values):
    mask = torch.tensor(values, dtype=torch.bool)
    expected = [int("".join(str(int(v)) for v in values[i : i + 8]).ljust(8, "0"), 2) for i in range(0, len(values), 8)]
    assert pack_mask(mask).tolist() == expected
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 2, 3, 3), (16,)])
def test_a_device_packs_as_the_host_does(shape, monkeypatch):
    mask = torch.rand(shape) < 0.4
    on_host = pack_mask(mask)
    monkeypatch.setattr(packed_masks, "on_host", lambda tensor: False)
    assert torch.equal(pack_mask(mask), on_host)
    assert torch.equal(unpack_mask(on_host, mask.shape), mask)


def test_they_take_an_eighth_of_the_memory():
    plain, packed = make(), make(pack_masks=True)
    for site in plain.sites:
        assert packed.get_buffer(site.mask_name).nbytes == -(-site.numel // 8)
        assert plain.get_buffer(site.mask_name).nbytes == site.numel
    same(dict(plain.masks), dict(packed.masks))


@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "static", "pruning", "dsr", "deepr", "snip"])
def test_training_is_bit_for_bit_the_same(method):
    plain, packed = make(method=method), make(method=method, pack_masks=True)
    expected, actual = train(plain)[0], train(packed)[0]
    same(plain.state_dict(), packed.state_dict())
    assert [r.changed for r in expected.history] == [r.changed for r in actual.history]
    assert plain.active_counts == packed.active_counts and plain.report() == packed.report()


@pytest.mark.parametrize("granularity", [(4, 1), "2:4"])
def test_with_blocks_and_groups(granularity):
    torch.manual_seed(0)
    sparsity = {} if granularity == "2:4" else {"sparsity": 0.6}
    models = [
        fxsparse.sparsify(
            copy.deepcopy(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).double()),
            torch.randn(2, 16, dtype=torch.float64),
            granularity=granularity, update_interval=3, seed=1, pack_masks=pack, **sparsity,
        )
        for pack in (False, True)
    ]  # fmt: skip
    models[1].load_state_dict(models[0].state_dict())
    for sparse in models:
        optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
        sparse.attach(optimizer, total_steps=20)
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            optimizer.zero_grad()
            sparse(torch.randn(6, 16, generator=generator, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    same(models[0].state_dict(), models[1].state_dict())


def test_compiled():
    torch._dynamo.reset()
    plain, packed = make(), make(pack_masks=True)
    train(plain)
    train(packed, forward=torch.compile(packed, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(plain.masks[name], mask) for name, mask in packed.masks.items())


def test_where_nothing_is_known_of_the_weights_they_are_multiplied():
    packed = make(pack_masks=True)
    other = copy.deepcopy(packed)
    with torch.no_grad():
        for site in other.sites:
            other.get_parameter(site.name)[~other.masks[site.name]] = 7.0
    assert torch.equal(other(X), packed(X))


def test_checkpoints_move_freely():
    plain, packed = make(seed=1), make(seed=2, pack_masks=True)
    packed.load_state_dict(plain.state_dict())
    same(plain.state_dict(), packed.state_dict())
    assert all(packed.get_buffer(site.mask_name).dtype == torch.uint8 for site in packed.sites)
    plain = make(seed=3)
    plain.load_state_dict(packed.state_dict())
    same(plain.state_dict(), packed.state_dict())
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    same(torch.load(buffer, weights_only=False).state_dict(), plain.state_dict())


def test_resumption_is_exact():
    whole, first = make(pack_masks=True), make(pack_masks=True)
    train(whole)
    rewirer, optimizer = train(first, steps=7)
    states = copy.deepcopy((first.state_dict(), optimizer.state_dict(), rewirer.state_dict()))
    second = make(seed=0, pack_masks=True)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    rewirer = second.attach(optimizer, total_steps=20)
    for each, state in zip((second, optimizer, rewirer), states, strict=True):
        each.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    for step in range(13):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        if step >= 7:
            optimizer.zero_grad()
            second(x).square().mean().backward()
            optimizer.step()
    same(second.state_dict(), whole.state_dict())


def test_rewrites_and_files(tmp_path):
    plain, packed = make().eval(), make(pack_masks=True).eval()
    expected = plain(X)
    torch.testing.assert_close(packed.fold().eval()(X), expected)
    torch.testing.assert_close(packed.compact().eval()(X), expected)
    torch.testing.assert_close(packed.lower(layers="all")(X), expected, rtol=1e-4, atol=1e-5)
    fxsparse.save_sparse(packed, tmp_path / "m.safetensors")
    loaded = make(seed=9, pack_masks=True).eval()
    fxsparse.load_sparse(loaded, tmp_path / "m.safetensors")
    same(loaded.state_dict(), plain.state_dict())
    assert packed.flops().flops == plain.flops().flops
    lowered = make(pack_masks=True)
    lowered.lower(train=True, layers="all")
    train(lowered)
    plain = make()
    plain.lower(train=True, layers="all")
    train(plain)
    same(plain.raise_().state_dict(), lowered.raise_().state_dict())


def test_what_is_refused():
    with pytest.raises(fxsparse.ConfigError, match="pack_masks"):
        make(granularity="channel", pack_masks=True)
    with pytest.raises(fxsparse.ConfigError, match="pack_masks: 'yes' is neither True nor False"):
        make(pack_masks="yes")


def test_a_refused_lowering_leaves_them_packed(monkeypatch):
    packed = make(pack_masks=True)

    def refuse(*args):
        raise fxsparse.RuntimeStateError("the optimizer's state cannot come along")

    monkeypatch.setattr("fxsparse.lowering.storage.LoweredStorage.check", refuse)
    with pytest.raises(fxsparse.RuntimeStateError, match="cannot come along"):
        packed.lower(train=True, layers="all")
    assert all(packed.get_buffer(site.mask_name).dtype == torch.uint8 for site in packed.sites)
