"""SET through the runtime: drops by magnitude, grows seeded, and with connections that move between layers."""

import torch


def test_drops_the_smallest_and_grows_any_other_place(bench):
    grown_ever = set()
    for seed in range(40):
        run = bench([[4.0, 1.0, 2.0, 3.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0]], "set", seed=seed)
        run.step([0.0] * 6)
        run.step([0.0] * 6)  # k = 2 of 4: drops 1 and 2
        (mask,), (weight,) = run.masks, run.weights
        assert (mask[0], mask[3], sum(mask)) == (1, 1, 4)
        grown = {i for i in (1, 2, 4, 5) if mask[i]}
        # One that comes straight back is untouched, a new one starts from 0.
        assert all(weight[i] == {1: 1.0, 2: 2.0, 4: 0.0, 5: 0.0}[i] for i in grown)
        grown_ever |= {frozenset(grown)}
    assert len(grown_ever) == 6  # every pair of the four free places


def test_the_seed_decides_and_not_the_users_random_numbers(bench):
    def masks(seed, user):
        torch.manual_seed(user)
        run = bench([list(range(1, 41))], [[1] * 20 + [0] * 20], "set", seed=seed)
        for _ in range(4):
            torch.rand(user + 1)
            run.step([0.0] * 40)
        return run.masks

    assert masks(3, 0) == masks(3, 1)
    assert masks(3, 0) != masks(4, 0)


def test_redistribution_by_the_gradient_of_active_weights_by_hand(bench):
    # Layers of 8 with 4 active; k = 2 each, 4 in all. Mean |gradient| of the active: (1 + 1 + 1 + 3) / 4 = 1.5 and .5,
    # so that 3 and 1 grow. The gradient of inactive weights (100) counts for nothing.
    run = bench(
        [[4.0, 1.0, 2.0, 3.0, 0, 0, 0, 0]] * 2, [[1, 1, 1, 1, 0, 0, 0, 0]] * 2, "set", redistribution="gradient"
    )
    gradients = [[1.0, -1.0, 1.0, 3.0, 100, 100, 100, 100], [0.5, 0.5, -0.5, 0.5, 0, 0, 0, 0]]
    run.step(*gradients)
    run.step(*gradients)
    assert run.counts == [5, 3]
    assert not run.sparse.dense_gradient
    (record,) = run.rewirer.history
    assert record.active == {"layers.0.weight": 5, "layers.1.weight": 3}
    assert record.grown_gradient_norm == {}  # it sees no gradient where it grows


def test_redistribution_by_momentum_by_hand(bench):
    # One step with gradients g makes the momentum buffer g; mean |g| of the active: 3 and 1.
    run = bench(
        [[4.0, 1.0, 2.0, 3.0, 0, 0, 0, 0]] * 2,
        [[1, 1, 1, 1, 0, 0, 0, 0]] * 2,
        "set",
        lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        redistribution="momentum",
    )
    run.step([3.0] * 8, [-1.0] * 8)
    run.step([0.0] * 8, [9.0] * 8)  # this batch's gradient is not looked at
    assert run.counts == [5, 3]


def test_nothing_to_go_by_moves_nothing(bench):
    # Before the optimizer's first step there is no momentum: every layer regrows what it dropped.
    run = bench(
        [[4.0, 1.0, 2.0, 3.0, 0, 0], [2.0, 1.0] + [0.0] * 10],
        [[1, 1, 1, 1, 0, 0], [1, 1] + [0] * 10],
        "set",
        lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        redistribution="momentum",
        semantics={"start": "zero"},
    )
    run.step([1.0] * 6, [1.0] * 12)
    assert run.counts == [4, 2]
