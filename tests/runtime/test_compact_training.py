"""Training at the compact size is masked training in another order of summation: same losses, same masks, any net."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of

SPARSITY = 0.3
OUT_OF_REACH = {"image tokens": 0.2, "nn.MultiheadAttention": 0.2, "weight norm": 0.2}
STEPS = 13
NETWORKS = {"lenet5": {}, "small_resnet": {}, "wide_resnet22_2": {"width": 1}, "mobilenet_v1": {"width": 0.125}}


def made(name, compact, method="rigl-struct", optimizer="sgd", dtype=torch.float64, **options):
    torch.manual_seed(0)
    if name in CHANNEL_NETS:
        model, x = CHANNEL_NETS[name](), example_of(name, 4)
    else:
        given = {"size": 64} if name == "mobilenet_v1" else {}
        model, x = models.build(name, num_classes=10, **NETWORKS[name]), models.example_input(name, 4, **given)
    goal = {"sparsity": OUT_OF_REACH.get(name, SPARSITY), "distribution": "er"}
    goal |= {"update_interval": 3, "drop_fraction": 0.9, "decay": "constant", "granularity": "channel"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = fxsparse.sparsify(model.to(dtype), x.to(dtype), method, verify=False, **(goal | options))
    if optimizer == "sgd":
        # At 0.02 a difference in the last bit of MobileNet's weights grows tenfold a step.
        rate = 0.002 if name == "mobilenet_v1" else 0.02
        own = torch.optim.SGD(sparse.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3)
    else:
        own = torch.optim.AdamW(sparse.parameters(), lr=0.003, amsgrad=True)
    return sparse, own, sparse.attach(own, STEPS + 4, compact=compact)


def train(name, sparse, optimizer, start, stop, each=lambda step: None):
    losses = []
    kind = next(sparse.parameters()).dtype
    for step in range(start, stop):
        torch.manual_seed(step)
        if name in CHANNEL_NETS:
            x = example_of(name, 4, seed=step)
        else:
            x = torch.randn(4, *((3, 64, 64) if name == "mobilenet_v1" else models.example_input(name).shape[1:]))
        optimizer.zero_grad()
        leaves = torch.utils._pytree.tree_leaves(sparse(x.to(kind)))
        loss = sum((leaf - 0.5).square().mean() for leaf in leaves)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each(step)
    return losses


def size(sparse):
    return sum(parameter.numel() for parameter in sparse.parameters())


@pytest.mark.parametrize("name", [*CHANNEL_NETS, *NETWORKS])
def test_the_same_run(name):
    if name == "tied and transposed":
        with pytest.raises(fxsparse.SelectionError, match="no channel of this model can be dropped"):
            made(name, False)
        return
    masked, own, rewirer = made(name, False)
    expected = train(name, masked, own, 0, STEPS)
    compact, other, resized = made(name, True)
    sizes = []
    losses = train(name, compact, other, 0, STEPS, lambda step: sizes.append(size(compact)))
    assert losses == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert [record.changed for record in rewirer.history] == [record.changed for record in resized.history]
    assert min(sizes) < size(masked) == max(sizes)
    assert sizes.count(size(masked)) <= len(rewirer.history) + 1  # at update steps alone it is large
    left = compact.state_dict()
    for key, value in masked.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(left[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["set", "static", "pruning", "rigl"])
def test_every_method_and_optimizer(method, optimizer):
    runs = []
    for compact in (False, True):
        sparse, own, _ = made("small_resnet", compact, method, optimizer)
        runs.append((train("small_resnet", sparse, own, 0, STEPS), sparse))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].masks.values(), runs[1][1].masks.values(), strict=True))


@pytest.mark.parametrize("options", [{"semantics": "report"}, {"semantics": {"weight_update": "first"}}])
def test_other_semantics(options):
    runs = []
    for compact in (False, True):
        sparse, own, _ = made("small_resnet", compact, **options)
        runs.append(train("small_resnet", sparse, own, 0, STEPS))
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


def test_the_small_module_is_as_small_as_compact_makes_it():
    sparse, own, _ = made("wide_resnet22_2", True)
    train("wide_resnet22_2", sparse, own, 0, 4)
    small = sparse.compact()
    assert {name: p.shape for name, p in sparse.named_parameters()} == {
        name: p.shape for name, p in small.named_parameters()
    }
    for parameter in sparse.parameters():
        assert own.state[parameter]["momentum_buffer"].shape == parameter.shape
    x = models.example_input("wide_resnet22_2", 3).double()
    sparse.eval(), small.eval()
    torch.testing.assert_close(sparse(x), small(x), rtol=1e-12, atol=1e-12)


def test_what_is_read_and_saved_is_at_the_full_size():
    sparse, own, rewirer = made("small_resnet", True)
    masked, other, _ = made("small_resnet", False)
    for step in range(8):  # small, large for an update step, small again
        train("small_resnet", sparse, own, step, step + 1)
        train("small_resnet", masked, other, step, step + 1)
        before = size(sparse)
        assert sparse.active_counts == masked.active_counts and sparse.sparsity == masked.sparsity
        assert sparse.flops().flops == masked.flops().flops
        assert sparse.report() == masked.report()
        state, full = sparse.state_dict(), masked.state_dict()
        assert list(state) == list(full)
        assert all(state[key].shape == full[key].shape for key in full)
        for mine, theirs in zip(own.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
            torch.testing.assert_close(mine["momentum_buffer"], theirs["momentum_buffer"], rtol=1e-9, atol=1e-12)
        for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), state.values(), strict=True))
            assert size(twin) == size(masked)
        assert size(sparse) == before  # looking has changed nothing
    rewirer.detach()
    assert size(sparse) == size(masked)
    for key, value in masked.state_dict().items():
        if "running" not in key:
            torch.testing.assert_close(sparse.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("method", ["rigl-struct", "set", "pruning"])
def test_a_run_goes_on_bit_for_bit(method, compact, cut):
    sparse, own, rewirer = made("small_resnet", compact, method)
    expected = train("small_resnet", sparse, own, 0, STEPS)
    sparse, own, rewirer = made("small_resnet", compact, method)
    train("small_resnet", sparse, own, 0, cut)
    file = io.BytesIO()
    torch.save((sparse.state_dict(), own.state_dict(), rewirer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file)
    again, other, resumed = made("small_resnet", compact, method)
    for part, state in zip((again, other, resumed), saved, strict=True):
        part.load_state_dict(state)
    losses = train("small_resnet", again, other, cut, STEPS)
    assert losses == pytest.approx(expected[cut:], rel=1e-12 if compact else 0)  # its first step is at the full size
    if not compact:
        assert losses == expected[cut:]


def test_a_run_may_change_between_both_ways():
    masked, own, rewirer = made("small_resnet", False)
    expected = train("small_resnet", masked, own, 0, STEPS)
    first, own, rewirer = made("small_resnet", True)
    train("small_resnet", first, own, 0, 5)
    second, other, resumed = made("small_resnet", False)
    for part, state in ((second, first.state_dict()), (other, own.state_dict()), (resumed, rewirer.state_dict())):
        part.load_state_dict(state)
    assert train("small_resnet", second, other, 5, STEPS) == pytest.approx(expected[5:], rel=1e-9)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_states_are_loaded_in_any_order(order):
    parts = made("small_resnet", True, optimizer="adamw")
    train("small_resnet", *parts[:2], 0, 7)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    expected = train("small_resnet", *parts[:2], 7, STEPS)
    again = made("small_resnet", True, optimizer="adamw")
    for index in order:
        again[index].load_state_dict(saved[index])
    assert train("small_resnet", *again[:2], 7, STEPS) == pytest.approx(expected, rel=1e-9)


def test_looking_between_backward_and_step_changes_nothing():
    expected, losses = [], []
    for look, found in ((False, expected), (True, losses)):
        sparse, own, _ = made("small_resnet", True)
        eager = models.build("small_resnet", num_classes=10).double()
        for step in range(8):
            x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)).double()
            own.zero_grad()
            loss = sparse(x).square().mean()
            loss.backward()
            if look:
                sparse.masks, sparse.state_dict(), sparse.report(), sparse.flops(), sparse.copy_to(eager), sparse.fold()
            own.step()
            found.append(loss.item())
    assert losses == expected


def test_state_that_cannot_be_cut_is_refused():
    sparse, _, rewirer = made("small_resnet", False, dtype=torch.float32)
    rewirer.detach()
    own = torch.optim.Adafactor(sparse.parameters())
    sparse.attach(own, 20, compact=True)
    with pytest.raises(fxsparse.RuntimeStateError, match=r"in Adafactor has shape .* cannot be cut"):
        train("small_resnet", sparse, own, 0, 4)


def test_channels_last_stays():
    sparse, own, _ = made("wide_resnet22_2", True, dtype=torch.float32)
    sparse.to(memory_format=torch.channels_last)
    train("wide_resnet22_2", sparse, own, 0, 8)
    for name, parameter in sparse.named_parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), (name, parameter.stride())


def test_it_is_for_channels_and_for_one_process(monkeypatch):
    sparse = fxsparse.sparsify(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(fxsparse.RuntimeStateError, match="compact=True is for channels"):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), 10, compact=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(fxsparse.RuntimeStateError, match="for one process"):
        made("small_resnet", True)


def test_a_failed_attach_leaves_the_module_free(monkeypatch):
    sparse, own, rewirer = made("small_resnet", False)
    rewirer.detach()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(fxsparse.RuntimeStateError, match="another model"):
        sparse.attach(other, 10, compact=True)
    sparse.attach(own, 10, compact=True)
