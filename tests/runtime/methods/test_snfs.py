"""Sparse momentum by hand: the average, growth and redistribution by it, and the optimizer's buffers in its place."""

import pytest
import torch

from fxsparse import RuntimeStateError

SGD = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5)}


def average(run, site=0):
    return run.rewirer.method.state_dict()["averages"][run.names[site]].flatten().tolist()


def test_the_average_by_hand_and_growth_by_it(bench):
    run = bench([[4.0, 1.0, 2.0, 3.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0]], "snfs", update_interval=2)
    run.step([0.0, 0.0, 0.0, 0.0, 10.0, -2.0])
    assert average(run) == pytest.approx([0, 0, 0, 0, 1.0, -0.2])  # .1 g, at inactive positions too
    run.step([0.0, 0.0, 0.0, 0.0, -10.0, -2.0])
    assert average(run) == pytest.approx([0, 0, 0, 0, -0.1, -0.38])  # .9 m + .1 g
    run.step([0.0, 0.0, 0.0, 0.0, 2.0, -2.0])
    assert average(run) == pytest.approx([0, 0, 0, 0, 0.11, -0.542])
    # The third call is the update step: k = 2 drops 1 and 2, grows 5 (.542) and 4 (.11).
    assert run.masks == [[1, 0, 0, 1, 1, 1]]
    assert run.weights == [[4.0, 0.0, 0.0, 3.0, 0.0, 0.0]]


def test_it_grows_by_the_average_and_not_by_the_batch(bench):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", update_interval=2)
    for _ in range(2):
        run.step([0.0, 0.0, 10.0, 0.0])
    run.step([0.0, 0.0, 0.0, 15.0])  # averages 1.71 and 1.5
    assert run.masks == [[1, 0, 1, 0]]


def test_beta_zero_is_the_batch(bench):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", update_interval=2, beta=0.0)
    for _ in range(2):
        run.step([0.0, 0.0, 10.0, 0.0])
    run.step([0.0, 0.0, 0.0, 0.1])
    assert run.masks == [[1, 0, 0, 1]]


def test_redistribution_by_the_mean_momentum_of_active_weights(bench):
    # The averages are proportional to the constant gradients: 3 and 1 over the active, so 3 and 1 of the 4 dropped.
    weights, masks = [[4.0, 1.0, 2.0, 3.0, 0, 0, 0, 0]] * 2, [[1, 1, 1, 1, 0, 0, 0, 0]] * 2
    run = bench(weights, masks, "snfs")
    for _ in range(2):
        run.step([3.0, -3.0, 3.0, -3.0, 9, 8, 7, 6], [1.0, 1.0, 1.0, -1.0, 90, 80, 70, 60])
    assert run.masks == [[1, 0, 0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0]]


def test_one_infinite_batch_does_not_spoil_the_average(bench):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", update_interval=50)
    run.step([0.0, 0.0, 10.0, 0.0])
    run.step([0.0, 0.0, 10.0, float("nan")])
    assert average(run) == pytest.approx([0, 0, 1.0, 0])
    run.step([0.0, 0.0, 10.0, 0.0])
    assert average(run) == pytest.approx([0, 0, 1.9, 0])


def test_its_own_average_leaves_the_optimizer_sparse(bench):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", update_interval=50, **SGD)
    for _ in range(3):
        run.step([1.0, 1.0, 10.0, 10.0])
    assert run.buffer("momentum_buffer") == [1.75, 1.75, 0.0, 0.0]
    assert run.weights == [[4.0 - 0.5 * 4.25, 1.0 - 0.5 * 4.25, 0.0, 0.0]]


def test_the_optimizers_buffers_are_dense_and_the_weights_are_not(bench):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", momentum="optimizer", update_interval=3, **SGD)
    for buffer, weight in [(1.0, 3.5), (1.5, 2.75), (1.75, 1.875)]:
        run.step([1.0, 1.0, 4.0, -8.0])
        assert run.buffer("momentum_buffer") == [buffer, buffer, 4 * buffer, -8 * buffer]
        assert run.weights == [[weight, weight - 3, 0.0, 0.0]]
    # The update step: the optimizer does not see this gradient; -14 beats 7, and the buffers stay as they are.
    run.step([1.0, 1.0, 100.0, 0.0])
    assert run.masks == [[1, 0, 0, 1]]
    assert run.buffer("momentum_buffer") == [1.75, 1.75, 7.0, -14.0]
    assert run.weights == [[1.875, 0.0, 0.0, 0.0]]
    run.step([0.0] * 4)  # a new connection starts with the momentum that it has
    assert run.weights == [[1.4375, 0.0, 0.0, 3.5]]


def test_adams_buffers(bench):
    # A rare large gradient and a steady small one: Adam's ratio prefers the steady one, the first moment the large one.
    run = bench(
        [[4.0, 1.0, 0.0, 0.0]],
        [[1, 1, 0, 0]],
        "snfs",
        lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.9, 0.99)),
        momentum="optimizer",
        update_interval=8,
    )
    for t in range(9):
        run.step([1.0, 0.0, 100.0 if t == 0 else 0.0, 1.0])
    first, second = run.buffer("exp_avg"), run.buffer("exp_avg_sq")
    assert first[2] == pytest.approx(10 * 0.9**7) and first[3] == pytest.approx(1 - 0.9**8)
    assert first[2] > first[3] and first[2] / second[2] ** 0.5 < first[3] / second[3] ** 0.5
    assert run.masks == [[1, 0, 0, 1]]


def test_the_optimizer_without_momentum_is_refused(bench):
    with pytest.raises(RuntimeStateError, match="snfs reads the optimizer's momentum, and this SGD keeps none"):
        bench([[4.0, 1.0]], [[1, 0]], "snfs", momentum="optimizer")
    bench([[4.0, 1.0]], [[1, 0]], "snfs")  # its own average needs none


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_the_average_is_of_the_true_gradients(bench, fused):
    run = bench(
        [[4.0, 1.0, 0.0, 0.0]],
        [[1, 1, 0, 0]],
        "snfs",
        lambda p: torch.optim.SGD(p, lr=0.0, fused=fused),
        update_interval=2,
        dtype=torch.float32,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for gradient in ([0.0, 0.0, 10.0, 1.0], [0.0, 0.0, float("inf"), 1.0], [0.0, 0.0, 10.0, 1.0]):
        run.optimizer.zero_grad()
        scaled = torch.tensor(gradient).reshape(4, 1) * scaler.get_scale()
        (run.sparse(run.eye)[0] * scaled).sum().backward()
        scaler.scale(torch.zeros(()))  # so that the scaler has its scale tensor
        scaler.step(run.optimizer)
        scaler.update()
    # The infinite batch was no step; the scale has halved since.
    assert run.rewirer.step_count == 2
    assert scaler.get_scale() == 512.0
    assert average(run) == pytest.approx([0, 0, 1.9, 0.19])


@pytest.mark.parametrize(
    ("momentum", "buffer"), [("optimizer", [1.5, 1.5, 6.0, 0.0]), ("average", [1.5, 1.5, 0.0, 0.0])]
)
def test_an_infinite_gradient_of_an_inactive_weight_harms_nobody(bench, momentum, buffer):
    run = bench([[4.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], "snfs", momentum=momentum, update_interval=9, **SGD)
    for gradient in ([1.0, 1.0, 4.0, float("inf")], [1.0, 1.0, 4.0, float("nan")]):
        run.sparse.get_parameter(run.names[0]).grad = torch.tensor([gradient], dtype=torch.float64)
        run.optimizer.step()
    assert run.buffer("momentum_buffer") == buffer
    assert run.weights == [[2.75, -0.25, 0.0, 0.0]]
