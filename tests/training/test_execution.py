"""Compiled, in another memory format, by fused kernels: the same training."""

import argparse
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.cli.config_flags import add_config_flags, as_flags, given_options
from fxsparse.training import DivergedError, TrainConfig, checkpoint, classification, continue_run, train
from fxsparse.training.execution import by_first_size, gate_closed, load_optimizer, make_optimizer
from fxsparse.training.experiment import build
from fxsparse.training.loop import _Loop
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import ResumePoint, RunFolder

TINY = TrainConfig(
    model="small_resnet",
    model_options={"width": 4},
    steps=24,
    batch_size=32,
    sparsity=0.8,
    update_interval=6,
    log_interval=4,
    eval_interval=6,
    eval_batch_size=100,
    threads=1,
    verify=False,
    tensorboard=False,
    plots=False,
)
CPU = torch.device("cpu")


def quietly(line):
    pass


def run(config, folder):
    return train(config, folder, progress=False, say=quietly)


def masks_of(folder):
    state = checkpoint.load(RunFolder(folder).checkpoints()[-1])["model"]
    return {name: value for name, value in state.items() if name.endswith("_mask")}


@pytest.fixture
def without_code_generation(monkeypatch):
    """`torch.compile` up to the graphs, which are then run by the operators they name: quick."""
    torch._dynamo.reset()
    counters.clear()
    real, modes = torch.compile, []  # what it was asked for

    def compile_graphs(module, *, mode, dynamic):
        modes.append((mode, dynamic))
        return real(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_graphs)
    yield modes
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eager") / "run"
    return folder, run(TINY, folder)


def test_a_compiled_run_meets_three_graphs_and_no_break(without_code_generation, eager_run, tmp_path):
    """The ordinary step, the update step and the evaluation: which comes at step 6, 12 and 18 with the gate open, and
    ends with 60 of the 360 images."""
    result = run(dataclasses.replace(TINY, compile="reduce-overhead"), tmp_path / "run")
    assert without_code_generation == [("reduce-overhead", False)]  # no size is left open
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    folder, eager = eager_run
    assert result.rewirings == eager.rewirings == 2
    for name, mask in masks_of(folder).items():
        assert torch.equal(masks_of(tmp_path / "run")[name], mask)
    for one, other in zip(*(read_metrics(f / "metrics.jsonl") for f in (tmp_path / "run", folder)), strict=True):
        assert one["kind"] == other["kind"]
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def trained(config, steps=20):
    """An experiment in float64, after `steps` steps."""
    parts = build(config)
    parts.sparse.double()
    losses = []
    for step, (images, labels) in zip(range(steps), parts.train_batches.epoch(0), strict=False):
        losses.append(parts.train_step(images.double(), labels, step).loss.item())
    assert len(losses) == steps and len(parts.rewirer.history) == 2
    return parts, losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_to_kernels_the_masks_are_those_of_the_eager_run(mode):
    torch._dynamo.reset()
    plain, expected = trained(TINY)
    compiled, losses = trained(dataclasses.replace(TINY, compile=mode, fused=True))
    assert losses == pytest.approx(expected, rel=1e-9)
    for name, mask in plain.sparse.masks.items():
        assert torch.equal(compiled.sparse.masks[name], mask)


def test_channels_last_is_a_matter_of_memory_alone():
    plain, expected = trained(TINY)
    changed, losses = trained(dataclasses.replace(TINY, channels_last=True))
    assert losses == pytest.approx(expected, rel=1e-9)
    images, _ = next(changed.train_batches.epoch(0))
    weights = [p for p in changed.sparse.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for name, mask in plain.sparse.masks.items():
        assert torch.equal(changed.sparse.masks[name], mask)
        assert changed.sparse.masks[name].stride() == changed.sparse.get_parameter(name).stride()


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fused": True, "optimizer": "adam"}], ids=str)
def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_run(options, tmp_path):
    config = dataclasses.replace(TINY, **options, checkpoint_interval=5, keep_checkpoints=0)
    run(config, tmp_path / "whole")
    part = RunFolder(tmp_path / "whole").checkpoints()[1]  # of step 10, of 44 in an epoch
    continue_run(part, tmp_path / "part", progress=False, say=quietly)
    assert (tmp_path / "part/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


class _Waits(TorchDispatchMode):
    """Notes operations for whose result a CPU would wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").removesuffix("_dim")
        if name in self.NAMES or "unique" in name:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_an_ordinary_step_waits_for_nothing(tmp_path):
    """Steps 9 to 11, from their batches to their sums: after step 8 the rewirer looks for stray weights."""
    parts = build(dataclasses.replace(TINY, fused=True, crop=1, flip=True))
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        loop = _Loop(parts, ResumePoint(folder, parts.config, None), False, quietly)
        batches = iter(loop._batches())
        seen = []
        for _ in range(12):
            with _Waits() as waits:
                loop._train_step(*next(batches))
            seen.append(waits.seen)
        assert seen[8:11] == [[]] * 3
        with _Waits() as waits:
            loop._record_training()
        assert "_local_scalar_dense" in waits.seen  # what the test would have seen
        loop.log.close()


# -- half precision ---------------------------------------------------------------------------------------


def spoiled(monkeypatch, bad):
    """Makes the loss of the steps `bad`, counted from 1, infinite."""
    real, steps = classification.loss_and_logits, []

    def loss_and_logits(output, labels, label_smoothing):
        loss, logits = real(output, labels, label_smoothing)
        if torch.is_grad_enabled():
            steps.append(0)
        return (loss * float("inf") if torch.is_grad_enabled() and len(steps) in bad else loss), logits

    monkeypatch.setattr(classification, "loss_and_logits", loss_and_logits)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step_of_the_schedule(fused, tmp_path, monkeypatch):
    """Step 7 would rewire; it and step 6 overflow. So the 6th that is made is step 8, and 9 rewires."""
    spoiled(monkeypatch, {6, 7})
    config = dataclasses.replace(TINY, amp="fp16", fused=fused, log_interval=1, validation=137)
    changed = []
    real = _Loop._train_step

    def watched(self, *batch):
        before = {name: mask.clone() for name, mask in self.parts.sparse.masks.items()}
        real(self, *batch)
        if any(not torch.equal(mask, before[name]) for name, mask in self.parts.sparse.masks.items()):
            changed.append(self.step)

    monkeypatch.setattr(_Loop, "_train_step", watched)
    result = run(config, tmp_path / "run")
    assert changed == [9, 15]
    assert (result.skipped_steps, result.rewirings, result.skipped_rewirings) == (2, 2, 0)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "rewire"] == [6, 12]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, *range(8, 25)]
    state = checkpoint.load(RunFolder(tmp_path / "run").checkpoints()[-1])
    assert state["rewirer"]["step_count"] == 22 and state["scaler"]["scale"] == 65536 / 4


def test_losses_that_stay_infinite_in_half_precision_end_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, range(3, 100))
    config = dataclasses.replace(TINY, amp="fp16", steps=40, eval_interval=40)
    with pytest.raises(DivergedError, match="finite at step 3;"):
        run(config, tmp_path / "run")


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], None),
        (["--compile"], "default"),
        (["--compile", "--seed", "3"], "default"),
        (["--compile", "reduce-overhead"], "reduce-overhead"),
        (["--compile", "--no-compile"], "none"),
    ],
    ids=str,
)
def test_the_flag_alone_compiles_in_the_ordinary_mode(words, mode):
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    given = given_options(parser.parse_args(words))
    assert given.get("compile") == mode
    assert given_options(parser.parse_args(as_flags(given))) == given


def test_configurations_of_earlier_runs_say_whether_to_compile():
    assert [TrainConfig(compile=each).compile for each in (True, False)] == ["default", "none"]
    assert TrainConfig.from_json('{"compile": false}') == TrainConfig()


def test_fused_by_default_on_cuda_only():
    for given, device, fused in ((None, "cuda", True), (None, "cpu", None), (True, "cpu", True), (False, "cuda", None)):
        parameters = [nn.Parameter(torch.zeros(2))]
        optimizer = make_optimizer(parameters, TrainConfig(fused=given).resolved(), torch.device(device))
        assert optimizer.param_groups[0]["fused"] is fused


def test_an_optimizer_keeps_its_own_kernels_when_it_loads_a_state_from_elsewhere():
    """Adam, whose step counts lie on the device where it is fused and on the CPU where it is not."""
    results = []
    for before, after in ((True, False), (False, True), (False, False)):
        torch.manual_seed(0)
        network, saved = nn.Linear(4, 3), {}
        for fused, steps in ((before, 2), (after, 3)):
            config = TrainConfig(optimizer="adam", fused=fused).resolved()
            optimizer = make_optimizer(network.parameters(), config, CPU)
            if saved:
                load_optimizer(optimizer, saved)
                assert bool(optimizer.param_groups[0]["fused"]) is after
            for step in range(steps):
                network(torch.full((2, 4), step + 1.0)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            saved = optimizer.state_dict()
        results.append(network.weight.detach().clone())
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_other_sizes_than_the_first_go_through_the_module_itself():
    calls = []
    network = by_first_size(functools.partial(calls.append), lambda x: calls.append(-len(x)))
    for size in (3, 3, 2, 3):
        network(torch.zeros(size))
    assert [each if isinstance(each, int) else len(each) for each in calls] == [3, 3, -2, 3]


def test_the_gate_is_closed_for_a_while_unless_stored_weights_are_read():
    module = nn.Module()
    for gate, meanwhile in ((True, False), ("magnitude", False), (False, False), ("stored", "stored")):
        module.dense_gradient = gate
        with gate_closed(module):
            assert module.dense_gradient == meanwhile
        assert module.dense_gradient == gate
