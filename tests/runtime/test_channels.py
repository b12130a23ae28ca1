"""Dropping and growing whole channels: what is masked, how a channel is chosen, and what a new one starts with."""

import copy
import itertools

import pytest
import torch
from torch import nn

import fxsparse
import fxsparse.models as models
from fxsparse.channels.channel_plan import masks_of
from fxsparse.core.channel_sites import ON_WEIGHTS

METHODS = ("rigl-struct", "set", "static", "pruning")


class Net(nn.Module):
    """A stem, a residual stream with two writers, a depthwise convolution, a head; every kind of slice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.inner_bn = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.last = nn.Conv2d(8, 10, 3)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        y = self.inner_bn(self.depthwise(self.inner(x))).relu()
        x = x + self.back(y) * self.scale
        return self.head(self.last(x).relu().mean((2, 3)))


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(4, (8,), generator=generator)


def made(method="rigl-struct", steps=30, optimizer="sgd", dtype=torch.float64, attach=(), **options):
    torch.manual_seed(0)
    defaults = {"sparsity": 0.6, "update_interval": 4, "drop_fraction": 0.5, "granularity": "channel"}
    sparse = fxsparse.sparsify(Net().to(dtype), batch(0, dtype)[0], method, **(defaults | options))
    if optimizer == "sgd":
        own = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    else:
        own = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    return sparse, own, sparse.attach(own, steps, **dict(attach))


def train(sparse, optimizer, start, stop, each=lambda step: None):
    losses = []
    for step in range(start, stop):
        x, y = batch(step, next(sparse.parameters()).dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(sparse(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each(step)
    return losses


def slices(sparse, alive):
    """Every (site, slice, tensor, positions of inactive channels)."""
    tensors = dict(sparse.named_parameters()) | dict(sparse.named_buffers())
    for site in sparse.channels.sites:
        for item in site.slices:
            inactive = [p for p, atom in zip(item.positions, item.atoms, strict=True) if not alive[site.name][atom]]
            yield site, item, tensors[item.tensor], inactive


def assert_inactive_is_zero(sparse, optimizer=None):
    alive = sparse.active_channels
    for _, item, tensor, inactive in slices(sparse, alive):
        if isinstance(tensor, nn.Parameter):
            assert not tensor.index_select(item.dim, torch.tensor(inactive, dtype=torch.int64)).any(), item.tensor
            for state in optimizer.state.get(tensor, {}).values() if optimizer else ():
                if torch.is_tensor(state) and state.shape == tensor.shape:
                    assert not state.index_select(item.dim, torch.tensor(inactive, dtype=torch.int64)).any()
        if item.role in ON_WEIGHTS:
            mask = sparse.masks[item.tensor]
            assert not mask.index_select(item.dim, torch.tensor(inactive, dtype=torch.int64)).any()


# -- what is masked ---------------------------------------------------------------------------------------


def test_what_the_sites_are():
    sparse, *_ = made()
    assert [(site.producers, site.size) for site in sparse.channels.sites] == [
        (("stem.weight", "back.weight"), 8),
        (("inner.weight",), 12),
        (("last.weight",), 10),
    ]
    by_producer = {name: site for site in sparse.channels.sites for name in site.producers}
    stream = by_producer["back.weight"]
    touched = {(item.tensor, item.dim, item.role) for item in stream.slices}
    assert ("inner.weight", 1, "consumer") in touched and ("last.weight", 1, "consumer") in touched
    assert ("scale", 0, "carrier") in touched and ("bn.weight", 0, "carrier") in touched
    inner = by_producer["inner.weight"]
    assert ("depthwise.weight", 0, "copy") in {(item.tensor, item.dim, item.role) for item in inner.slices}
    assert sparse.channels.outside == {"head.weight"}
    assert "head.weight" in sparse.channels.stays


def test_the_budget_is_what_is_left_after_cutting():
    sparse, *_ = made(sparsity=0.6)
    small = sparse.compact()
    budget = [site for site in sparse.sites if site.name != "head.weight"]
    left = sum(small.get_parameter(site.name).numel() for site in budget)
    whole = sum(site.numel for site in budget)
    assert left == sum(sparse.active_counts[site.name] for site in budget)
    assert left <= 0.4 * whole
    # With one channel more in every group the budget would be passed.
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    alive = {name: atoms.clone() for name, atoms in sparse.active_channels.items()}
    for atoms in alive.values():
        atoms[int((~atoms).nonzero()[0])] = True
    wider = masks_of(sparse.channels.sites, sparse.sites, alive)
    assert all(bool((masks[name] <= wider[name]).all()) for name in masks)
    assert sum(int(wider[site.name].sum()) for site in budget) > 0.4 * whole


def test_a_budget_in_flops():
    sparse, *_ = made(sparsity=None, flops=0.4)
    whole = fxsparse.count_flops(Net().double(), batch(0)[0]).flops
    assert fxsparse.count_flops(sparse.compact()).flops == sparse.flops().flops
    assert 0.3 * whole < sparse.flops().flops <= 0.4 * whole


def test_inactive_channels_reach_nothing():
    """Non-interference: whatever makes an inactive channel may take any value, and the outputs do not move."""
    sparse, optimizer, _ = made()
    train(sparse, optimizer, 0, 6)
    for training in (False, True):
        sparse.train(training)
        expected = sparse(batch(99)[0])
        with torch.no_grad():
            for _, item, tensor, inactive in slices(sparse, sparse.active_channels):
                if item.role != "consumer" and tensor.is_floating_point():
                    tensor.index_fill_(item.dim, torch.tensor(inactive), 7.5)
        assert torch.equal(sparse(batch(99)[0]), expected)


def test_the_interference_test_can_fail():
    sparse, optimizer, _ = made()
    train(sparse, optimizer, 0, 6)
    sparse.eval()
    expected = sparse(batch(99)[0])
    site = next(site for site in sparse.channels.sites if "inner.weight" in site.producers)
    reader = next(item for item in site.of("consumer"))
    mask = sparse.get_buffer(f"{reader.tensor}_mask")
    mask.fill_(True)  # the producers stay masked, what reads them does not
    with torch.no_grad():
        sparse.get_parameter(reader.tensor).add_(0.1)
        sparse.inner_bn.bias.add_(1.0)
    assert not torch.allclose(sparse(batch(99)[0]), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_inactive_is_zero_after_every_step_and_counts_stay(method, optimizer):
    sparse, own, rewirer = made(method, optimizer=optimizer)
    counts = []

    def check(step):
        if not rewirer.is_update_step():  # for an update step inactive channels hold candidates
            assert_inactive_is_zero(sparse, own)
        counts.append({name: int(alive.sum()) for name, alive in sparse.active_channels.items()})
        for name, mask in sparse.masks.items():
            rows, columns = mask.flatten(1).any(1), mask.flatten(2).any(2).any(0) if mask.ndim > 2 else mask.any(0)
            assert torch.equal(
                mask, (rows[:, None] & columns).view(*mask.shape[:2], *[1] * (mask.ndim - 2)).expand_as(mask)
            ), name

    train(sparse, own, 0, 30, check)
    assert_inactive_is_zero(sparse, own)
    if method == "pruning":
        assert counts[0] == {site.name: site.size for site in sparse.channels.sites}
        assert all(a[name] >= b[name] for a, b in itertools.pairwise(counts) for name in a)
    else:
        assert all(count == sparse.channels.targets for count in counts)
    assert counts[-1] == sparse.channels.targets
    changed = sum(sum(record.changed.values()) for record in rewirer.history)
    assert (changed > 0) == (method in ("rigl-struct", "set"))


# -- how a channel is chosen ------------------------------------------------------------------------------


def test_with_zeros_on_both_sides_a_channel_has_no_gradient():
    """Why growth needs values: an inactive channel as it is stored gets exactly 0, so it could never grow."""
    sparse, optimizer, _ = made()
    train(sparse, optimizer, 0, 2)
    sparse.dense_gradient = True
    optimizer.zero_grad()
    x, y = batch(50)
    nn.functional.cross_entropy(sparse(x), y).backward()
    for _, item, tensor, inactive in slices(sparse, sparse.active_channels):
        if item.role == "consumer":
            assert not tensor.grad.index_select(item.dim, torch.tensor(inactive)).any()


def test_the_smallest_go_and_the_largest_gradients_come():
    sparse, optimizer, rewirer = made(drop_fraction=0.4)
    train(sparse, optimizer, 0, 4)
    assert rewirer.is_update_step()
    before = {name: alive.clone() for name, alive in sparse.active_channels.items()}
    x, y = batch(4)
    optimizer.zero_grad()
    nn.functional.cross_entropy(sparse(x), y).backward()
    parameters = dict(sparse.named_parameters())
    expected = {}
    for site in sparse.channels.sites:
        magnitude, gradient = [], []
        for atom in range(site.size):
            weights, gradients = [], []
            for item in site.of(*ON_WEIGHTS):
                own = [p for p, a in zip(item.positions, item.atoms, strict=True) if a == atom]
                part = parameters[item.tensor].detach().index_select(item.dim, torch.tensor(own))
                mask = sparse.masks[item.tensor].index_select(item.dim, torch.tensor(own))
                weights.append(part[mask])
                if item.role == "consumer":
                    # of the rows that are active, by the mask of an active channel
                    other = next(p for p, a in zip(item.positions, item.atoms, strict=True) if before[site.name][a])
                    rows = sparse.masks[item.tensor].select(item.dim, other).unsqueeze(item.dim)
                    part = parameters[item.tensor].grad.index_select(item.dim, torch.tensor(own))
                    gradients.append(part[rows.expand_as(part)])
            magnitude.append(torch.cat(weights).abs().mean().item() if before[site.name][atom] else float("inf"))
            gradient.append(torch.cat(gradients).abs().mean().item())
        k = int(rewirer.schedule.fraction(4) * int(before[site.name].sum()))
        dropped = sorted(range(site.size), key=lambda a: (magnitude[a], -a))[:k]
        kept = {a for a in range(site.size) if before[site.name][a] and a not in dropped}
        free = [a for a in range(site.size) if a not in kept]
        grown = sorted(free, key=lambda a: (-gradient[a], a))[:k]
        expected[site.name] = [a in kept or a in grown for a in range(site.size)]
    optimizer.step()
    assert {name: alive.tolist() for name, alive in sparse.active_channels.items()} == expected
    assert any(expected[name] != before[name].tolist() for name in expected)


def test_magnitude_of_the_mean_is_the_reports_choice():
    from fxsparse.runtime.semantics import make_semantics

    assert make_semantics("report").channel_score == "magnitude_of_mean"
    sparse, _, rewirer = made(semantics={"channel_score": "magnitude_of_mean"})
    site = next(site for site in rewirer._sites if "stem" in site.name)
    stream = next(own for own in sparse.channels.sites if own.name == site.name)
    active = next(a for a in range(site.size) if sparse.active_channels[site.name][a])
    values = []
    for item in stream.of(*ON_WEIGHTS):
        own = torch.tensor([p for p, a in zip(item.positions, item.atoms, strict=True) if a == active])
        mask = sparse.masks[item.tensor].index_select(item.dim, own)
        values.append(sparse.get_parameter(item.tensor).detach().index_select(item.dim, own)[mask])
    assert site.magnitude()[active].item() == pytest.approx(abs(torch.cat(values).mean().item()), rel=1e-5)


# -- what a new channel starts with -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rigl-struct", "set"])
def test_growth_leaves_the_outputs_as_they_are(method):
    sparse, optimizer, _ = made(method, drop_fraction=1.0, attach={"update_weights_first": False}.items())
    train(sparse, optimizer, 0, 4)
    before = {name: alive.clone() for name, alive in sparse.active_channels.items()}
    train(sparse, optimizer, 4, 5)
    after = sparse.active_channels
    grown = {name: after[name] & ~before[name] for name in after}
    assert any(atoms.any() for atoms in grown.values())
    drawn = []
    with torch.no_grad():
        for site in sparse.channels.sites:
            for item in site.slices:
                own = torch.tensor([p for p, a in zip(item.positions, item.atoms, strict=True) if grown[site.name][a]])
                tensor = dict(sparse.named_parameters()).get(item.tensor)
                if tensor is None or not len(own):
                    continue
                part = tensor.index_select(item.dim, own.long())
                if item.role == "consumer":
                    assert not part.any()  # nothing reads it yet
                else:
                    assert part.any()
                    if item.role == "producer":
                        drawn.append(part[part != 0] / tensor[sparse.masks[item.tensor]].std())
                for state in optimizer.state[tensor].values():
                    if torch.is_tensor(state) and state.shape == tensor.shape:
                        assert not state.index_select(item.dim, own.long()).any()
    assert 0.7 < torch.cat(drawn).std() < 1.4  # as wide as the weights beside them
    # Without the new channels it computes the same.
    sparse.eval()
    expected = sparse(batch(99)[0])
    with torch.no_grad():
        for site in sparse.channels.sites:
            for item in site.of("producer", "copy", "carrier"):
                own = [p for p, a in zip(item.positions, item.atoms, strict=True) if grown[site.name][a]]
                tensor = dict(sparse.named_parameters()).get(item.tensor)
                if tensor is not None:
                    tensor.index_fill_(item.dim, torch.tensor(own, dtype=torch.int64), 0)
    torch.testing.assert_close(sparse(batch(99)[0]), expected, rtol=1e-12, atol=1e-12)


def test_a_grown_channel_comes_to_life():
    sparse, optimizer, _ = made(drop_fraction=1.0)
    train(sparse, optimizer, 0, 5)
    sites = {site.name: site for site in sparse.channels.sites}
    alive = sparse.active_channels
    train(sparse, optimizer, 5, 8)
    for name, site in sites.items():
        for item in site.of("consumer"):
            own = torch.tensor([p for p, a in zip(item.positions, item.atoms, strict=True) if alive[name][a]])
            others = [dim for dim in range(sparse.get_parameter(item.tensor).ndim) if dim != item.dim]
            assert (sparse.get_parameter(item.tensor).abs().sum(others)[own] > 0).all()


def test_a_channel_that_grows_straight_back_is_untouched_or_new():
    """With everything dropped, what comes back under `kept` has its weights, under `zeroed` nothing reads it."""
    for regrown, untouched in (("kept", True), ("zeroed", False)):
        sparse, optimizer, _ = made(drop_fraction=1.0, decay="constant", semantics={"regrown": regrown})
        train(sparse, optimizer, 0, 4)
        before = sparse.active_channels
        weights = {name: parameter.detach().clone() for name, parameter in sparse.named_parameters()}
        train(sparse, optimizer, 4, 5)
        back = {name: before[name] & alive for name, alive in sparse.active_channels.items()}
        assert any(atoms.any() for atoms in back.values())
        for site in sparse.channels.sites:
            for item in site.of("consumer"):
                own = torch.tensor([p for p, a in zip(item.positions, item.atoms, strict=True) if back[site.name][a]])
                if not len(own):
                    continue
                mask = sparse.masks[item.tensor].index_select(item.dim, own)
                now = sparse.get_parameter(item.tensor).detach().index_select(item.dim, own)
                then = weights[item.tensor].index_select(item.dim, own)
                if untouched:
                    same = now == then
                    assert same[mask & (then != 0)].float().mean() > 0.99, item.tensor
                else:
                    assert not now.any()


# -- the run ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    runs = []
    for seed in (0, 0, 1):
        sparse, optimizer, _ = made("set", seed=seed)
        train(sparse, optimizer, 0, 12)
        runs.append(sparse.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(runs[0].values(), runs[2].values(), strict=True))


def test_weights_first():
    sparse, optimizer, rewirer = made(attach={"update_weights_first": True}.items())
    moved = []

    def check(step):
        if not rewirer.is_update_step():
            assert_inactive_is_zero(sparse, optimizer)

    head = sparse.head.weight.detach().clone()
    train(sparse, optimizer, 0, 4, check)
    moved.append(not torch.equal(head, sparse.head.weight))
    head = sparse.head.weight.detach().clone()
    train(sparse, optimizer, 4, 5, check)  # the update step moves weights too
    moved.append(not torch.equal(head, sparse.head.weight))
    train(sparse, optimizer, 5, 20, check)
    assert all(moved) and sum(sum(record.changed.values()) for record in rewirer.history) > 0


def test_a_rewiring_that_is_skipped_leaves_zeros():
    sparse, optimizer, rewirer = made()
    train(sparse, optimizer, 0, 4)
    before = sparse.active_channels
    optimizer.zero_grad()
    x, y = batch(4)
    (nn.functional.cross_entropy(sparse(x), y) * float("inf")).backward()
    with pytest.warns(fxsparse.FxSparseWarning, match="not finite"):
        optimizer.step()
    assert rewirer.skipped_updates == 1
    assert all(torch.equal(before[name], alive) for name, alive in sparse.active_channels.items())
    assert_inactive_is_zero(sparse)


def test_gradients_of_micro_batches_add_up():
    whole, parts = made(), made()
    for sparse, optimizer, _ in (whole, parts):
        train(sparse, optimizer, 0, 4)
        sparse.eval()  # batch statistics would differ between the halves
        optimizer.zero_grad()
    x, y = batch(4)
    nn.functional.cross_entropy(whole[0](x), y).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (nn.functional.cross_entropy(parts[0](x[half]), y[half]) / 2).backward()
    for _, optimizer, _ in (whole, parts):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].masks.values(), parts[0].masks.values(), strict=True))
    assert sum(whole[2].history[-1].changed.values()) > 0


def test_copies_and_states_taken_between_two_steps_have_zeros():
    sparse, optimizer, rewirer = made()
    train(sparse, optimizer, 0, 4)
    assert rewirer.is_update_step()
    with torch.no_grad():
        makers = [
            sparse.get_parameter(site.producers[0])[~sparse.masks[site.producers[0]]] for site in sparse.channels.sites
        ]
    assert any(bool(values.any()) for values in makers)  # candidates stand in storage now
    state = sparse.state_dict()
    for twin in (copy.deepcopy(sparse), made()[0]):
        twin.load_state_dict(state)
        assert_inactive_is_zero(twin)
    folded = sparse.fold()
    sparse.eval(), folded.eval()
    torch.testing.assert_close(folded(batch(9)[0]), sparse(batch(9)[0]), rtol=1e-12, atol=1e-12)
    loss = train(sparse.train(), optimizer, 4, 12)
    again, own, _ = made()
    assert loss == train(again, own, 0, 12)[4:]  # looking at it has changed nothing


class Halves(nn.Module):
    """A group whose channels go two ways: what is left may all be on one."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.bn, self.head = nn.Linear(5, 8), nn.Linear(4, 4), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        first, second = self.stem(x).chunk(2, 1)
        return self.head(self.bn(torch.cat([first, self.inner(second)], 1)).relu())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_weight_without_an_active_element_stays_finite(seed, compact):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sparse = fxsparse.sparsify(
        Halves(), torch.randn(6, 5), "rigl-struct", sparsity=0.8, update_interval=2, seed=seed, drop_fraction=0.9
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer, 40, compact=compact)
    for _ in range(12):
        optimizer.zero_grad()
        loss = sparse(torch.randn(6, 5, generator=generator)).square().mean()
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in sparse.state_dict().values())


def test_loaded_masks_have_to_consist_of_channels():
    sparse, *_ = made()
    state = sparse.state_dict()
    torn = {**state, "inner.weight_mask": torch.rand(state["inner.weight"].shape) > 0.5}
    with pytest.raises(fxsparse.SelectionError, match="does not consist of whole channels"):
        sparse.load_state_dict(torn)
    assert all(torch.equal(state[key], value) for key, value in sparse.state_dict().items())


def test_the_ledger_counts_the_channels():
    sparse, optimizer, rewirer = made()
    ratio = sparse.flops().ratio
    planned = sparse.training_flops_ratio(30)
    updates = rewirer.schedule.update_steps(30)
    assert planned == pytest.approx(ratio + updates / 30 * (1 - ratio) / 3, rel=1e-3)
    train(sparse, optimizer, 0, 30)
    assert fxsparse.flops.realised_cost(sparse, rewirer).ratio == pytest.approx(planned, rel=1e-6)
    pruned, *_ = made("pruning")
    assert pruned.flops().ratio == 1 and ratio < pruned.training_flops_ratio(30) < 1


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snfs"}, "method snfs is not for granularity 'channel'; dense, static, set, rigl, rigl-struct"),
        ({"granularity": "channels"}, "granularity: 'channels' is not one of weight, channel; did you mean channel"),
        ({"method": "set", "redistribution": "gradient"}, "redistribution: channels do not move between groups"),
        ({"method": "pruning", "scope": "global"}, "scope: channels are pruned group by group"),
        ({"semantics": "rigl-tf"}, "optimizer_state 'new' is not for channels"),
        ({"sparsity": 0.999}, "out of reach by removing channels"),
        ({"distribution": {"stem.weight": 0.5}}, "no sparsity given for the channels of"),
        ({"explicit": {"head.weight": 0.5}}, "explicit: 'head.weight' makes no channels that can be dropped"),
        ({"dense": "*"}, "no channel of this model can be dropped"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(fxsparse.FxSparseError, match=message):
        made(**({"method": "rigl"} | options))


def test_dense_and_excluded_weights_keep_both_sides():
    for options in ({"dense": "inner"}, {"exclude": "inner"}):
        sparse, *_ = made("static", sparsity=0.2, **options)
        small = sparse.compact()
        assert small.inner.weight.shape == (12, 8, 3, 3)
        assert small.last.weight.shape[0] < 10


def test_masks_of_whole_channels_are_taken_over():
    sparse, *_ = made("set", sparsity=0.5)
    twin, *_ = made("static", sparsity=None, masks=dict(sparse.masks))
    assert all(torch.equal(a, b) for a, b in zip(sparse.masks.values(), twin.masks.values(), strict=True))
    assert twin.channels.targets == {name: int(alive.sum()) for name, alive in sparse.active_channels.items()}
    torn = {name: mask.clone() for name, mask in sparse.masks.items()}
    row = torn["inner.weight"].flatten(1).any(1).nonzero()[0]
    torn["inner.weight"][row, 0, 0, 0] ^= True
    with pytest.raises(fxsparse.SelectionError, match=r"inner\.weight does not consist of whole channels"):
        made("static", sparsity=None, masks=torn)


def test_explicit_and_mapped_groups():
    sparse, *_ = made("static", sparsity=0.5, explicit={"last.weight": 0.8})
    assert sparse.channels.targets["channels of last.weight"] == 2
    by_hand = {"stem.weight": 0.5, "inner.weight": 0.25, "last.weight": 0.4}
    sparse, *_ = made("static", distribution=by_hand)
    assert list(sparse.channels.targets.values()) == [4, 9, 6]


@pytest.mark.parametrize("name", ["wide_resnet22_2", "resnet50_cifar", "lenet5", "small_resnet"])
def test_the_networks_of_the_papers(name):
    model, x = models.build(name), models.example_input(name)
    for distribution in ("uniform", "er", "erk"):
        sparse = fxsparse.sparsify(model, x, "rigl-struct", sparsity=0.8, distribution=distribution)
        inside = [site for site in sparse.sites if site.name not in sparse.channels.outside]
        left = sum(sparse.active_counts[site.name] for site in inside) / sum(site.numel for site in inside)
        assert left <= 0.2 and (left > 0.19 or name in ("lenet5", "small_resnet"))  # few channels make large steps
        small = sparse.compact()
        counted = sum(small.get_parameter(site.name).numel() for site in sparse.sites)
        assert counted == sum(sparse.active_counts.values())
        assert fxsparse.count_flops(small).flops == sparse.flops().flops
