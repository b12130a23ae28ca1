"""`fxsparse train` on a CUDA device: the same batches as on the CPU, no waiting between records, and it learns."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from fxsparse.training import TrainConfig, checkpoint, continue_run, train
from fxsparse.training.data import Batches, ImageSet
from fxsparse.training.experiment import build
from fxsparse.training.loop import _Loop
from fxsparse.training.run_folder import ResumePoint, RunFolder

pytestmark = pytest.mark.gpu

DIGITS = TrainConfig(
    model="small_resnet",
    device="cuda",
    steps=200,
    sparsity=0.9,
    update_interval=20,
    log_interval=100,
    tensorboard=False,
    plots=False,
)
FAST = {"compile": "reduce-overhead", "amp": "bf16", "channels_last": True}


def quietly(line):
    pass


@pytest.mark.parametrize("data_device", ["cuda", "cpu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_bit_for_bit_those_of_the_cpu(data_device, channels_last):
    pixels = torch.randint(0, 256, (1000, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    images = ImageSet(pixels, torch.arange(1000))
    options = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26), "crop": 4, "flip": True, "seed": 5}
    options |= {"drop_last": False, "channels_last": channels_last}
    expected = list(Batches(images, 128, **options).epoch(2, 3))
    found = list(Batches(images, 128, device="cuda", data_device=data_device, **options).epoch(2, 3))
    assert len(found) == len(expected) == 5
    for (pixels, labels), (others, same) in zip(found, expected, strict=True):
        assert pixels.is_cuda and torch.equal(pixels.cpu(), others) and torch.equal(labels.cpu(), same)
        if channels_last:
            assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("update_interval", [1000, 10], ids=["ordinary", "rewiring"])
@pytest.mark.parametrize("options", [{}, FAST, {"data_device": "cpu"}], ids=["eager", "compiled", "data on the CPU"])
def test_nothing_waits_for_the_device_between_two_records(options, update_interval, tmp_path):
    """Steps 66 to 99, the end of an epoch and the sums of the records among them."""
    torch._dynamo.reset()
    config = dataclasses.replace(DIGITS, update_interval=update_interval, flip=True, crop=1, **options)
    parts = build(config)
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        loop = _Loop(parts, ResumePoint(folder, parts.config, None), False, quietly)
        batches = iter(loop._batches())
        for _ in range(65):  # compiled, recorded, and the rewirer's look for stray weights after step 64
            loop._train_step(*next(batches))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(34):
                loop._train_step(*next(batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loop._record_training()
        assert loop.step == 99 and len(parts.rewirer.history) == (9 if update_interval == 10 else 0)
        loop.log.close()


@pytest.mark.parametrize("options", [{}, FAST, FAST | {"amp": "fp16"}], ids=["eager", "bf16", "fp16"])
def test_it_learns_and_keeps_the_sparsity_exactly(options, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    result = train(dataclasses.replace(DIGITS, **options), tmp_path / "run", progress=False, say=quietly)
    assert result.test_accuracy > 0.9  # ten classes; a constant answer gets 0.1
    assert result.rewirings == 7 and result.skipped_rewirings == 0  # at 20, 40, ..., 140
    if "compile" in options:
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    state = checkpoint.load(RunFolder(tmp_path / "run").checkpoints()[-1])["model"]
    masks = {name: value for name, value in state.items() if name.endswith("_mask")}
    active, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert abs(active - 0.1 * total) <= len(masks)  # up to one element a site
    for name, mask in masks.items():
        assert not state[name.removesuffix("_mask")][~mask].any()


def test_compiled_it_follows_the_eager_run(tmp_path):
    torch._dynamo.reset()
    results = [
        train(
            dataclasses.replace(DIGITS, steps=60, compile=mode, schedule="constant", lr=0.01),
            tmp_path / mode,
            progress=False,
            say=quietly,
        )
        for mode in ("none", "default", "reduce-overhead")
    ]
    for result in results[1:]:
        assert result.test_loss == pytest.approx(results[0].test_loss, rel=0.05)


def test_a_run_of_the_device_goes_on_on_the_cpu(tmp_path):
    torch._dynamo.reset()
    config = dataclasses.replace(DIGITS, channels_last=True, optimizer="adam", checkpoint_interval=100)
    train(dataclasses.replace(config, keep_checkpoints=0), tmp_path / "run", progress=False, say=quietly)
    middle = RunFolder(tmp_path / "run").checkpoints()[0]
    result = continue_run(middle, tmp_path / "cpu", changes={"device": "cpu"}, progress=False, say=quietly)
    assert result.device.startswith("cpu") and result.test_accuracy > 0.9
