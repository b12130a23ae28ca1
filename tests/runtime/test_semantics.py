"""Every choice on which implementations differ, by hand, and the presets."""

import dataclasses

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import ConfigError, Semantics
from fxsparse.runtime.semantics import CHOICES, PRESETS, make_semantics, preset_of

W, M = [4.0, 1.0, 2.0, 3.0, 0.0, 0.0], [1, 1, 1, 1, 0, 0]
G = [0.1, 0.1, 0.1, 0.1, 5.0, 0.05]
"""With k = 2 of W: drops 1 and 2; of the gradients at {1, 2, 4, 5} it grows 4 and, by the tie rule, 1 again."""

PLAIN = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
MOMENTUM = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.5)}


def rewired(bench, semantics, method="rigl", weights=W, mask=M, gradient=G, **options):
    run = bench([weights], [mask], method, **(PLAIN | options), semantics=semantics)
    for _ in range(2 if make_semantics(semantics).start == "after" else 1):
        run.step(gradient)
    return run


# -- rounding and what comes back ---------------------------------------------------------------------------


def test_rounding(bench):
    # .3 of 5 active is 1.5: the floor drops one, the ceiling two.
    weights, mask, gradient = [1.0, 2.0, 3.0, 4.0, 5.0, 0, 0, 0], [1] * 5 + [0] * 3, [0.0] * 5 + [1.0] * 3
    for choice, expected in [("floor", [0, 1, 1, 1, 1, 1, 0, 0]), ("ceil", [0, 0, 1, 1, 1, 1, 1, 0])]:
        run = rewired(bench, {"rounding": choice}, weights=weights, mask=mask, gradient=gradient, drop_fraction=0.3)
        assert run.masks == [expected]


def test_the_ceiling_of_a_whole_number_is_that_number(bench):
    # .3 * 10 is 3.0000000000000004 - eps trouble; three are meant.
    weights, mask = [float(i) for i in range(1, 11)] + [0.0] * 10, [1] * 10 + [0] * 10
    run = rewired(
        bench, {"rounding": "ceil"}, weights=weights, mask=mask, gradient=[0.0] * 10 + [1.0] * 10,
        drop_fraction=0.1 + 0.2,
    )  # fmt: skip
    assert run.masks == [[0] * 3 + [1] * 10 + [0] * 7]


@pytest.mark.parametrize(
    ("choice", "mask", "weights", "buffer"),
    [
        # 1 comes straight back, with what it has; or from 0; or may not, and 5 grows in its place.
        ("kept", [1, 1, 0, 1, 1, 0], [4.0, 1.0, 0, 3.0, 0, 0], [0.1, 0.1, 0, 0.1, 0, 0]),
        ("zeroed", [1, 1, 0, 1, 1, 0], [4.0, 0.0, 0, 3.0, 0, 0], [0.1, 0.0, 0, 0.1, 0, 0]),
        ("forbidden", [1, 0, 0, 1, 1, 1], [4.0, 0.0, 0, 3.0, 0, 0], [0.1, 0.0, 0, 0.1, 0, 0]),
    ],
)
def test_a_dropped_connection_that_grows_again(bench, choice, mask, weights, buffer):
    run = rewired(bench, {"regrown": choice}, **MOMENTUM)
    assert run.masks == [mask]
    assert run.weights == [weights]
    assert run.buffer("momentum_buffer") == buffer


def test_forbidden_drops_no_more_than_there_are_free_places(bench):
    run = rewired(bench, {"regrown": "forbidden"}, weights=[1.0, 2, 3, 4, 5, 0], mask=[1] * 5 + [0], drop_fraction=0.9)
    assert run.masks == [[0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("method", ["set", "rigl-sg", "dsr"])
def test_forbidden_holds_for_every_method_that_grows(bench, method):
    # All four are wanted out, two places are free: the two that are dropped stay out.
    run = rewired(
        bench, {"regrown": "forbidden"}, method, drop_fraction=1.0, **({"threshold": 9.0} if method == "dsr" else {})
    )
    assert run.masks == [[1, 0, 0, 1, 1, 1]]


def test_forbidden_leaves_a_layer_no_more_room_than_was_free(bench):
    # k = 2 and 2; shares 9 : 1 give the first 3.6 of 4, and only two of its places were free before.
    run = bench(
        [W, [4.0, 1.0, 2.0, 3.0] + [0.0] * 12], [M, [1] * 4 + [0] * 12], "rigl-sg", semantics={"regrown": "forbidden"}
    )
    for _ in range(2):
        run.step([9.0] * 6, [1.0] * 16)
    assert run.masks == [[1, 0, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1] + [0] * 10]


# -- the weight update ----------------------------------------------------------------------------------------

LEARNING = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}


@pytest.mark.parametrize(
    ("method", "choice", "moves"),
    [
        ("rigl", "method", False), ("set", "method", False), ("snfs", "method", False), ("dsr", "method", False),
        ("pruning", "method", True), ("snip", "method", False),
        ("rigl", "gradient", False), ("set", "gradient", True), ("snfs", "gradient", True), ("snip", "gradient", False),
        ("pruning", "gradient", True),
        ("rigl", "replaced", False), ("set", "replaced", False), ("pruning", "replaced", False),
        ("rigl", "first", True), ("set", "first", True), ("pruning", "first", True), ("snip", "first", False),
    ],
)  # fmt: skip
def test_whether_weights_move_in_an_update_step(bench, method, choice, moves):
    starts_dense = method in ("pruning", "snip")
    run = bench(
        [W], [[1] * 6 if starts_dense else M], method, **LEARNING, targets=[4], semantics={"weight_update": choice},
        **({"begin": 0, "end": 0} if method == "pruning" else {}),
    )  # fmt: skip
    if not starts_dense:
        run.step([0.0] * 6)
    assert run.rewirer.is_update_step()
    run.step([-1.0] * 6)  # every weight grows by 1
    assert run.weights[0][0] == (5.0 if moves else 4.0)
    assert run.weights[0][3] == (4.0 if moves else 3.0)
    assert run.counts == [4]


def test_first_compares_the_weights_after_the_update_and_grows_by_the_gradient_before_it(bench):
    # The update makes 4, 1, 2, 3 into 0, 1, 2, 3 before they are compared; 5 has the larger gradient.
    run = bench([W], [M], "rigl", **LEARNING, semantics={"weight_update": "first"}, drop_fraction=0.25)
    run.step([0.0] * 6)
    run.step([4.0, 0.0, 0.0, 0.0, 1.0, -9.0])
    assert run.masks == [[0, 1, 1, 1, 0, 1]]
    assert run.weights == [[0.0, 1.0, 2.0, 3.0, 0.0, 0.0]]


def test_attach_overrides_the_module(bench):
    run = bench([W], [M], "set", **LEARNING, semantics={"weight_update": "first"}, update_weights_first=False)
    run.step([0.0] * 6)
    run.step([-1.0] * 6)
    assert run.weights[0][0] == 4.0
    with pytest.raises(ConfigError, match="'magnitude' needs the weight update to be replaced"):
        bench([W], [M], "rigl", semantics={"gradient": "magnitude"}, update_weights_first=True)


# -- the gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "grown"), [("mean", 5), ("magnitude", 4)])
def test_the_gradient_over_two_micro_batches(bench, choice, grown):
    # At 4: 5 and -4, mean .5, mean magnitude 4.5. At 5: 1 and 1.
    run = bench([W], [M], "rigl", semantics={"gradient": choice}, drop_fraction=0.25)
    run.step([0.0] * 6)
    run.optimizer.zero_grad()
    run.backward([0.0, 0.0, 0.0, 0.0, 2.5, 0.5])
    run.backward([0.0, 0.0, 0.0, 0.0, -2.0, 0.5])
    run.optimizer.step()
    assert run.masks == [[int(i in (0, 2, 3, grown)) for i in range(6)]]
    # On ordinary steps the gradients have their signs.
    assert run.rewirer.is_update_step()
    run.rewirer.detach()
    assert run.sparse.dense_gradient is False


def test_magnitudes_are_for_update_steps_only(bench):
    run = bench([W], [M], "rigl", **LEARNING, semantics={"gradient": "magnitude"}, update_interval=5)
    run.step([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert run.weights[0][:2] == [5.0, 0.0]


# -- the optimizer's state -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "dropped", "stepped", "grown"),
    [
        ("masked", [0.0, 0.0, 1.5], [0.0, 1.0, 1.75], [0.0, 0.0, 1.75]),
        ("new", [1.5, 0.0, 1.5], [0.75, 1.0, 1.75], [0.0, 1.0, 1.75]),
        ("kept", [1.5, 8.0, 1.5], [0.75, 5.0, 1.75], [0.75, 5.0, 1.75]),
    ],
)
def test_the_momentum_of_inactive_weights(bench, choice, dropped, stepped, grown):
    run = bench(
        [[1.0, 0.0, 9.0]], [[1, 0, 1]], "rigl", lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.5), update_interval=2,
        semantics={"optimizer_state": choice},
    )  # fmt: skip
    run.step([1.0, 0.0, 1.0])
    run.step([1.0, 0.0, 1.0])
    assert run.buffer("momentum_buffer") == [1.5, 0.0, 1.5]
    run.optimizer.state[run.sparse.get_parameter(run.names[0])]["momentum_buffer"][0, 1] = 8.0  # from an earlier life
    run.step([0.0, 7.0, 0.0])
    assert run.masks == [[0, 1, 1]]
    assert run.buffer("momentum_buffer") == dropped
    run.step([1.0, 1.0, 1.0])  # b / 2, and 1 more where it is active
    assert run.buffer("momentum_buffer") == stepped
    run.step([7.0, 0.0, 0.0])
    assert run.masks == [[1, 0, 1]]
    assert run.buffer("momentum_buffer") == grown


@pytest.mark.parametrize("choice", ["new", "kept"])
def test_running_momentum_does_not_move_inactive_weights(bench, choice):
    run = bench(
        [W], [M], "rigl", lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), update_interval=5,
        semantics={"optimizer_state": choice},
    )  # fmt: skip
    for _ in range(8):  # the drop at step 5 is not followed at once by a step at which strays are looked for
        run.step([1.0, 1.0, 1.0, 1.0, 2.0, 3.0])
        assert all(w == 0.0 for w, m in zip(run.weights[0], run.masks[0], strict=True) if not m)


# -- when -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("semantics", "steps"),
    [
        ({}, [3]),
        ({"end": "inclusive"}, [3, 6]),
        ({"start": "on"}, [2, 5]),
        ({"start": "zero"}, [0, 3]),
        ({"start": "zero", "end": "inclusive"}, [0, 3, 6]),
        ("paper", [3]),
        ("rigl-tf", [0, 3, 6]),
        ("report", [2, 5]),
    ],
)
def test_when(bench, semantics, steps):
    run = bench([W], [M], "rigl", semantics=semantics, update_interval=3, stop_fraction=0.5, total_steps=12)
    for _ in range(12):
        run.step(G)
    assert [record.step for record in run.rewirer.history] == steps


# -- before the run ---------------------------------------------------------------------------------------------


def test_initial_masks_are_exact_or_by_the_coin():
    def counts(choice, sparsity=0.75):
        return [
            fxsparse.sparsify(
                nn.Linear(20, 20), torch.randn(1, 20), "static", sparsity=sparsity, seed=seed, verify=False,
                distribution={"*": sparsity}, semantics={"initial_masks": choice},
            ).active_counts["weight"]
            for seed in range(60)
        ]  # fmt: skip

    assert counts("exact") == [100] * 60
    coins = torch.tensor(counts("bernoulli"), dtype=torch.float64)
    # Binomial(400, 1/4): mean 100, standard deviation 8.66; the mean of sixty within four of its own.
    assert abs(coins.mean() - 100) < 4 * 8.66 / 60**0.5
    assert 6 < coins.std() < 12
    assert counts("bernoulli", 0.0) == [400] * 60


def test_bernoulli_masks_keep_their_count_and_methods_that_start_dense_end_exactly(bench):
    def sparsify(method, **options):
        return fxsparse.sparsify(
            nn.Linear(20, 20), torch.randn(1, 20), method, sparsity=0.75, distribution={"*": 0.75}, update_interval=1,
            semantics="report", **options,
        )  # fmt: skip

    for method, options, expected in [("rigl", {}, None), ("pruning", {}, 100), ("snip", {}, 100)]:
        sparse = sparsify(method, **options)
        start = sparse.active_counts["weight"]
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer, total_steps=20)
        for _ in range(20):
            sparse(torch.randn(3, 20)).square().sum().backward()
            optimizer.step()
        assert sparse.active_counts["weight"] == (start if expected is None else expected)
        assert start == 400 if expected else start < 150


def test_dense_sites_inside_and_outside_the_budget():
    # Sites of 20, 40 and 20 weights, the first dense, half removed. Inside: 40 of 80 stay, 20 of them in the first, and
    # the others, which hold 60, share 20. Outside: the others keep 30. ER gives raw densities 13/40 and 9/20, that is
    # 13 and 9 weights: 20 * 13/22 = 11.8 and 8.2 inside; 30 * 13/22 = 17.7 and 12.3 outside.
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False))
    model[2] = nn.Linear(5, 4, bias=False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            hidden = self.layers[0](x)
            return self.layers[1](hidden), self.layers[2](hidden)

    for choice, expected in [("inside", [20, 12, 9]), ("outside", [20, 18, 13])]:
        sparse = fxsparse.sparsify(
            Net(), torch.randn(1, 4), sparsity=0.5, distribution="er", dense=("first",),
            semantics={"dense_sites": choice},
        )  # fmt: skip
        assert list(sparse.active_counts.values()) == expected


# -- presets ----------------------------------------------------------------------------------------------------


def test_presets_are_what_the_sources_do():
    # google-research/rigl: sparse_optimizers.py. The report: sparselearning/core.py and main.py.
    paper = {
        "rounding": "floor", "regrown": "kept", "weight_update": "method", "gradient": "mean",
        "optimizer_state": "masked", "end": "exclusive", "start": "after", "initial_masks": "exact",
        "dense_sites": "inside", "channel_score": "mean_of_magnitudes",
    }  # fmt: skip
    assert dataclasses.asdict(PRESETS["paper"]) == paper
    assert dataclasses.asdict(PRESETS["rigl-tf"]) == paper | {
        "weight_update": "gradient", "optimizer_state": "new", "end": "inclusive", "start": "zero",
        "dense_sites": "outside",
    }  # fmt: skip
    assert dataclasses.asdict(PRESETS["report"]) == paper | {
        "rounding": "ceil", "regrown": "zeroed", "weight_update": "replaced", "start": "on",
        "initial_masks": "bernoulli", "dense_sites": "outside", "channel_score": "magnitude_of_mean",
    }  # fmt: skip


def test_a_preset_changes_what_methods_do_by_default():
    def options(method, semantics, **given):
        sparse = fxsparse.sparsify(nn.Linear(6, 4), torch.randn(1, 6), method, semantics=semantics, **given)
        return sparse.method.options()

    assert options("snfs", "paper")["redistribution"] == "momentum"
    assert options("snfs", "rigl-tf")["redistribution"] is None
    assert options("snfs", "rigl-tf", redistribution="gradient")["redistribution"] == "gradient"
    assert options("snfs", "report")["momentum"] == "optimizer"
    assert options("pruning", "report")["scope"] == "global"
    assert options("pruning", "report", scope="layer")["scope"] == "layer"
    assert options("pruning", {"preset": "report", "rounding": "floor"})["scope"] == "global"


def test_a_mapping_changes_a_preset():
    made = make_semantics({"preset": "report", "rounding": "floor"})
    assert made == dataclasses.replace(PRESETS["report"], rounding="floor")
    assert make_semantics({}) == make_semantics("paper") == Semantics() == make_semantics(Semantics())
    assert make_semantics({"preset": {"preset": "rigl-tf", "end": "exclusive"}, "start": "on"}).start == "on"
    assert [preset_of(given) for given in ("report", {"preset": "rigl-tf"}, {}, Semantics())] == [
        "report", "rigl-tf", "paper", "paper",
    ]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_wrong_value_of_any_choice(choice):
    with pytest.raises(ConfigError, match=f"semantics: {choice} is 'wrong'; it is one of {', '.join(CHOICES[choice])}"):
        make_semantics({choice: "wrong"})


def test_other_wrong_semantics():
    for given, message in [
        ("reprot", "semantics: 'reprot' is not one of paper, rigl-tf, report; did you mean report"),
        ({"roundin": "ceil"}, "there is no choice 'roundin'; there are rounding, .*did you mean rounding"),
        ({"preset": "x"}, "semantics: 'x' is not one of"),
        ({"gradient": "magnitude", "weight_update": "first"}, "'first' steps on the gradient"),
        (3, "semantics: 3 is not one of"),
        (["paper"], "semantics"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_semantics(given)
