"""Masked training under torch.compile: no graph break, two variants and no more, and the masks of eager mode."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fxsparse

STEPS, INTERVAL = 500, 90  # rewirings at steps 90, 180, 270, 360 and, t_end being 500, 450


class ConvNet(nn.Module):
    """Convolutions, a depthwise one among them, normalisation, a linear."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 12, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def conv_net():
    return ConvNet(), (8, 3, 8, 8)


def linear_net():
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5)), (16, 12)


NETS = {"conv": conv_net, "linear": linear_net}


def make(net, method="rigl", interval=INTERVAL):
    torch.manual_seed(0)
    model, shape = NETS[net]()
    options = {"sparsity": 0.6, "update_interval": interval, "stop_fraction": 1.0, "decay": "constant"}
    return fxsparse.sparsify(model, torch.randn(shape), method, **options), shape


def batches(shape, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(shape, generator=generator), torch.randint(5, shape[:1], generator=generator)


def train(sparse, shape, steps=STEPS, forward=None, dtype=None, rewirer=None):
    """Trains in the user's own loop; afterwards the rewirer."""
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    for x, y in batches(shape, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy((sparse if forward is None else forward)(x), y)
        loss.backward()
        optimizer.step()
    return rewirer


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled yet; a graph break raises, and so does going on in eager mode after too many variants."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled(sparse, backend):
    return torch.compile(sparse, backend=backend, fullgraph=True)


def graphs():
    return counters["stats"]["unique_graphs"]


def recompiling_is_an_error():
    return torch._dynamo.config.patch(error_on_recompile=True)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("net, dtype", [("conv", None), ("linear", None), ("conv", torch.bfloat16)])
def test_two_variants_and_no_graph_break(net, backend, dtype):
    """500 steps with 5 rewirings: one graph before the first update step, one for update steps, none after."""
    sparse, shape = make(net)
    run = compiled(sparse, backend)
    seen = []

    def forward(x):
        out = run(x)
        seen.append((bool(sparse.dense_gradient), graphs()))
        return out

    rewirer = train(sparse, shape, forward=forward, dtype=dtype)
    assert rewirer.step_count == STEPS and len(rewirer.history) == 5 and rewirer.skipped_updates == 0
    assert [step for step, (update, _) in enumerate(seen) if update] == [90, 180, 270, 360, 450]
    assert [count for _, count in seen] == [1] * 90 + [2] * 410
    assert not counters["graph_break"]
    assert all(sum(record.changed.values()) > 0 for record in rewirer.history)


@pytest.mark.parametrize("method", ["rigl", "set", "rigl-sg", "snfs", "pruning", "static"])
def test_a_third_variant_would_be_an_error(method):
    """After the ordinary and the update variant were each seen once, dynamo's own switch forbids another."""
    sparse, shape = make("conv", method, interval=3)
    run = compiled(sparse, "aot_eager")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)

    def step(x, y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()

    data = batches(shape, 20)
    for _ in range(4):  # the steps 0 to 3; the last one is an update step
        step(*next(data))
    with recompiling_is_an_error():
        for x, y in data:
            step(x, y)
    assert rewirer.step_count == 20 and (method == "static" or len(rewirer.history) >= 6)


@pytest.mark.parametrize(
    "net, optimizer, options",
    [("conv", "sgd", {}), ("linear", "adamw", {}), ("linear", "sgd", {"update_weights_first": True})],
    ids=["conv", "adamw", "weights first"],
)
def test_the_masks_of_eager_mode(net, options, optimizer):
    """With gradients that are the same to the bit, everything is: masks, weights, records."""
    found = []
    for backend in (None, "aot_eager"):
        sparse, shape = make(net, interval=7)
        run = sparse if backend is None else compiled(sparse, backend)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        optim = kind(sparse.parameters(), lr=0.01)
        rewirer = sparse.attach(optim, total_steps=STEPS, **options)
        gradients = []
        for x, y in batches(shape, 40):
            optim.zero_grad()
            nn.functional.cross_entropy(run(x), y).backward()
            gradients.append([p.grad.clone() for p in sparse.parameters()])
            optim.step()
        found.append((gradients, sparse.state_dict(), rewirer.history))
    (gradients, state, history), (others, other_state, other_history) = found
    for mine, theirs in zip(gradients, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert len(history) == 5 and history == other_history
    assert all(torch.equal(value, other_state[key]) for key, value in state.items())


def test_gradients_that_pass_the_gate():
    """Ordinary steps give inactive positions no gradient, update steps do: the compiled graph reads the gate."""
    sparse, shape = make("linear", interval=2)
    run = compiled(sparse, "aot_eager")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=STEPS)
    dense = []
    for x, y in batches(shape, 5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        dense.append(any(bool((sparse.get_parameter(n).grad[~m] != 0).any()) for n, m in sparse.masks.items()))
        optimizer.step()
    assert dense == [False, False, True, False, True]


def test_attaching_anew_compiles_nothing():
    """A rewirer that goes and another that comes are no part of what the compiler guards on."""
    sparse, shape = make("conv", interval=3)
    run = compiled(sparse, "aot_eager")
    rewirer = train(sparse, shape, 8, run)
    assert graphs() == 2
    with recompiling_is_an_error():
        rewirer.detach()
        for x, _ in batches(shape, 2):
            run(x).sum().backward()
        again = train(sparse, shape, 8, run)
    assert graphs() == 2 and len(again.history) == 2


def test_evaluation_is_two_more_graphs_at_most():
    """eval() and no_grad are each a variant of their own, once; training goes on with what was compiled."""
    sparse, shape = make("conv", interval=4)
    run = compiled(sparse, "aot_eager")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer, total_steps=STEPS)
    counts = []
    for index, (x, y) in enumerate(batches(shape, 24)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()
        if index % 6 == 5:  # an epoch ends after steps 5, 11, 17, 23
            sparse.eval()
            with torch.no_grad():
                run(x)
            sparse.train()
        counts.append(graphs())
    assert counts[5] <= 4 and counts[-1] <= 4, counts


def test_a_graph_break_would_be_counted():
    """What the tests above count by does count."""
    sparse, shape = make("linear")
    broken = nn.Sequential(sparse, Breaks())
    torch.compile(broken, backend="eager")(torch.randn(shape))
    assert counters["graph_break"] and graphs() >= 1
    explained = torch._dynamo.explain(sparse)(torch.randn(shape))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + 1


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_inductor_chooses_masks_by_the_gradients_it_computed(net):
    """Rounding differs from eager mode; the choice among its own gradients does not."""
    sparse, shape = make(net, interval=5)
    run = compiled(sparse, "inductor")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    checked = 0
    for x, y in batches(shape, 22):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        expected = {}
        if rewirer.is_update_step():
            for name, mask in sparse.masks.items():
                weight = sparse.get_parameter(name)
                k = fxsparse.core.masking.floor_count(rewirer.schedule.fraction(rewirer.step_count), int(mask.sum()))
                expected[name] = fxsparse.rigl_update(weight.detach(), weight.grad, mask, k)
        optimizer.step()
        for name, mask in expected.items():
            assert torch.equal(mask, sparse.masks[name])
            checked += 1
    assert checked == 4 * len(sparse.masks)
