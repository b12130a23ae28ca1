"""Names, digits, and CIFAR in torchvision's form, from archives written here."""

import hashlib
import io
import pickle
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from fxsparse.core.errors import ConfigError, DataError
from fxsparse.training.data import load, names, sources, torchvision_cifar
from fxsparse.training.data.cifar10_file import build_command
from fxsparse.training.data.facts import Facts


def test_names():
    assert names() == ["digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder:PATH", "text:PATH"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("cifr10", "did you mean cifar10"), ("mnist", "fashion-mnist"), ("imagefolder:", "imagefolder:PATH")],
)
def test_an_unknown_name_lists_the_choices_on_one_line(tmp_path, name, told):
    with pytest.raises(ConfigError, match=f"unknown data set .*digits, cifar10, .*{told}") as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    splits = load("digits")
    assert (len(splits.train), len(splits.test), splits.validation) == (1437, 360, None)
    assert (splits.num_classes, splits.channels, splits.image_size) == (10, 1, 8)
    pixels = torch.cat([splits.train.pixels, splits.test.pixels])
    assert pixels.dtype == torch.uint8 and (int(pixels.min()), int(pixels.max())) == (0, 255)
    original = load_digits()
    assert len(original.images) == 1797

    def bag(images, labels):
        return sorted((tuple(i.ravel()), int(label)) for i, label in zip(images, labels, strict=True))

    found = np.rint(pixels[:, 0].numpy() * (16 / 255)).astype(int)
    labels = torch.cat([splits.train.labels, splits.test.labels])
    assert bag(found, labels) == bag(original.images.astype(int), original.target)
    assert splits.mean[0] == pytest.approx(splits.train.pixels.double().mean() / 255)


def test_a_part_of_the_training_images_class_by_class():
    whole, held = load("digits"), load("digits", validation=100, split_seed=3)
    part = load("digits", validation=100, train_images=500, split_seed=3)
    assert len(part.train) == 500 and torch.equal(part.validation.pixels, held.validation.pixels)
    assert torch.equal(part.test.pixels, whole.test.pixels)
    share = part.train.labels.bincount() / held.train.labels.bincount()
    assert ((share - 500 / 1337).abs() < 0.01).all()
    among = {bytes(image.numpy()) for image in held.train.pixels}
    assert all(bytes(image.numpy()) in among for image in part.train.pixels)
    assert part.mean[0] == pytest.approx(part.train.pixels.double().mean() / 255)
    assert not torch.equal(part.train.pixels, load("digits", train_images=500, split_seed=4).train.pixels)
    assert len(load("digits", train_images=1437).train) == 1437
    for wrong in (0, 1438):
        with pytest.raises(ConfigError, match=f"train_images is {wrong}; it must be 1 to 1437"):
            load("digits", train_images=wrong)


def test_digits_are_split_in_proportion_and_always_alike():
    one, other = load("digits", split_seed=0), load("digits", split_seed=1)
    assert torch.equal(one.test.pixels, other.test.pixels)
    shares = one.test.labels.bincount() / (one.test.labels.bincount() + one.train.labels.bincount())
    assert ((shares - 0.2).abs() < 0.005).all()


def test_validation_images_come_from_the_training_part():
    splits = load("digits", validation=200, split_seed=1)
    other = load("digits", validation=200, split_seed=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1237, 200, 360)
    assert not torch.equal(splits.validation.pixels, other.validation.pixels)
    whole = load("digits").train
    rejoined = torch.cat([splits.train.pixels, splits.validation.pixels]).flatten(1)
    assert sorted(rejoined.tolist()) == sorted(whole.pixels.flatten(1).tolist())
    assert splits.mean[0] == pytest.approx(splits.train.pixels.double().mean() / 255)


@pytest.mark.parametrize("validation", [-1, 1437])
def test_an_impossible_validation_part_is_refused(validation):
    with pytest.raises(ConfigError, match=f"validation is {validation}; it must be 0 to 1436"):
        load("digits", validation=validation)


def test_images_are_resized_on_request():
    splits = load("digits", image_size=32, validation=100)
    assert splits.image_size == 32
    assert {part.pixels.shape[1:] for part in (splits.train, splits.test, splits.validation)} == {(1, 32, 32)}
    with pytest.raises(ConfigError, match="image_size is 0"):
        load("digits", image_size=0)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fxsparse\[digits\]'"):
        load("digits")


IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
LABELS = [i % 10 for i in range(60)]
MINIATURE = Facts("CIFAR-10", 50, 10, 10, (3, 32, 32))


def unreachable(self):
    raise URLError(OSError(-2, "Name or service not known"))


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """torchvision's CIFAR10 pointed at a set of 60 images; returns `(root, archive bytes)`, root empty."""
    files, archive = {}, io.BytesIO()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(10 * number, 10 * number + 10)
        files[name] = pickle.dumps({"data": IMAGES[part].reshape(10, 3072), "labels": LABELS[part]})
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    def md5(data):
        return hashlib.md5(data).hexdigest()

    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [(f"data_batch_{i}", md5(files[f"data_batch_{i}"])) for i in range(1, 6)])
    monkeypatch.setattr(kind, "test_list", [("test_batch", md5(files["test_batch"]))])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(files["batches.meta"])})
    monkeypatch.setattr(kind, "tgz_md5", md5(archive.getvalue()))
    monkeypatch.setattr(kind, "download", unreachable)
    monkeypatch.setattr(sources, "CIFAR10", MINIATURE)
    root = tmp_path / "data"
    root.mkdir()
    return root, archive.getvalue()


def assert_miniature(splits):
    found = torch.cat([splits.train.pixels, splits.test.pixels])
    assert torch.equal(found, torch.from_numpy(IMAGES))
    assert splits.train.labels.tolist() + splits.test.labels.tolist() == LABELS


def test_torchvisions_archive_is_unpacked_and_read(miniature):
    root, archive = miniature
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    assert_miniature(load("cifar10", root))
    (root / "cifar-10-python.tar.gz").unlink()
    assert_miniature(load("cifar10", root))  # from the folder now
    assert [p.name for p in root.iterdir()] == ["cifar-10-batches-py"]


def test_a_download_is_kept(miniature, monkeypatch):
    root, archive = miniature

    def download(self):
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(self.root, filter="data")

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    assert_miniature(load("cifar10", root))
    assert [p.name for p in root.iterdir()] == ["cifar-10-batches-py"]


def test_cifar10_out_of_reach_points_to_the_command(miniature, capfd):
    root, _ = miniature
    with pytest.raises(
        DataError, match=r"\(Name or service .*\): run `fxsparse data cifar10 --root .*/data`$"
    ) as caught:
        load("cifar10", root)
    assert "\n" not in str(caught.value)
    assert list(root.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_cifar100_out_of_reach_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "download", unreachable)
    with pytest.raises(DataError, match=rf"place cifar-100-python\.tar\.gz .* in {tmp_path}"):
        load("cifar100", tmp_path)


def test_silence_of_the_network_is_limited_and_the_limit_is_taken_back(monkeypatch):
    import socket

    with (
        pytest.raises(DataError, match=r"^failed \(timed out\): help$"),
        torchvision_cifar.quick_network("failed", "help"),
    ):
        assert socket.getdefaulttimeout() == 10
        raise TimeoutError("timed out")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_of_torchvisions_folder_is_named_and_kept(miniature, damage):
    root, archive = miniature
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    load("cifar10", root)
    path = root / "cifar-10-batches-py" / "data_batch_3"
    data = path.read_bytes()[:-5]
    path.unlink() if damage == "missing" else path.write_bytes(data)
    with pytest.raises(DataError, match=f"data_batch_3 is .*{damage}: remove the folder .*fxsparse data cifar10"):
        load("cifar10", root)
    assert damage == "missing" or path.read_bytes() == data


def test_a_truncated_archive_is_named_and_kept(miniature):
    root, archive = miniature
    path = root / "cifar-10-python.tar.gz"
    path.write_bytes(archive[:-100])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged or truncated: remove it"):
        load("cifar10", root)
    assert path.read_bytes() == archive[:-100]
    assert [p.name for p in root.iterdir()] == [path.name]


def test_the_command_names_the_root_only_where_it_is_not_the_default():
    assert build_command(Path("data")) == "`fxsparse data cifar10`"
    assert build_command(Path("my data")) == "`fxsparse data cifar10 --root 'my data'`"
