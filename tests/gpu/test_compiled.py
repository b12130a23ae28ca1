"""torch.compile on a CUDA device, by default and with CUDA graphs: no graph break, two variants, the right masks."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fxsparse
from fxsparse import models, rigl_update
from fxsparse.core.masking import floor_count

pytestmark = pytest.mark.gpu

STEPS, INTERVAL = 500, 90  # rewirings at steps 90, 180, 270, 360, 450
MODES = ["default", "reduce-overhead"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled yet; a graph break raises, and so does going on in eager mode after too many variants."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Training:
    """A small ResNet in the user's own loop; each step on another batch."""

    def __init__(self, mode, interval=INTERVAL, dtype=torch.bfloat16, **attach):
        torch.manual_seed(0)
        model = models.small_resnet().cuda().to(memory_format=torch.channels_last)
        x = torch.randn(32, 1, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        options = {"sparsity": 0.8, "update_interval": interval, "stop_fraction": 1.0, "decay": "constant"}
        self.sparse = fxsparse.sparsify(model, x, "rigl", verify=False, **options)
        self.optimizer = torch.optim.SGD(self.sparse.parameters(), lr=0.05, momentum=0.9, fused=True)
        self.rewirer = self.sparse.attach(self.optimizer, total_steps=STEPS, **attach)
        self.run = torch.compile(self.sparse, mode=mode, fullgraph=True)
        self.generator = torch.Generator("cuda").manual_seed(1)
        self.dtype = dtype

    def backward(self):
        x = torch.randn(32, 1, 8, 8, device="cuda", generator=self.generator).to(memory_format=torch.channels_last)
        y = torch.randint(10, (32,), device="cuda", generator=self.generator)
        torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not None):
            loss = nn.functional.cross_entropy(self.run(x), y)
        loss.backward()
        return loss.detach().clone()

    def step(self):
        loss = self.backward()
        self.optimizer.step()
        return loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_two_variants_and_no_graph_break(mode, dtype):
    training = Training(mode, dtype=dtype)
    counts = training.sparse.active_counts
    graphs, losses = [], []
    for _ in range(STEPS):
        losses.append(training.step())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 90 + [2] * 410 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert [record.step for record in training.rewirer.history] == [90, 180, 270, 360, 450]
    assert all(sum(record.changed.values()) > 0 for record in training.rewirer.history)
    assert torch.stack(losses).isfinite().all() and training.sparse.active_counts == counts
    for name, mask in training.sparse.masks.items():
        assert (training.sparse.get_parameter(name)[~mask] == 0).all()


@pytest.mark.parametrize("attach", [{}, {"update_weights_first": True}], ids=["", "weights first"])
@pytest.mark.parametrize("mode", MODES)
def test_masks_follow_from_the_gradients_of_the_step(mode, attach):
    """The gradients that a CUDA graph left in its own memory are those that the rewiring reads, not a later step's."""
    training = Training(mode, interval=5, **attach)
    sparse, rewirer, checked = training.sparse, training.rewirer, 0
    for _ in range(32):
        training.backward()
        expected = {}
        if rewirer.is_update_step() and not attach:
            fraction = rewirer.schedule.fraction(rewirer.step_count)
            for name, mask in sparse.masks.items():
                weight, k = sparse.get_parameter(name).detach().clone(), floor_count(fraction, int(mask.sum()))
                gradient = sparse.get_parameter(name).grad.clone()
                expected[name] = rigl_update(weight, gradient, mask.clone(), k)
        training.optimizer.step()
        for name, mask in expected.items():
            assert torch.equal(mask, sparse.masks[name])
            checked += 1
    assert len(rewirer.history) == 6 and (attach or checked == 6 * len(sparse.masks))


def test_masks_changed_between_replays_are_seen():
    """A replay reads masks and weights where they lie: after each rewiring the outputs are those of eager mode."""
    training = Training("reduce-overhead", interval=5, dtype=None)
    x = torch.randn(32, 1, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    for _ in range(25):
        training.step()
        if training.rewirer.step_count % 5 == 1:
            torch.compiler.cudagraph_mark_step_begin()
            found = training.run(x).detach().clone()
            torch.testing.assert_close(found, training.sparse(x).detach(), rtol=1e-2, atol=1e-2)
    assert len(training.rewirer.history) == 4


def test_ordinary_and_update_steps_are_replayed():
    """Two graph launches a step, forward and backward, once both variants were recorded."""
    training = Training("reduce-overhead", interval=4)
    for _ in range(17):  # each variant is run once, recorded, and then replayed
        training.step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(8):
            training.step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")
    assert launches >= 16 and len(training.rewirer.history) == 6


def test_gradients_over_several_replays_need_their_own_memory():
    """What docs/gpu.md says of accumulation: a gradient that is kept as `grad` lies where the next replay writes."""
    training = Training("reduce-overhead", interval=3)
    parameters = list(training.sparse.parameters())
    for _ in range(8):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for _ in range(2):
            training.backward()
            for total, parameter in zip(sums, parameters, strict=True):
                total += parameter.grad / 2
                parameter.grad = None
        for total, parameter in zip(sums, parameters, strict=True):
            parameter.grad = total
        training.optimizer.step()
    assert training.rewirer.step_count == 8 and len(training.rewirer.history) == 2
