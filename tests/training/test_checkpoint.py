"""Checkpoints: complete or not there, and damage is noticed."""

import errno
import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from fxsparse.core.errors import CheckpointError
from fxsparse.training import checkpoint, random_state


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "good.pt"
    checkpoint.save(path, {"weights": torch.arange(5000.0), "step": 7, "nested": {"name": ["a", None, 0.5]}})
    return path


def test_what_was_saved_comes_back(saved):
    payload = checkpoint.load(saved)
    assert payload["step"] == 7 and payload["nested"] == {"name": ["a", None, 0.5]}
    assert torch.equal(payload["weights"], torch.arange(5000.0))
    assert torch.load(saved, weights_only=True)["step"] == 7  # an ordinary torch file


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"good\.pt.*truncated"):
        checkpoint.load(saved)


def test_one_flipped_bit_anywhere_is_noticed(saved):
    content = saved.read_bytes()
    for place in [*range(0, len(content), 997), len(content) - 1]:
        saved.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"good\.pt"):
            checkpoint.load(saved)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*none\.pt"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="could not read"):
        checkpoint.load(tmp_path)
    torch.save({"step": 3}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is not a complete fxsparse checkpoint"):
        checkpoint.load(tmp_path / "foreign.pt")


def test_another_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="format 1; this version reads 2"):
        checkpoint.load(saved)


class FullDisk:
    """A file that takes 1,000 bytes and then has no space left."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, content):
        self.file.write(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_good_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint, "open", FullDisk, raising=False)
    with pytest.raises(CheckpointError, match=r"good\.pt: No space left on device"):
        checkpoint.save(saved, {"step": 8, "weights": torch.zeros(5000)})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails_later_leaves_it_too(saved, monkeypatch, function):
    before = saved.read_bytes()

    def failing(*place):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.os, function, failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(saved, {"step": 8})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_size_limit_of_the_system_leaves_it_too(saved):
    """The same with the operating system refusing: no monkeypatch, a real limit on the size of files."""
    pytest.importorskip("resource")
    before = saved.read_bytes()
    program = (
        "import resource, sys, torch\n"
        "from fxsparse.training import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: checkpoint.save(sys.argv[1], {'weights': torch.zeros(100_000)})\n"
        "except checkpoint.CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True)
    assert "could not write" in done.stdout and "too large" in done.stdout, done.stderr
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_disk_has_the_content_before_the_name(saved, monkeypatch):
    calls = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)

        def recorded(*place, name=function, real=real):
            calls.append(name)
            return real(*place)

        monkeypatch.setattr(checkpoint.os, function, recorded)
    checkpoint.save(saved, {"step": 8})
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="could not write"):
        checkpoint.save(tmp_path / "file" / "new.pt", {})
    with pytest.raises(CheckpointError, match="could not write"):
        checkpoint.save(tmp_path / "missing" / "new.pt", {})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_leaves_the_last_good_checkpoint(saved):
    saved.parent.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            checkpoint.save(saved, {"step": 8})
    finally:
        saved.parent.chmod(0o755)
    assert checkpoint.load(saved)["step"] == 7


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    random_state.seed_everything(5)
    draw()
    random.gauss(0, 1)  # leaves a second value cached
    checkpoint.save(tmp_path / "random.pt", {"random": random_state.capture()})
    expected = draw()
    random_state.seed_everything(6)
    random_state.restore(checkpoint.load(tmp_path / "random.pt")["random"])
    assert draw() == expected
