"""Training on active weights alone is masked training in another order of summation: same losses, same masks."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.kernels import update_steps

from .runs import OPTIMIZERS, STEPS, Net, Run, assert_same_run, assert_same_state, masked

METHODS = ("rigl", "set", "static", "pruning", "dsr")


def pair(method="rigl", optimizer="sgd", lower=0, attach=(), options=(), **loop):
    expected = Run(masked(method, **dict(options)), optimizer, **dict(attach)).to(STEPS, **loop)
    found = Run(masked(method, **dict(options)), optimizer, lower, **dict(attach)).to(STEPS, **loop)
    return expected, found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_optimizer(method, optimizer):
    expected, found = pair(method, optimizer)
    assert_same_run(expected, found)
    assert len(found.sparse.lowered) == len(found.sparse.sites) == 6
    for name, mask in found.sparse.masks.items():
        values = found.sparse.get_parameter(name)
        assert values.shape == (int(mask.sum()),)
        for value in found.optimizer.state[values].values():
            assert value.numel() == 1 or value.shape == values.shape
    if method != "static":
        assert any(sum(record.changed.values()) for record in found.rewirer.history) or method == "pruning"


@pytest.mark.parametrize("lower", [1, 3, 4, 8])
@pytest.mark.parametrize("method", ["rigl", "pruning", "snip"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lowered_in_the_middle(method, optimizer, lower):
    assert_same_run(*pair(method, optimizer, lower))


@pytest.mark.parametrize(
    "attach, options",
    [
        ({"update_weights_first": True}, {}),
        ({}, {"semantics": "report"}),
        ({}, {"semantics": {"gradient": "magnitude"}}),
        ({"update_weights_first": True}, {"semantics": {"regrown": "zeroed"}}),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_other_semantics(attach, options, accumulate):
    expected = masked(**options)
    if expected.semantics.optimizer_state != "masked":
        with pytest.raises(fxsparse.RuntimeStateError, match="keeps state at inactive positions"):
            expected.lower(train=True)
        return
    assert_same_run(*pair(attach=attach, options=options, accumulate=accumulate))


@pytest.mark.parametrize(
    "loop", [{"accumulate": 3}, {"clip": 0.1}, {"set_to_none": False}, {"accumulate": 2, "clip": 0.1}]
)
def test_loops(loop):
    assert_same_run(*pair(**loop))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_backward_pass_that_is_thrown_away_does_not_count(set_to_none, accumulate):
    expected, found = pair(discard=True, set_to_none=set_to_none, accumulate=accumulate)
    assert_same_run(expected, found)


def test_a_layer_whose_active_weights_have_no_gradient_still_grows():
    """Their gradient of zeros is not one that was cleared: the dense gradient of the first micro-batch counts."""
    runs = []
    for lower in (None, 0):
        sparse = masked(
            distribution={"fc.weight": 0.9}, sparsity=None, exclude=["first", "twice*", "down*", "g*", "a*"]
        )
        mask = torch.zeros(10, 12, dtype=torch.bool)
        mask[0] = True  # the loss reads no output of this row
        sparse.masks["fc.weight"].copy_(mask)
        sparse.apply_masks_()
        run = Run(sparse, "sgd", lower)
        run.forward = lambda x, sparse=sparse: sparse(x)[:, 1:]
        runs.append(run.to(STEPS, accumulate=2, set_to_none=False))
    assert_same_run(*runs)


def test_step_without_backward_after_zero_grad():
    for set_to_none in (True, False):
        runs = [Run(masked(), "sgd", lower).to(3) for lower in (None, 0)]
        for run in runs:
            assert run.rewirer.is_update_step()
            run.optimizer.zero_grad()
            run.backward(77)
            run.optimizer.zero_grad(set_to_none)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run.optimizer.step()
        assert_same_run(*runs)


def test_keys_keep_their_order_where_one_module_holds_several_weights():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
            self.register_buffer("d", torch.zeros(2))

        def forward(self, x):
            return nn.functional.linear(x, self.a) @ self.b + nn.functional.linear(x, self.c) + self.d.sum()

    sparse = fxsparse.sparsify(Several(), torch.randn(2, 6), sparsity=0.5, distribution="uniform")
    keys = list(sparse.state_dict())
    for layers in (["a"], ["c"], ["a", "c"]):
        sparse.lower(train=True, layers=layers)
        assert list(sparse.state_dict()) == keys and set(sparse.lowered) == set(layers)
        assert list(sparse.masks) == [site.name for site in sparse.sites]
    assert list(sparse.raise_().state_dict()) == keys


def test_there_and_back():
    expected = Run(masked()).to(STEPS)
    found = Run(masked(), lower=0).to(5)
    assert found.sparse.raise_() is found.sparse and not found.sparse.lowered
    found.to(8)
    found.sparse.lower(train=True, layers=["twice.weight", "down*"])
    assert set(found.sparse.lowered) == {"twice.weight", "down.weight"}
    found.to(STEPS)
    assert_same_run(expected, found)


def test_what_is_read_and_saved_is_that_of_the_masked_twin(assert_same):
    one, other = Run(masked()), Run(masked(), lower=0)
    for step in range(1, 9):
        one.to(step), other.to(step)
        assert other.sparse.active_counts == one.sparse.active_counts
        assert other.sparse.sparsity == one.sparse.sparsity and other.sparse.densities == one.sparse.densities
        assert other.sparse.flops().flops == one.sparse.flops().flops
        assert_same_state(one.sparse.state_dict(), other.sparse.state_dict())
        for twin in (copy.deepcopy(other.sparse), pickle.loads(pickle.dumps(other.sparse))):
            assert set(twin.lowered) == set(other.sparse.lowered)
            assert all(map(torch.equal, twin.parameters(), other.sparse.parameters()))
            assert all(map(torch.equal, twin.state_dict().values(), other.sparse.state_dict().values()))
            x = torch.randn(2, 3, 8, 8).double()
            twin.eval(), other.sparse.eval()
            assert torch.equal(twin(x), other.sparse(x))
            other.sparse.train()
            assert not twin.raise_().lowered
            torch.testing.assert_close(twin(x), copy.deepcopy(one.sparse).eval()(x))
    assert one.rewirer.report() == other.rewirer.report()
    eager = other.sparse.copy_to(Net().double())
    torch.testing.assert_close(eager.down.weight, one.sparse.get_parameter("down.weight"))
    folded = other.sparse.fold()
    x = torch.randn(2, 3, 8, 8).double()
    torch.testing.assert_close(folded.eval()(x), one.sparse.eval()(x))


def test_looking_between_backward_and_step_changes_nothing():
    runs = [Run(masked(), lower=0).to(8)]
    found = Run(masked(), lower=0)

    def look(step):
        sparse = found.sparse
        sparse.state_dict(), sparse.report(), sparse.flops(), sparse.fold(), sparse.masks
        copy.deepcopy(sparse), pickle.dumps(sparse), found.optimizer.state_dict()

    runs.append(found.to(8, each=look))
    assert runs[0].losses == runs[1].losses


def test_a_twin_trains_on_by_itself():
    """A copy remembers activations under a number of its own."""
    run = Run(masked(), lower=0).to(3)
    twin = copy.deepcopy(run.sparse)
    assert twin.lowered_run != run.sparse.lowered_run
    again = Run(twin, lower=None)
    again.to(STEPS)
    expected = Run(masked()).to(3)
    expected = Run(copy.deepcopy(expected.sparse)).to(STEPS)
    assert_same_run(expected, again)


def test_activations_are_remembered_on_update_steps_alone():
    run = Run(masked(), lower=0)
    remembered = lambda: sum(len(site._window) for site in run.rewirer._weights)  # noqa: E731
    counts = []
    run.to(8, each=lambda step: counts.append(remembered()))
    assert [count > 0 for count in counts] == [step in (3, 6) for step in range(8)]
    assert remembered() == 0
    run.to(9)
    run.optimizer.zero_grad(), run.backward(5)
    assert remembered() == 7  # every use of every weight
    run.rewirer.detach()
    assert remembered() == 0
    del run.rewirer
    gc.collect()
    assert all(key[0] != run.sparse.lowered_run for key in update_steps._windows)


def test_an_infinite_gradient_skips_the_rewiring():
    runs = []
    for lower in (None, 0):
        run = Run(masked(), "sgd", lower).to(3)
        run.optimizer.zero_grad()
        x = torch.full((4, 3, 8, 8), float("inf")).double()
        run.sparse(x).sum().backward()
        with pytest.warns(fxsparse.FxSparseWarning, match="not finite"):
            run.optimizer.step()
        assert run.rewirer.skipped_updates == 1
        runs.append(run.sparse.masks)
    assert all(map(torch.equal, *(masks.values() for masks in runs)))


def test_an_input_that_is_overwritten_before_the_step_is_noticed():
    run = Run(masked(distribution="er"), lower=0).to(3)
    x = torch.randn(4, 3, 8, 8).double()
    run.optimizer.zero_grad()
    run.sparse(x).sum().backward()
    x.zero_()
    with pytest.raises(fxsparse.RuntimeStateError, match=r"input of first.weight was overwritten between backward"):
        run.optimizer.step()


@pytest.mark.parametrize("lower", [0, 2])
def test_compiled(lower):
    """With the gate open and closed; nothing of it breaks the graph."""
    expected = Run(masked()).to(9)
    found = Run(masked(), lower=lower)
    counted = []

    def backend(module, inputs):
        counted.append(module)
        return torch._dynamo.backends.debugging.aot_eager(module, inputs)

    torch._dynamo.reset()
    found.forward = torch.compile(found.sparse, backend=backend, fullgraph=True)
    assert_same_run(expected, found.to(9))
    assert counted


@pytest.mark.slow
def test_compiled_with_inductor():
    """The compiler reuses the memory of activations that its own graph reads no more."""
    torch._dynamo.reset()
    expected, found = Run(masked()).to(8), Run(masked(), lower=0)
    found.forward = torch.compile(found.sparse)
    assert_same_run(expected, found.to(8))


def test_autocast_and_frozen_weights():
    sparse = masked(dtype=torch.float32)
    sparse.get_parameter("down.weight").requires_grad_(False)
    run = Run(sparse, lower=0)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(fxsparse.FxSparseWarning, match=r"down.weight"):
        run.to(5)
    changed = run.rewirer.history[0].changed
    assert "down.weight" not in changed and len(changed) == 4  # nor the first, which is dense


REFUSED = [
    ({"method": "snfs"}, "reads the dense gradient at every step"),
    ({"method": "deepr"}, "rewires after every step"),
    ({"method": "rigl-sg"}, "looks at all sites at once"),
    ({"method": "rigl", "granularity": "channel", "sparsity": 0.3}, r"attach\(compact=True\)"),
    ({"method": "rigl", "semantics": {"optimizer_state": "new"}}, "keeps state at inactive positions"),
]


@pytest.mark.parametrize("options, why", REFUSED)
def test_refused(options, why, assert_same):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    sparse = masked(model=model, **options)
    before = copy.deepcopy(sparse.state_dict())
    with pytest.raises(fxsparse.RuntimeStateError, match=why) as caught:
        sparse.lower(train=True, layers="all")
    assert "\n" not in str(caught.value)
    assert not sparse.lowered
    assert_same(before, sparse.state_dict())


def test_refused_later(assert_same):
    with pytest.raises(fxsparse.ConfigError, match="backend: 'gpu' is not one of: cpu, cuda"):
        masked().lower("gpu")
    sparse = masked("snip")
    sparse.lower(train=True, layers="all")
    with pytest.raises(fxsparse.RuntimeStateError, match="snip has not chosen its masks yet"):
        Run(sparse)
    run = Run(masked("snip"))
    with pytest.raises(fxsparse.RuntimeStateError, match="snip has not chosen its masks yet"):
        run.sparse.lower(train=True)
    sparse = masked(dtype=torch.float32).lower(train=True, layers="all")
    with pytest.raises(fxsparse.RuntimeStateError, match="Adafactor does not work number by number"):
        sparse.attach(torch.optim.Adafactor(sparse.parameters()), 20)
    linears = fxsparse.sparsify(nn.Linear(8, 8, bias=False), torch.randn(2, 8))
    linears.attach(torch.optim.Muon(linears.parameters()), 20)
    with pytest.raises(fxsparse.RuntimeStateError, match="Muon does not work number by number"):
        linears.lower(train=True, layers="all")
    run = Run(masked(), "adam").to(2)
    state = run.optimizer.state[run.sparse.get_parameter("fc.weight")]
    state["of rows"] = torch.zeros(10)
    before = copy.deepcopy(run.sparse.state_dict())
    with pytest.raises(fxsparse.RuntimeStateError, match=r"of rows of fc.weight in Adam has shape \(10,\)"):
        run.sparse.lower(train=True, layers="all")
    assert not run.sparse.lowered
    assert_same(before, run.sparse.state_dict())


def test_replicas_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(fxsparse.RuntimeStateError, match="for one process"):
        masked().lower(train=True)


def test_autocast_beside_layers_that_stay_dense():
    """A shortcut in bfloat16 is added to a lowered branch in float32."""
    torch.manual_seed(0)
    model = models.build("small_resnet", in_channels=3)
    x = torch.randn(4, 3, 16, 16)
    sparse = fxsparse.sparsify(model, x, method="static", sparsity=0.5, verify=False)
    lowered = copy.deepcopy(sparse).lower(train=True, layers=["*conv2.weight"])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = sparse(x), lowered(x)
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)


def test_the_report_has_the_decisions():
    sparse = masked()
    assert "why dense" not in sparse.report() and sparse.lowering_decisions == ()
    sparse.lower(train=True, layers=["down*"])
    assert "1 of 6 weights run on sparse kernels" in sparse.report()
    assert "not among the layers that were asked for" in sparse.report()
    sparse.lower(train=True)
    table = sparse.report().partition("weights run on sparse kernels")[2].splitlines()
    for decision in sparse.lowering_decisions:
        [row] = [line for line in table if line.startswith(decision.name)]
        estimates = [f"{1e3 * seconds:.3f}" for seconds in (decision.sparse_seconds, decision.dense_seconds)]
        assert row.split()[2:5] == ["sparse" if decision.lowered else "dense", *estimates]
    sparse.raise_()
    assert "why dense" not in sparse.report()
