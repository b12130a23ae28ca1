"""RigL and its two variants that move connections, through the runtime."""

import pytest
import torch

from fxsparse import RuntimeStateError, rigl_update

MOMENTUM = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9)}


@pytest.mark.parametrize("seed", range(3))
def test_every_rewiring_is_algorithm_1(bench, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (3, 4)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in shapes]
    run = bench([w.tolist() for w in weights], [m.tolist() for m in masks], "rigl", drop_fraction=0.3)
    masks = [mask.clone() for mask in run.sparse.masks.values()]
    for t in range(4):
        gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        before = [run.sparse.get_parameter(name).detach().clone() for name in run.names]
        run.step(*[g.tolist() for g in gradients])
        if t == 0:
            continue
        for i, mask in enumerate(masks):
            k = int(0.3 * int(mask.sum()))
            masks[i] = rigl_update(before[i], gradients[i], mask, k)
            assert torch.equal(run.sparse.masks[run.names[i]], masks[i])


def test_sg_by_hand(bench):
    # 8 of 16 active each, k = 4 and 4. Mean |gradient| of the active is 3 and 1: 6 and 2 grow, by |gradient|.
    weights, masks = [[float(i) for i in range(1, 9)] + [0.0] * 8] * 2, [[1] * 8 + [0] * 8] * 2
    run = bench(weights, masks, "rigl-sg")
    first = [3.0, -3.0] * 4 + [float(i) for i in range(10, 18)]
    second = [1.0, -1.0] * 4 + [0.0, 0.5, 8.0, 0.5, 9.0, 0.5, 0.5, 0.5]
    run.step(first, second)
    run.step(first, second)
    assert run.masks[0] == [0] * 4 + [1] * 4 + [0, 0] + [1] * 6
    assert run.masks[1] == [0] * 4 + [1] * 4 + [0, 0, 1, 0, 1, 0, 0, 0]
    assert run.counts == [10, 6]
    (record,) = run.rewirer.history
    assert record.changed == {"layers.0.weight": 6, "layers.1.weight": 2}


def test_a_full_layer_passes_on_what_does_not_fit(bench):
    # k = 3 and 4. Shares 9 : 1 would give the first 6 of 7, but it has room for 3 + 2 only.
    weights = [[float(i) for i in range(1, 7)] + [0.0] * 2, [float(i) for i in range(1, 9)] + [0.0] * 8]
    masks = [[1] * 6 + [0] * 2, [1] * 8 + [0] * 8]
    run = bench(weights, masks, "rigl-sg")
    gradients = [9.0] * 8, [1.0] * 16
    run.step(*gradients)
    run.step(*gradients)
    assert run.counts == [8, 6]


def test_a_dense_site_gives_and_takes_nothing(bench):
    weights, masks = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0, 0, 0]], [[1] * 4, [1] * 4 + [0] * 2]
    run = bench(weights, masks, "rigl-sg")
    for _ in range(5):
        run.step([9.0] * 4, [1.0] * 6)
    assert run.masks[0] == [1] * 4
    assert run.counts == [4, 4]


def test_sm_by_hand(bench):
    # Momentum 1 and 3 on average; the gradients of the update step, 5 and 1, only say where to grow.
    weights, masks = [[float(i) for i in range(1, 9)] + [0.0] * 8] * 2, [[1] * 8 + [0] * 8] * 2
    run = bench(weights, masks, "rigl-sm", **MOMENTUM)
    run.step([1.0] * 16, [3.0, -3.0] * 8)
    run.step([5.0] * 16, [1.0] * 15 + [7.0])
    assert run.counts == [6, 10]
    assert run.masks[1][-1] == 1


def test_sm_with_adam_goes_by_the_first_moment_over_the_root_of_the_second(bench):
    # After one step exp_avg = .1 g and exp_avg_sq = .001 g^2: the ratio is .1 / sqrt(.001), whatever g is.
    weights, masks = [[float(i) for i in range(1, 9)] + [0.0] * 8] * 2, [[1] * 8 + [0] * 8] * 2
    run = bench(weights, masks, "rigl-sm", lambda p: torch.optim.Adam(p, lr=0.0))
    run.step([1.0] * 16, [300.0] * 16)
    run.step([5.0] * 16, [1.0] * 16)
    assert run.counts == [8, 8]


def test_without_momentum_sm_is_refused(bench):
    with pytest.raises(
        RuntimeStateError, match=r"rigl-sm reads the optimizer's momentum, and this SGD keeps none; give"
    ):
        bench([[1.0, 2.0]], [[1, 0]], "rigl-sm")
    with pytest.raises(RuntimeStateError, match="this Adam keeps none"):
        bench([[1.0, 2.0]], [[1, 0]], "rigl-sm", lambda p: torch.optim.Adam(p, betas=(0.0, 0.9)))


def test_the_variants_are_rigl_with_an_option(bench):
    def masks(method, **options):
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(2, 20, generator=generator).tolist()
        run = bench(weights, [[1, 0] * 10] * 2, method, **options, **MOMENTUM)
        for _ in range(5):
            run.step(*(torch.randn(2, 20, generator=generator) * torch.tensor([[1.0], [4.0]])).tolist())
        return run.masks

    assert masks("rigl-sg") == masks("rigl", redistribution="gradient") != masks("rigl")
    assert masks("rigl-sm") == masks("rigl", redistribution="momentum") != masks("rigl")


def test_an_infinite_momentum_moves_nothing_between_layers(bench):
    weights, masks = [[float(i) for i in range(1, 9)] + [0.0] * 8] * 2, [[1] * 8 + [0] * 8] * 2
    run = bench(weights, masks, "rigl-sm", **MOMENTUM)
    run.step([1.0] * 16, [3.0] * 16)
    run.optimizer.state[run.sparse.get_parameter(run.names[0])]["momentum_buffer"][0, 7] = float("inf")
    run.step([1.0] * 16, [3.0] * 16)
    assert run.counts == [8, 8]
