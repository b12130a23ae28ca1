"""Blocks of output channels dropped and grown as one: against plain Python, as laws, and from run to run."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse.flops import realised_cost

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}
METHODS = {
    "static": ("static", {}),
    "set": ("set", {}),
    "rigl": ("rigl", {}),
    "pruning": ("pruning", {}),
    "snip": ("snip", {"batches": 2}),
    "snfs without redistribution": ("snfs", {"redistribution": "none"}),
    "rigl, forbidden": ("rigl", {"semantics": {"regrown": "forbidden", "rounding": "ceil"}}),
    "rigl as reported": ("rigl", {"semantics": "report"}),
    "rigl as in tensorflow": ("rigl", {"semantics": "rigl-tf"}),
}
MOVING = {
    "rigl-sg": ("rigl-sg", {}),
    "rigl-sm": ("rigl-sm", {}),
    "snfs": ("snfs", {}),
    "snfs by the optimizer": ("snfs", {"momentum": "optimizer"}),
    "dsr": ("dsr", {"threshold": 0.05}),
    "pruning globally": ("pruning", {"scope": "global"}),
    "snip globally": ("snip", {"scope": "global"}),
}


class Net(nn.Module):
    """One of each: a convolution, a grouped one, a transposed one, a linear; some with a smaller last block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.grouped = nn.Conv2d(10, 12, 3, groups=2, padding=1)
        self.transposed = nn.ConvTranspose2d(12, 7, 2)
        self.head = nn.Linear(7, 6)

    def forward(self, x):
        return self.head(self.transposed(self.grouped(self.conv(x).relu()).relu()).mean((2, 3)))


def even_net():
    """All channels are multiples of 4."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(500 + step)
    x = torch.randn(6, 3, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(4, (6,), generator=generator)


def made(method="rigl", model=Net, steps=20, optimizer="sgd", **options):
    torch.manual_seed(0)
    defaults = {"sparsity": 0.6, "update_interval": 2, "drop_fraction": 0.5, "granularity": (4, 1)}
    sparse = fxsparse.sparsify(model().double(), batch(0)[0], method, **(defaults | options))
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


# -- what a block is, told by loops ---------------------------------------------------------------------------


def block_of(site, index, rows):
    """The block that an element of the weight is in: its place in the order of blocks, as a tuple."""
    dim = 1 if "transposed" in site.name else 0
    groups = 2 if "grouped" in site.name else 1
    own = site.shape[dim] // groups
    group, within = divmod(index[dim], own)
    of_group = -(-own // rows)
    return (*index[:dim], group * of_group + within // rows, *index[dim + 1 :])


def blocks_of(site, rows):
    """Block -> the elements in it; in the order in which ties are broken."""
    blocks = {}
    for index in itertools.product(*(range(n) for n in site.shape)):
        blocks.setdefault(block_of(site, index, rows), []).append(index)
    return dict(sorted(blocks.items()))


def assert_whole(sparse, rows=4):
    for site in sparse.sites:
        mask = sparse.masks[site.name]
        for elements in blocks_of(site, rows).values():
            assert len({bool(mask[index]) for index in elements}) == 1


def active_blocks(sparse, rows=4):
    counts = {}
    for site in sparse.sites:
        mask = sparse.masks[site.name]
        counts[site.name] = sum(bool(mask[elements[0]]) for elements in blocks_of(site, rows).values())
    return counts


# -- against plain Python -------------------------------------------------------------------------------------


def rewired(site, rows, weight, gradient, mask, fraction):
    """The new set of active blocks: RigL with lists and dicts."""
    blocks = blocks_of(site, rows)
    active = {b for b, elements in blocks.items() if mask[elements[0]]}
    k = int(fraction * len(active) + 1e-9)
    size = {b: sum(abs(weight[i].item()) for i in e) / len(e) for b, e in blocks.items()}
    push = {b: sum(abs(gradient[i].item()) for i in e) / len(e) for b, e in blocks.items()}
    latest_first = sorted(active, reverse=True)
    dropped = sorted(latest_first, key=lambda b: size[b])[:k]
    kept = active - set(dropped)
    grown = sorted((b for b in blocks if b not in kept), key=lambda b: -push[b])[:k]
    return {b: elements for b, elements in blocks.items() if b in kept or b in grown}


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 16])
def test_a_run_of_rigl_is_that_of_plain_python(rows):
    steps, lr, momentum = 9, 0.05, 0.9
    sparse, _, _ = made(granularity=(rows, 1), decay="constant", drop_fraction=0.4, stop_fraction=1.0)
    sparse._rewirer.detach()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=lr, momentum=momentum)
    rewirer = sparse.attach(optimizer, steps)
    # The twin: an eager network with masked weights, all gradients dense, momentum by hand.
    twin = sparse.copy_to(Net().double())
    masks = {name: mask.clone() for name, mask in sparse.masks.items()}
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    sites = {site.name: site for site in sparse.sites}
    for t in range(steps):
        x, y = batch(t)
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            if t > 0 and t % 2 == 0:
                for name, site in sites.items():
                    weight, mask = twin.get_parameter(name), masks[name]
                    if mask.all():
                        continue
                    chosen = rewired(site, rows, weight, weight.grad, mask, 0.4)
                    after = torch.zeros_like(mask)
                    for elements in chosen.values():
                        for index in elements:
                            after[index] = True
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
    assert len(rewirer.history) == 4
    assert sum(sum(record.changed.values()) for record in rewirer.history) > 20
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name), parameter)


# -- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", METHODS)
def test_masks_stay_whole_and_counts_are_kept(case, optimizer):
    method, options = METHODS[case]
    sparse, own, rewirer = made(method, optimizer=optimizer, **options)
    first = active_blocks(sparse)
    targets = {}
    for site in sparse.sites:
        blocks = len(blocks_of(site, 4))
        targets[site.name] = blocks - int(sparse.target_sparsities[site.name] * blocks + 1e-9)
    if options.get("semantics") != "report" and method not in ("pruning", "snip"):
        assert first == targets

    def each(step):
        assert_whole(sparse)
        if method not in ("pruning", "snip"):
            assert active_blocks(sparse) == first
        for name, mask in sparse.masks.items():
            weight = sparse.get_parameter(name)
            assert not weight[~mask].any()
            if "tensorflow" not in case:
                for state in own.state[weight].values():
                    assert not isinstance(state, torch.Tensor) or state.shape != mask.shape or not state[~mask].any()

    train(sparse, own, 0, 20, each)
    assert active_blocks(sparse) == (targets if method in ("pruning", "snip") else first)
    assert any(sum(record.changed.values()) for record in rewirer.history) == (method in ("set", "rigl", "snfs"))
    for record in rewirer.history[-1:]:
        assert record.active == {name: int(mask.sum()) for name, mask in sparse.masks.items()}


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("case", MOVING)
def test_where_blocks_move_between_layers_their_number_is_kept(case):
    method, options = MOVING[case]
    sparse, own, _ = made(method, even_net, **options)
    blocks = {site.name: site.numel // 4 for site in sparse.sites}
    target = sum(n - int(sparse.target_sparsities[name] * n + 1e-9) for name, n in blocks.items())
    from_dense = method in ("pruning", "snip")

    def each(step):
        assert_whole(sparse)
        if not from_dense:
            assert sum(sparse.active_counts.values()) == 4 * target
        seen.append(sparse.active_counts)

    seen = [sparse.active_counts]
    train(sparse, own, 0, 20, each)
    assert sum(sparse.active_counts.values()) == 4 * target
    assert any(counts != seen[0] for counts in seen)


@pytest.mark.parametrize("case", MOVING)
def test_blocks_of_several_sizes_do_not_move(case):
    method, options = MOVING[case]
    with pytest.raises(
        fxsparse.ConfigError, match=r"moves blocks between the layers.*conv\.weight.*10 output channels"
    ):
        made(method, **options)
    made(method, sparsity=0.0, **options)  # nothing is there to move


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("case", [*METHODS, *MOVING])
def test_blocks_of_one_are_single_weights(case):
    method, options = (METHODS | MOVING)[case]
    runs = []
    for granularity in ("weight", (1, 1)):
        sparse, own, rewirer = made(method, granularity=granularity, **options)
        losses = train(sparse, own, 0, 12)
        runs.append((losses, sparse.state_dict(), rewirer.history, rewirer.report()))
    (losses, state, history, report), (own_losses, own_state, own_history, own_report) = runs
    assert losses == own_losses
    assert all(torch.equal(state[key], own_state[key]) for key in state)
    assert history == own_history
    assert report == own_report


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_budgets(distribution, rows):
    sparse, *_ = made("static", sparsity=0.7, distribution=distribution, granularity=(rows, 1))
    given = made("static", sparsity=0.7, distribution=distribution, granularity="weight")[0].target_sparsities
    assert sparse.target_sparsities == given
    for site in sparse.sites:
        blocks = len(blocks_of(site, rows))
        assert active_blocks(sparse, rows)[site.name] == blocks - int(given[site.name] * blocks + 1e-9)
    assert_whole(sparse, rows)
    even, *_ = made("static", even_net, sparsity=0.7, distribution=distribution)
    for site in even.sites:
        removed = site.numel - even.active_counts[site.name]
        assert removed == int(even.target_sparsities[site.name] * site.numel / 4 + 1e-9) * 4


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_budget_in_flops(distribution):
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 32))
    sparse = fxsparse.sparsify(
        wide, torch.randn(1, 3, 6, 6), "static", flops=0.5, distribution=distribution, granularity=(8, 1)
    )
    assert sparse.flops().ratio == pytest.approx(0.5, rel=1e-3)
    assert all(count % 8 == 0 for count in sparse.active_counts.values())
    # In two columns of 64 blocks each, 32 and 33 of 64 are the neighbours of 0.51; single weights come nearer.
    columns = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    how = {"flops": 0.51, "distribution": "erk", "verify": False}
    ratio = fxsparse.sparsify(columns, torch.randn(1, 64), "static", **how).flops().ratio
    assert ratio == pytest.approx(0.51, rel=1e-3)
    with pytest.raises(fxsparse.AllocationError, match=r"the nearest to 0\.51 of dense .* is 0\.51562"):
        fxsparse.sparsify(columns, torch.randn(1, 64), "static", granularity=(64, 1), **how)


@pytest.mark.parametrize("method", ["static", "rigl", "pruning", "snip"])
def test_what_is_planned_is_what_is_done(method):
    sparse, own, rewirer = made(method, even_net)
    planned = sparse.planned_counts(20)
    cost = fxsparse.planned_cost(sparse, 20).ratio
    train(sparse, own, 0, 20)
    assert planned[-1][1] == sparse.active_counts
    assert realised_cost(sparse, rewirer).ratio == pytest.approx(cost, rel=1e-9)


def test_counts_need_no_masks():
    with torch.device("meta"):
        model, x = even_net(), torch.randn(1, 3, 6, 6)
    sparse = fxsparse.sparsify(model, x, "static", sparsity=0.6, granularity=(4, 1), verify=False)
    real, *_ = made("static", even_net, sparsity=0.6)
    assert sparse.active_counts == sparse.target_counts == real.active_counts


# -- state ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*about to be emptied")
@pytest.mark.parametrize("case", ["rigl", "set", "pruning", "snip", "snfs without redistribution"])
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
    saved = torch.load(file, weights_only=False)
    again, again_own, again_rewirer = made(method, seed=0, **options)
    for part, state in zip((again, again_own, again_rewirer), saved, strict=True):
        part.load_state_dict(state)
    assert train(again, again_own, stop, 14) == losses[stop:]
    assert all(torch.equal(a, b) for a, b in zip(whole.masks.values(), again.masks.values(), strict=True))
    assert rewirer.history == again_rewirer.history
    assert rewirer.report() == again_rewirer.report()


def test_a_state_of_another_granularity_is_refused():
    single, _, rewirer = made(granularity="weight")
    blocks, _, own = made()
    with pytest.raises(fxsparse.SelectionError, match="does not consist of whole blocks of 4x1; use granularity='wei"):
        blocks.load_state_dict(single.state_dict())
    with pytest.raises(fxsparse.RuntimeStateError, match="the saved rewirer has granularity 'weight', this one '4x1'"):
        own.load_state_dict(rewirer.state_dict())
    old = rewirer.state_dict()
    del old["granularity"]  # as older ones are
    rewirer.load_state_dict(old)


def test_a_mask_that_was_torn_from_outside_is_noticed():
    sparse, own, _ = made(update_interval=1)
    train(sparse, own, 0, 2)
    with torch.no_grad():
        sparse.masks["conv.weight"][0, 0, 0, 0] ^= True
    with pytest.raises(fxsparse.RuntimeStateError, match=r"mask of conv\.weight does not consist of whole blocks"):
        train(sparse, own, 2, 3)


def test_given_masks():
    donor, *_ = made("rigl")
    masks = dict(donor.masks)
    sparse, own, _ = made("rigl", sparsity=None, masks=masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks.items())
    counts = active_blocks(sparse)
    assert sparse.target_units == counts
    train(sparse, own, 0, 8)
    assert active_blocks(sparse) == counts
    masks["head.weight"] = masks["head.weight"].clone()
    masks["head.weight"][1, 0] ^= True
    with pytest.raises(fxsparse.SelectionError, match=r"that of head\.weight does not consist of whole blocks of 4x1"):
        made("lottery", sparsity=None, masks=masks)


def test_copies_keep_their_granularity():
    sparse, *_ = made()
    twin = copy.deepcopy(sparse)
    assert twin.granularity == sparse.granularity
    assert twin.unit_layouts == sparse.unit_layouts
    own = OPTIMIZERS["sgd"](twin.parameters())
    twin.attach(own, 20)
    train(twin, own, 0, 5)
    assert_whole(twin)
    assert not hasattr(sparse.fold(), "granularity")


def test_the_report_says_so():
    lines = made()[0].report().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("granularity 4x1"))
    assert "4 consecutive output channels at one input position" in lines[at]
    assert lines[at + 1 : at + 5] == [
        "  smaller ones: conv.weight has 10 output channels: blocks of 2 x 4 + 2",
        "  smaller ones: grouped.weight has 6 output channels in each of 2 groups: blocks of 1 x 4 + 2",
        "  smaller ones: transposed.weight has 7 output channels: blocks of 1 x 4 + 3",
        "  smaller ones: head.weight has 6 output channels: blocks of 1 x 4 + 2",
    ]
    assert "granularity" not in made(granularity="weight")[0].report()


@pytest.mark.parametrize("method", ["deepr", "small-dense", "rigl-struct"])
def test_methods_that_are_not_for_blocks(method):
    with pytest.raises(fxsparse.ConfigError, match=f"method {method} is not for granularity '4x1'; dense, static, sn"):
        made(method)
