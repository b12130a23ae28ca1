"""Methods by name and their options: one-line errors with near names, and a fresh memory for every run."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import ConfigError, FxSparseError
from fxsparse.runtime.methods import METHODS, SNFS, make_method, method_options

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def sparsify(method="rigl", **options):
    torch.manual_seed(0)
    return fxsparse.sparsify(network(method, 6, 4), X, method, sparsity=0.5, **options)


def network(method, inputs, outputs):
    """A linear; for a method on channels two, with channels between them."""
    if getattr(method, "name", method) != "rigl-struct":
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rigll", {}, "method: 'rigll' is not one of .*; did you mean rigl"),
        (
            "snfs",
            {"momentun": "optimizer"},
            r"sparsify takes no argument 'momentun', and method snfs no such option; did you mean momentum",
        ),
        ("rigl", {"threshold": 1.0}, "method rigl no such option"),
        ("rigl", {"sparisty": 1.0}, "no argument 'sparisty'.*did you mean sparsity"),
        ("snfs", {"momentum": "adam"}, "momentum: 'adam' is not one of average, optimizer"),
        ("snfs", {"beta": 1.0}, r"beta: 1.0 is outside \[0, 1\)"),
        ("snfs", {"beta": "x"}, "beta: 'x'"),
        ("snip", {"batches": 0}, "batches: 0"),
        ("snip", {"scope": "all"}, "scope: 'all' is not one of layer, global"),
        (
            "set",
            {"redistribution": "gradients"},
            "redistribution: 'gradients' is not one of none, gradient, momentum; did you mean gradient",
        ),
        ("static", {"redistribution": "gradient"}, "redistribution: static grows nothing"),
        ("dense", {"redistribution": "gradient"}, "redistribution: dense grows nothing"),
        ("snip", {"redistribution": "gradient"}, "redistribution: snip grows nothing"),
        (SNFS(), {"beta": 0.5}, r"beta: give it to SNFS\(...\), which was made already"),
        ("rigl", {"decay": "invers_power"}, "did you mean inverse_power"),
        ("rigl", {"semantics": "papr"}, "semantics: 'papr' is not one of paper, rigl-tf, report; did you mean paper"),
    ],
)
def test_a_wrong_option_is_one_line_with_near_names(method, options, message):
    with pytest.raises(FxSparseError, match=message) as caught:
        sparsify(method, **options)
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)


def test_every_method_of_the_issue_is_there():
    names = "dense small-dense static snip set rigl rigl-struct snfs rigl-sg rigl-sm dsr deepr pruning lottery"
    assert fxsparse.methods() == names.split()
    for name in names.split():
        assert method_options(name) == make_method(name).options()
        assert METHODS[name].__doc__
        assert METHODS[name].summary != METHODS["static"].summary or name == "static"


MOMENTUM = {"set": {"redistribution": "momentum"}, "snfs": {"momentum": "optimizer"}}


def run(sparse, steps=7, lr=0.1):
    optimizer = torch.optim.SGD(sparse.parameters(), lr=lr, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        sparse(torch.randn(4, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    return rewirer


@pytest.mark.parametrize("name", [n for n in fxsparse.methods() if n not in ("small-dense", "lottery")])
def test_a_run_does_not_remember_the_one_before(name):
    """One method object, or one module attached anew, starts as if it were new."""
    method = make_method(name, **({"batches": 3} if name == "snip" else {}))
    first, second = (sparsify(method, update_interval=2) for _ in range(2))
    start = copy.deepcopy(first.state_dict())
    run(first, steps=2 if name == "snip" else 7).detach()
    run(second)
    expected = copy.deepcopy(second.state_dict())
    first.load_state_dict(start)
    run(first)
    for key, value in first.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", [n for n in fxsparse.methods() if n not in ("small-dense", "lottery")])
def test_a_module_in_the_middle_of_a_run_can_be_copied_and_pickled(name):
    sparse = sparsify(name, update_interval=2)
    rewirer = run(sparse)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert other.method.name == name
        assert other.method.options() == sparse.method.options()
        for key, value in sparse.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])
        run(other)
    rewirer.detach()


def test_masks_loaded_by_assignment_are_counted_anew():
    # Of a mask of ones and of one that was read from a file the tensors' versions are alike, and the counts are not.
    sparse = sparsify("pruning", update_interval=1, begin=4, end=8, verify=False)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    rewirer = sparse.attach(optimizer, total_steps=20)
    state = copy.deepcopy(sparse.state_dict())
    state["weight_mask"] = torch.tensor([[True] * 3 + [False] * 3] * 4)
    sparse.load_state_dict(state, assign=True)
    optimizer.param_groups[0]["params"] = list(sparse.parameters())
    for _ in range(10):
        sparse(X).sum().backward()
        optimizer.step()
    assert sparse.active_counts == {"weight": 12}
    assert [record.active["weight"] for record in rewirer.history] == [12] * 5


def test_a_module_without_contents_is_refused_in_words():
    with torch.device("meta"):
        sparse = fxsparse.sparsify(nn.Linear(6, 4), torch.empty(2, 6), "rigl")
    with pytest.raises(fxsparse.RuntimeStateError, match="meta device; materialise it"):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1), total_steps=10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in fxsparse.methods() if n not in ("small-dense", "lottery")])
def test_half_precision_weights(name, dtype):
    sparse = fxsparse.sparsify(
        network(name, 8, 6).to(dtype), torch.randn(4, 8).to(dtype), name, sparsity=0.5, update_interval=2, verify=False
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=20)
    counts = sparse.active_counts
    for _ in range(20):
        optimizer.zero_grad()
        sparse(torch.randn(4, 8).to(dtype)).float().square().mean().backward()
        optimizer.step()
        for key, mask in sparse.masks.items() if not rewirer.is_update_step() else ():
            assert (sparse.get_parameter(key)[~mask] == 0).all()
    if name != "rigl-struct":
        assert sparse.active_counts == {"weight": 48 if name == "dense" else 24}
    else:
        assert sparse.active_counts == counts
    assert rewirer.step_count == 20


def test_a_method_that_grows_by_nothing_is_refused_before_the_first_step():
    class Half(fxsparse.Method):
        rewires = grows = True

    with pytest.raises(ConfigError, match="Half grows connections; give it a grow_score, or new_patterns"):
        fxsparse.sparsify(torch.nn.Linear(4, 4), torch.randn(1, 4), Half())
