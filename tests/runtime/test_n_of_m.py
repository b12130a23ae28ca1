"""N of every M weights: against plain Python, as laws over many rewirings, and from run to run."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse.flops import realised_cost
from fxsparse.runtime.group_selection import rewire_in_groups

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
METHODS = {
    "static": ("static", {}),
    "set": ("set", {}),
    "rigl": ("rigl", {}),
    "pruning": ("pruning", {}),
    "snip": ("snip", {"batches": 2}),
    "snfs without redistribution": ("snfs", {"redistribution": "none"}),
    "rigl, forbidden": ("rigl", {"semantics": {"regrown": "forbidden", "rounding": "ceil"}}),
    "rigl as reported": ("rigl", {"semantics": {"preset": "report", "initial_masks": "exact"}}),
    "rigl as in tensorflow": ("rigl", {"semantics": "rigl-tf"}),
}
STARTS_DENSE = ("pruning", "snip")
INPUTS = {"grouped.weight": 1, "transposed.weight": 0, "product": 0, "head.weight": 1}
"""Which dimension of each weight of `Net` the inputs are; that of the first convolution is no multiple of 4."""


class Net(nn.Module):
    """A first convolution, a grouped one, a transposed one with groups, `x @ w`, and a linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, padding=1)
        self.transposed = nn.ConvTranspose2d(16, 12, 2, groups=2)
        self.product = nn.Parameter(0.3 * torch.randn(12, 8))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.transposed(self.grouped(self.conv(x).relu()).relu()).mean((2, 3))
        return self.head((x @ self.product).relu())


def batch(step):
    generator = torch.Generator().manual_seed(500 + step)
    x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (6,), generator=generator)


def made(method="rigl", model=Net, steps=20, optimizer="sgd", layout=torch.contiguous_format, **options):
    torch.manual_seed(0)
    defaults = {"update_interval": 2, "drop_fraction": 0.5, "granularity": "2:4"}
    network = model().double().to(memory_format=layout)
    sparse = fxsparse.sparsify(network, batch(0)[0], method, **(defaults | options))
    own = OPTIMIZERS[optimizer](sparse.parameters())
    return sparse, own, sparse.attach(own, steps)


def train(sparse, optimizer, start, stop, each=lambda step: None):
    losses = []
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each(step)
    return losses


def groups(name, shape, of=4):
    """Lists of the indices of every group."""
    dim, found = INPUTS[name], {}
    for index in itertools.product(*map(range, shape)):
        found.setdefault((*index[:dim], index[dim] // of, *index[dim + 1 :]), []).append(index)
    return list(found.values())


def counts(mask, name, of=4):
    """The different numbers of active weights in a group."""
    return set(mask.movedim(INPUTS[name], -1).unflatten(-1, (-1, of)).sum(-1).flatten().tolist())


# -- against plain Python -------------------------------------------------------------------------------------


def rewired(name, weight, score, mask, k, regrows, keep=2, of=4):
    """The new mask, with lists and dicts: what goes is ranked over all, what comes within the groups that lost."""
    shape = weight.shape
    indices = list(itertools.product(*map(range, shape)))
    group_of = {index: number for number, group in enumerate(groups(name, shape, of)) for index in group}
    weight, score, mask = (dict(zip(indices, t.flatten().tolist(), strict=True)) for t in (weight, score, mask))
    active = [index for index in indices if mask[index]]
    can_lose = keep if regrows else min(keep, of - keep)
    dropped, lost = [], dict.fromkeys(group_of.values(), 0)
    latest_first = active[::-1]
    for index in sorted(latest_first, key=lambda i: abs(weight[i])):
        if len(dropped) < k and lost[group_of[index]] < can_lose:
            dropped.append(index)
            lost[group_of[index]] += 1
    after = dict(mask)
    for index in dropped:
        after[index] = False
    grown = []
    for number, group in enumerate(groups(name, shape, of)):
        free = [index for index in group if not after[index] and (regrows or not mask[index])]
        grown += sorted(free, key=lambda i: -score[i])[: lost[number]]
    for index in grown:
        after[index] = True
    return torch.tensor(list(after.values())).view(shape)


@pytest.mark.parametrize("regrows", [True, False])
@pytest.mark.parametrize("keep_of", [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_rewiring_is_that_of_plain_python(seed, keep_of, regrows):
    keep, of = keep_of
    generator = torch.Generator().manual_seed(seed)
    granularity = fxsparse.core.granularity.NofM(keep, of)
    shape = (3, 16, 2, 2)
    site = fxsparse.core.records.WeightSite("grouped.weight", shape, ())
    layout = granularity.groups(site)
    weight = torch.randn(shape, generator=generator)
    score = torch.randn(shape, generator=generator).abs()
    if seed == 2:  # many ties
        weight, score = weight.round(), score.round()
    mask = layout.random_mask(weight, generator)
    most = int(mask.sum()) if regrows else min(int(mask.sum()), int((~mask).sum()))
    for k in (0, 1, most // 3, most):
        new, kept = rewire_in_groups(weight.abs(), lambda: score, mask, k, k, layout, regrows)
        expected = rewired("grouped.weight", weight, score, mask, k, regrows, keep, of)
        assert torch.equal(new, expected)
        assert int((mask & ~kept).sum()) == k
        assert counts(new, "grouped.weight", of) == {keep}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_run_of_rigl_is_that_of_plain_python(layout):
    steps, lr, momentum = 9, 0.05, 0.9
    sparse, _, _ = made(decay="constant", drop_fraction=0.4, stop_fraction=1.0, layout=layout)
    sparse._rewirer.detach()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=lr, momentum=momentum)
    rewirer = sparse.attach(optimizer, steps)
    twin = sparse.copy_to(Net().double())
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for t in range(steps):
        x, y = batch(t)
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            if t > 0 and t % 2 == 0:
                for name, mask in masks.items():
                    if name not in INPUTS:
                        continue
                    weight = twin.get_parameter(name)
                    k = int(0.4 * int(mask.sum()) + 1e-9)
                    after = rewired(name, weight, weight.grad.abs(), mask, k, True)
                    fresh = after & ~mask
                    weight[~after | fresh] = 0
                    velocity[name][~after | fresh] = 0
                    masks[name] = after
            else:
                for name, parameter in twin.named_parameters():
                    gradient = parameter.grad * masks[name] if name in masks else parameter.grad
                    velocity[name] = momentum * velocity[name] + gradient
                    parameter -= lr * velocity[name]
        train(sparse, optimizer, t, t + 1)
        for name, mask in masks.items():
            assert torch.equal(sparse.masks[name], mask), (t, name)
    assert sum(sum(record.changed.values()) for record in rewirer.history) > 100
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name), parameter)


# -- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["2:4", "1:4", "3:4"])
@pytest.mark.parametrize("case", METHODS)
def test_every_group_keeps_its_number(case, granularity, optimizer):
    method, options = METHODS[case]
    sparse, own, rewirer = made(method, optimizer=optimizer, granularity=granularity, **options)
    keep = int(granularity[0])
    assert sparse.target_sparsities == {"conv.weight": 0.0, **dict.fromkeys(INPUTS, 1 - keep / 4)}

    def each(step):
        assert bool(sparse.masks["conv.weight"].all())
        for name in INPUTS:
            mask, weight = sparse.masks[name], sparse.get_parameter(name)
            found = counts(mask, name)
            assert found == {keep} if method not in STARTS_DENSE else min(found) >= keep
            assert not weight[~mask].any()
            if "tensorflow" not in case:
                for state in own.state[weight].values():
                    assert not isinstance(state, torch.Tensor) or state.shape != mask.shape or not state[~mask].any()

    each(-1)
    train(sparse, own, 0, 20, each)
    assert all(counts(sparse.masks[name], name) == {keep} for name in INPUTS)
    assert any(sum(record.changed.values()) for record in rewirer.history) == (method in ("set", "rigl", "snfs"))
    assert rewirer.history[-1:] == [] or rewirer.history[-1].active == sparse.active_counts
    masked_out = sum(sparse.sites[i].numel for i in range(1, 5)) * (4 - keep) / 4
    assert sparse.sparsity == pytest.approx(masked_out / sum(site.numel for site in sparse.sites))


def test_pruning_takes_the_least_of_what_a_group_can_spare():
    sparse, own, _ = made("pruning", begin=2, end=10)
    before, seen = {}, []

    def each(step):
        for name in INPUTS:
            mask = sparse.masks[name]
            gone = before[name][0] & ~mask
            if gone.any():
                indices = itertools.product(*map(range, mask.shape))
                weight = dict(zip(indices, before[name][1].abs().flatten().tolist(), strict=True))
                alive = {tuple(index) for index in before[name][0].nonzero().tolist()}
                seen.append(name)
                spared = [  # all beyond the two largest of their group
                    index
                    for group in groups(name, mask.shape)
                    for index in sorted((i for i in group if i in alive), key=lambda i: -weight[i])[2:]
                ]
                number = int(gone.sum())
                expected = sorted(spared, key=lambda index: weight[index])[:number]
                assert {tuple(index) for index in gone.nonzero().tolist()} == set(expected)
            assert not (mask & ~before[name][0]).any()

    # In a step of pruning the weights move first: look at them there.
    def look(*_):
        for name in INPUTS:
            before[name] = (sparse.masks[name].clone(), sparse.get_parameter(name).detach().clone())

    own._optimizer_step_post_hooks[-1] = look
    own._optimizer_step_post_hooks.move_to_end(-1, last=False)
    train(sparse, own, 0, 12, each)
    assert len(seen) >= 8
    assert all(counts(sparse.masks[name], name) == {2} for name in INPUTS)


def test_snip_keeps_the_most_sensitive_of_every_group():
    sparse, own, _ = made("snip")
    weights = {name: sparse.get_parameter(name).detach().clone() for name in INPUTS}
    x, y = batch(0)
    own.zero_grad()
    F.cross_entropy(sparse(x), y).backward()
    score = {name: (weights[name] * sparse.get_parameter(name).grad).abs() for name in INPUTS}
    own.step()
    for name in INPUTS:
        for group in groups(name, score[name].shape):
            best = sorted(group, key=lambda index: -score[name][index])[:2]
            assert {index for index in group if sparse.masks[name][index]} == set(best)


@pytest.mark.parametrize("regrown", ["kept", "forbidden"])
def test_what_was_dropped_may_come_back_or_not(regrown):
    sparse, own, _ = made("rigl", drop_fraction=0.5, decay="constant", semantics={"regrown": regrown})
    before = {name: sparse.masks[name].clone() for name in INPUTS}
    train(sparse, own, 0, 3)
    fresh = {name: int((sparse.masks[name] & ~before[name]).sum()) for name in INPUTS}
    k = {name: int(before[name].sum()) // 2 for name in INPUTS}
    assert fresh == k if regrown == "forbidden" else all(0 < fresh[name] <= k[name] for name in INPUTS) and fresh != k


def test_set_grows_anywhere_in_a_group():
    sparse, own, _ = made("set", steps=400, update_interval=1, decay="constant", drop_fraction=1.0)
    first = {name: sparse.masks[name].clone() for name in INPUTS}
    ever = {name: torch.zeros_like(mask) for name, mask in first.items()}

    def each(step):
        for name in INPUTS:
            ever[name] |= sparse.masks[name]

    train(sparse, own, 0, 40, each)
    assert all(bool(ever[name].all()) for name in INPUTS)


@pytest.mark.parametrize("method", ["static", "rigl", "pruning", "snip"])
def test_what_is_planned_is_what_is_done(method):
    sparse, own, rewirer = made(method)
    planned, cost = sparse.planned_counts(20), fxsparse.planned_cost(sparse, 20).ratio
    train(sparse, own, 0, 20)
    assert planned[-1][1] == sparse.active_counts == sparse.target_counts
    assert realised_cost(sparse, rewirer).ratio == pytest.approx(cost, rel=1e-9)


def test_flops_and_the_report():
    sparse, *_ = made()
    flops = {cost.weight: (cost.sparse_macs, cost.macs) for cost in sparse.flops().nodes if cost.weight}
    assert flops["head.weight"] == (6 * 8 * 6 // 2, 6 * 8 * 6)  # a batch of 6
    assert flops["grouped.weight"] == (6 * 36 * 16 * 8 * 9 // 2, 6 * 36 * 16 * 8 * 9)
    assert flops["conv.weight"][0] == flops["conv.weight"][1]
    lines = sparse.report().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("granularity 2:4: 2 of every 4 consecutive"))
    assert "the sparsity of a weight is 0.5" in lines[at]
    assert lines[at + 1] == "  left dense: conv.weight, its 3 input channels are no multiple of 4"
    assert "left dense" not in lines[at + 2]


def test_counts_need_no_masks():
    with torch.device("meta"):
        model, x = Net(), torch.randn(6, 3, 6, 6)
    sparse = fxsparse.sparsify(model, x, "rigl", granularity="2:4", verify=False)
    assert sparse.active_counts == sparse.target_counts == made()[0].active_counts


def test_dense_and_excluded_weights():
    sparse, own, _ = made("rigl", dense=["head.weight"], exclude=["grouped.weight"])
    train(sparse, own, 0, 6)
    assert "grouped.weight" not in sparse.masks
    assert bool(sparse.masks["head.weight"].all())
    assert sparse.densities["product"] == 0.5


def test_groups_of_a_transposed_convolution_do_not_cross_its_own():
    """12 inputs in 2 groups of 6: a multiple of 4 in all, and not in a group."""
    model = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, groups=2), nn.Conv2d(8, 4, 1))
    sparse = fxsparse.sparsify(model, torch.randn(1, 12, 4, 4), granularity="2:4")
    assert sparse.left_dense == {"0.weight": "its 6 input channels in a group are no multiple of 4"}


# -- state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["rigl", "set", "pruning", "snip", "rigl as reported"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(case, stop):
    method, options = METHODS[case]
    whole, own, rewirer = made(method, **options)
    losses = train(whole, own, 0, 14)
    first, first_own, first_rewirer = made(method, **options)
    train(first, first_own, 0, stop)
    file = io.BytesIO()
    torch.save([first.state_dict(), first_own.state_dict(), first_rewirer.state_dict()], file)
    file.seek(0)
    again = made(method, seed=0, **options)
    for part, state in zip(again, torch.load(file, weights_only=False), strict=True):
        part.load_state_dict(state)
    assert train(again[0], again[1], stop, 14) == losses[stop:]
    assert all(torch.equal(a, b) for a, b in zip(whole.masks.values(), again[0].masks.values(), strict=True))
    assert rewirer.history == again[2].history


def test_masks_that_are_not_n_of_m_are_refused(tmp_path):
    sparse, _, rewirer = made()
    single, _, other = made(granularity="weight", sparsity=0.5)
    message = "grouped.weight does not have 2 active in every 4 consecutive weights along its input dimension; use gran"
    with pytest.raises(fxsparse.SelectionError, match=message):
        sparse.load_state_dict(single.state_dict())
    with pytest.raises(fxsparse.RuntimeStateError, match="has granularity 'weight', this one '2:4'"):
        rewirer.load_state_dict(other.state_dict())
    with pytest.raises(fxsparse.SelectionError, match=r"conv\.weight cannot be 2:4: its 3 input channels are no mult"):
        made(masks=single.masks)
    given = dict(sparse.masks)
    given["head.weight"] = ~given["head.weight"]
    given["product"] = torch.ones_like(given["product"])
    again, again_own, _ = made(masks=given)
    assert torch.equal(again.masks["head.weight"], given["head.weight"])
    train(again, again_own, 0, 6)
    assert counts(again.masks["head.weight"], "head.weight") == {2} and bool(again.masks["product"].all())
    given["head.weight"] = torch.roll(given["head.weight"], 1, dims=1)
    with pytest.raises(fxsparse.SelectionError, match=r"that of head\.weight does not have 2 active"):
        made("lottery", masks=given)
    fxsparse.save_sparse(single, tmp_path / "single.safetensors")
    with pytest.raises(fxsparse.SelectionError, match="does not have 2 active in every 4"):
        fxsparse.load_sparse(sparse, tmp_path / "single.safetensors")
    fxsparse.save_sparse(again, tmp_path / "own.safetensors")
    sparse = made(masks=dict(again.masks))[0]
    fxsparse.load_sparse(sparse, tmp_path / "own.safetensors")
    assert torch.equal(sparse.masks["head.weight"], again.masks["head.weight"])


def test_a_mask_that_was_changed_from_outside_is_noticed():
    sparse, own, _ = made(update_interval=1)
    train(sparse, own, 0, 2)
    with torch.no_grad():
        sparse.masks["head.weight"][0, 0] ^= True
    with pytest.raises(fxsparse.RuntimeStateError, match=r"mask of head\.weight does not have 2 active in every 4"):
        train(sparse, own, 2, 3)


def test_lowered_training_takes_the_same_masks():
    class Small(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4)
            )

    runs = []
    for lowered in (False, True):
        sparse, own, _ = made(model=Small)
        if lowered:
            sparse.lower(train=True, layers="all")
            assert len(sparse.lowered) == 3
        train(sparse, own, 0, 12)
        runs.append({name: mask.clone() for name, mask in sparse.masks.items()})
    assert all(torch.equal(mask, runs[1][name]) for name, mask in runs[0].items())
    assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for name, mask in runs[1].items() if name != "0.weight")


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dense", {}, "method dense is not for granularity '2:4'; static, snip, set, rigl, snfs, pruning, lottery are"),
        ("deepr", {}, "method deepr is not for granularity '2:4'"),
        ("dsr", {}, "method dsr is not for granularity '2:4'"),
        ("rigl-sg", {}, "method rigl-sg is not for granularity '2:4'"),
        ("small-dense", {}, "method small-dense is not for"),
        ("rigl-struct", {}, "method rigl-struct is not for"),
        ("rigl", {"redistribution": "gradient"}, "connections do not move between layers; use redistribution='none'"),
        ("snfs", {}, "connections do not move between layers"),
        ("pruning", {"scope": "global"}, "scope: every layer has the density of granularity 2:4; use 'layer'"),
        ("rigl", {"semantics": "report"}, "initial_masks 'bernoulli' does not give 2 of every 4 weights"),
        ("rigl", {"sparsity": 0.9}, "sparsity: 0.9, and granularity 2:4 fixes the sparsity of every layer at 0.5"),
        ("rigl", {"flops": 0.3}, "flops: granularity 2:4 fixes"),
        ("rigl", {"distribution": "er"}, "distribution: granularity 2:4 fixes"),
        ("rigl", {"distribution": {"*": 0.5}}, "distribution: granularity 2:4 fixes"),
        ("rigl", {"explicit": {"head.weight": 0.5}}, "explicit: granularity 2:4 fixes"),
        ("rigl", {"power": 0.5}, "power: granularity 2:4 fixes"),
    ],
)
def test_what_is_refused(method, options, message):
    with pytest.raises(fxsparse.ConfigError, match=message):
        made(method, **options)


def test_what_is_accepted():
    assert made(sparsity=0.5)[0].target_sparsities["head.weight"] == 0.5
    assert made(sparsity=0.667, granularity="1:3", model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 6)))
    made(distribution="uniform")
    made("pruning", semantics={"preset": "report"}, scope="layer")  # dense at first, as bernoulli masks are then too
    with pytest.raises(fxsparse.SelectionError, match=r"granularity 2:7 fits no weight: conv\.weight stays dense, sin"):
        made(granularity="2:7")
