"""Fashion-MNIST from idx files written here."""

import gzip
import struct
from urllib.error import URLError

import pytest
import torch

from fxsparse.core.errors import DataError
from fxsparse.training.data import fashion_mnist, sources
from fxsparse.training.data.facts import FASHION_MNIST, Facts

MINIATURE = Facts("Fashion-MNIST", 20, 10, 10, (1, 28, 28))
IMAGES = torch.randint(0, 256, (30, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
LABELS = [i % 10 for i in range(30)]


def idx(magic, shape, values):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(values)


def write_files(folder, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, part in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        images, labels = IMAGES[part], LABELS[part]
        for name, data in (
            (f"{stem}-images-idx3-ubyte", idx(0x803, images.shape, images.flatten().tolist())),
            (f"{stem}-labels-idx1-ubyte", idx(0x801, (len(labels),), labels)),
        ):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.fixture(autouse=True)
def no_system_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")


def read(root):
    return fashion_mnist.read_fashion_mnist(root, MINIATURE)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["root", "root/fashion-mnist", "root/FashionMNIST/raw", "debian"])
def test_files_are_found_in_every_place(tmp_path, place, packed):
    write_files(tmp_path / place, packed)
    train, test = read(tmp_path / "root")
    assert torch.equal(torch.cat([train.pixels, test.pixels])[:, 0], IMAGES)
    assert train.labels.tolist() + test.labels.tolist() == LABELS


def test_load_gives_one_channel_and_ten_classes(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.setitem(sources._READERS, "fashion-mnist", lambda root: (*read(root), 10))
    splits = sources.load("fashion-mnist", tmp_path, image_size=32)
    assert (splits.channels, splits.num_classes, splits.image_size) == (1, 10, 32)
    assert splits.train.pixels.shape == (20, 1, 32, 32)


def test_the_facts_are_the_published_ones():
    assert (FASHION_MNIST.train, FASHION_MNIST.test, FASHION_MNIST.num_classes) == (60_000, 10_000, 10)
    assert FASHION_MNIST.image_shape == (1, 28, 28)


def damage_magic(data):
    return b"\0\0\x08\x01" + data[4:]


def damage_count(data):
    return data[:4] + struct.pack(">I", 21) + data[8:]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_magic, "magic number 0x803"),
        (damage_count, "15680 values instead of 16464"),
        (lambda data: data[:-1], "15679 values instead of 15680"),
        (lambda data: data + b"\0", "15681 values instead of 15680"),
        (lambda data: data[:9], "magic number 0x803"),
        (lambda data: b"", "magic number 0x803"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, damage, told):
    path = write_files(tmp_path, packed=False) / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte .*{told}"):
        read(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"hello"])
def test_a_damaged_gz_is_named(tmp_path, damage):
    path = write_files(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is damaged or truncated"):
        read(tmp_path)


def test_a_file_missing_beside_the_others_is_named(tmp_path):
    (write_files(tmp_path) / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is missing"):
        read(tmp_path)


def test_mnist_itself_is_not_taken_for_it(tmp_path):
    """MNIST has the same files and sizes, but not the same number of images a class."""
    labels = write_files(tmp_path, packed=False) / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(0x801, (20,), [0, *LABELS[:19]]))
    with pytest.raises(DataError, match="does not hold Fashion-MNIST: it has 3 training images of class 0"):
        read(tmp_path)


def test_out_of_reach_says_where_to_put_the_files(tmp_path, monkeypatch):
    def unreachable(root, download):
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(fashion_mnist, "FashionMNIST", unreachable)
    with pytest.raises(DataError, match=r"\(Name or service not known\): place .*idx3-ubyte\.gz") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and "dataset-fashion-mnist" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_kept_in_torchvisions_place(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(
        fashion_mnist, "FashionMNIST", lambda root, download: write_files(Path(root) / "FashionMNIST" / "raw")
    )
    read(tmp_path)
    monkeypatch.setattr(fashion_mnist, "FashionMNIST", None)
    assert len(read(tmp_path)[0]) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["FashionMNIST"]
