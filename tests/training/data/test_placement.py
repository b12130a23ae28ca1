"""Where images lie: on the device where they fit, and said so where they do not."""

import dataclasses

import pytest
import torch

from fxsparse.core.errors import ConfigError
from fxsparse.training import TrainConfig, summary
from fxsparse.training.data import ImageSet, placement
from fxsparse.training.data.image_folder import FolderSet
from fxsparse.training.experiment import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = ImageSet(torch.zeros(1000, 3, 32, 32, dtype=torch.uint8), torch.zeros(1000))  # 3,072,000 and 8,000 bytes
FOLDER = FolderSet(["a.png"], torch.zeros(1, dtype=torch.int64), 32)


@pytest.mark.parametrize(
    ("free", "sets", "where", "device", "said"),
    [
        (2 * 3_080_000, [IMAGES], "auto", CUDA, "images are on cuda: 2.9 MiB"),
        (2 * 3_080_000 - 1, [IMAGES], "auto", CPU, "2.9 MiB is more than 50% of the 5.9 MiB that are free on cuda"),
        (2 * 3_080_000, [IMAGES, IMAGES], "auto", CPU, "images stay on the CPU: 5.9 MiB is more"),
        (0, [IMAGES], "device", CUDA, "images are on cuda"),
        (2**40, [IMAGES], "cpu", CPU, "images stay on the CPU: 2.9 MiB"),
        (2**40, [FOLDER], "auto", CPU, "decoded from disk, by 3 processes"),
    ],
)
def test_images_go_to_the_device_where_half_of_its_free_memory_holds_them(free, sets, where, device, said, monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda _: free)
    found = placement.place(sets, CUDA, where, workers=3)
    assert found.device == device and said in found.words and "\n" not in found.words


def test_on_the_cpu_there_is_nothing_to_say():
    assert placement.place([IMAGES], CPU) == placement.Placement(CPU, "")


def test_images_of_a_folder_cannot_be_put_on_the_device():
    with pytest.raises(ConfigError, match=r"data_device is device.*leave data_device out"):
        placement.place([FOLDER], CUDA, "device")


def test_a_run_says_where_its_images_are():
    config = TrainConfig(model="small_resnet", model_options={"width": 4}, verify=False)
    parts = build(config)
    before = summary.before(parts).splitlines()
    parts.task.place = "images are on the moon"
    assert [line for line in summary.before(parts).splitlines() if line not in before] == ["  images are on the moon"]
    assert dataclasses.replace(config.resolved()).changed_by({"data_device": "cpu"}).data_device == "cpu"
