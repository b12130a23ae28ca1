"""Builds and their cache, with compilers that are shell scripts: what one fault leaves for the next process."""

import multiprocessing
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import fxsparse
from fxsparse import FxSparseWarning
from fxsparse.kernels import build, loading

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers here are shell scripts")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FXSPARSE_KERNELS", raising=False)
    monkeypatch.setattr(loading, "_in_use", None)
    loaded = []

    def load(path):
        if b"good" not in Path(path).read_bytes():
            raise OSError(f"{path}: invalid ELF header")
        loaded.append(Path(path))

    monkeypatch.setattr(torch.ops, "load_library", load)
    return tmp_path / "cache"


def write_compiler(folder, body, version="1.0"):
    """A compiler that logs its calls and runs `body` with $out as its target."""
    path = folder / "compiler"
    path.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            if [ "$1" = --version ]; then echo "compiler {version}"; exit; fi
            echo call >> {folder}/calls
            while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
            {body}
        """)
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    def make(body='echo good > "$out"', version="1.0"):
        monkeypatch.setenv("CXX", str(write_compiler(tmp_path, body, version)))

    make()
    return make


def calls(tmp_path):
    return len((tmp_path / "calls").read_text().split()) if (tmp_path / "calls").exists() else 0


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="another process is a fork of this one")

ONE_BUILD = 4  # three sources, and the link


def fresh(monkeypatch):
    monkeypatch.setattr(loading, "_in_use", None)
    return loading.kernels_in_use()


def test_one_build_serves_every_later_process(cache, compiler, tmp_path, monkeypatch, capfd):
    assert fresh(monkeypatch) == build.capability()
    assert "building the sparse kernels" in capfd.readouterr().err
    assert fresh(monkeypatch) == build.capability() and capfd.readouterr().err == ""
    assert calls(tmp_path) == ONE_BUILD
    (folder,) = (cache / "kernels").iterdir()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]  # the lock, the library


def test_what_a_build_depends_on_has_a_build_of_its_own(cache, compiler, tmp_path, monkeypatch):
    fresh(monkeypatch)
    compiler(version="2.0")
    fresh(monkeypatch)
    assert calls(tmp_path) == 2 * ONE_BUILD
    with monkeypatch.context() as patch:
        found = build.capability()
        other = "AVX2" if found != "AVX2" else "AVX512"
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: other)
        assert fresh(patch) == other
    assert calls(tmp_path) == 3 * ONE_BUILD
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        fresh(patch)
    assert calls(tmp_path) == 4 * ONE_BUILD
    changed = tmp_path / "sources"
    changed.mkdir()
    for path in build.SOURCES.iterdir():
        if path.is_file():
            (changed / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(build, "SOURCES", changed)
        fresh(patch)
        assert calls(tmp_path) == 4 * ONE_BUILD  # the same sources, elsewhere
        (changed / "product.h").write_text((changed / "product.h").read_text() + "\n// changed")
        fresh(patch)
    assert calls(tmp_path) == 5 * ONE_BUILD
    assert fresh(monkeypatch) == found and calls(tmp_path) == 5 * ONE_BUILD


def test_a_build_is_used_where_the_compiler_is_gone(cache, compiler, tmp_path, monkeypatch):
    fresh(monkeypatch)
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert fresh(monkeypatch) == build.capability()


def test_no_compiler(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    with pytest.warns(FxSparseWarning, match=r"no C\+\+ compiler found \(.*gone\).*install a C\+\+20 compiler"):
        assert loading.kernels_in_use() == "torch.sparse"
    assert loading.kernels_in_use() == "torch.sparse"  # said once


def test_a_compiler_that_fails(cache, compiler, tmp_path, monkeypatch):
    compiler("echo note: reading; echo 'x.cpp:3: error: no such thing' >&2; echo more >&2; exit 1")
    with pytest.warns(FxSparseWarning, match=r"x.cpp:3: error: no such thing;") as caught:
        assert loading.kernels_in_use() == "torch.sparse"
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and "more" not in str(caught[0].message)
    (folder,) = (cache / "kernels").iterdir()
    assert [path.name for path in folder.iterdir() if path.name != "lock"] == []
    compiler()  # and once it works, it is asked again
    assert fresh(monkeypatch) == build.capability()


def test_a_compiler_that_hangs(cache, compiler, monkeypatch):
    compiler("exec sleep 60")
    monkeypatch.setattr(build, "TIMEOUT", 0.2)
    begun = time.monotonic()
    with pytest.warns(FxSparseWarning, match="timed out"):
        assert loading.kernels_in_use() == "torch.sparse"
    assert time.monotonic() - begun < 30


def test_a_damaged_build_is_replaced(cache, compiler, tmp_path, monkeypatch):
    fresh(monkeypatch)
    (library,) = cache.glob("kernels/*/*.so")
    library.write_text("half of a li")
    assert fresh(monkeypatch) == build.capability()
    assert library.read_text() == "good\n" and calls(tmp_path) == 2 * ONE_BUILD


def test_a_build_that_never_loads(cache, compiler):
    compiler('echo bad > "$out"')
    with pytest.warns(FxSparseWarning, match="invalid ELF header"):
        assert loading.kernels_in_use() == "torch.sparse"


def test_a_cache_that_cannot_be_written(cache, compiler, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert loading.kernels_in_use() == build.capability()
    assert "cannot write to" in capfd.readouterr().err
    assert not list(tmp_path.glob("fxsparse-*"))  # nothing is left


def test_a_read_only_cache_is_read(cache, compiler, tmp_path, monkeypatch):
    fresh(monkeypatch)
    for folder in (cache, cache / "kernels", *cache.glob("kernels/*")):
        folder.chmod(0o500)
    try:
        if os.access(cache, os.W_OK):
            pytest.skip("nothing is read-only for root")
        assert fresh(monkeypatch) == build.capability() and calls(tmp_path) == ONE_BUILD
    finally:
        for folder in (cache, cache / "kernels", *cache.glob("kernels/*")):
            folder.chmod(0o700)


def test_leftovers_of_a_killed_build_are_swept(cache, compiler, monkeypatch):
    fresh(monkeypatch)
    (library,) = cache.glob("kernels/*/*.so")
    library.unlink()
    (library.parent / "build-killed").mkdir()
    (library.parent / "build-killed" / "float.o").touch()
    fresh(monkeypatch)
    assert not list(library.parent.glob("build-*")) and library.exists()


def child(log):
    """Another process that wants the kernels; what it says and gets goes to `log`."""

    def build_them():
        sys.stderr = log.open("w", buffering=1)
        with build.kernel_library() as path:
            print(path.read_text().strip(), file=sys.stderr, flush=True)

    process = multiprocessing.get_context("fork").Process(target=build_them)
    process.start()
    return process


def _holds(condition):
    try:
        return condition()
    except FileNotFoundError:
        return False


def until(condition):
    begun = time.monotonic()
    while not _holds(condition):
        assert time.monotonic() - begun < 120
        time.sleep(0.02)


@forks
def test_two_processes_build_once(cache, compiler, tmp_path):
    compiler(f'while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo good > "$out"')
    logs = [tmp_path / "first", tmp_path / "second"]
    first, second = map(child, logs)
    until(lambda: calls(tmp_path) == ONE_BUILD - 1)
    until(lambda: any("another process" in log.read_text() for log in logs))
    (tmp_path / "go").touch()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert [log.read_text().split()[-1] for log in logs] == ["good", "good"]
    assert calls(tmp_path) == ONE_BUILD


@forks
def test_the_first_dies_and_the_second_goes_on(cache, compiler, tmp_path):
    compiler(f'while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo good > "$out"')
    first = child(tmp_path / "first")
    until(lambda: calls(tmp_path) == ONE_BUILD - 1)
    second = child(tmp_path / "second")
    until(lambda: "another process" in (tmp_path / "second").read_text())
    first.kill()
    first.join(60)
    until(lambda: calls(tmp_path) == 2 * (ONE_BUILD - 1))
    (tmp_path / "go").touch()
    second.join(60)
    assert (tmp_path / "second").read_text().split()[-1] == "good"
    assert not list(cache.glob("kernels/*/build-*"))


def test_switched_off(cache, monkeypatch, recwarn):
    monkeypatch.setenv("FXSPARSE_KERNELS", "off")
    assert loading.kernels_in_use() == "torch.sparse"
    assert not recwarn.list and not cache.exists()
    monkeypatch.setenv("FXSPARSE_KERNELS", "of")
    monkeypatch.setattr(loading, "_in_use", None)
    with pytest.raises(fxsparse.ConfigError, match="FXSPARSE_KERNELS='of': expected on or off"):
        loading.kernels_in_use()


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"FXSPARSE_CACHE": "/elsewhere"}, "/elsewhere"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/fxsparse"),
        ({"HOME": "/users/me"}, "/users/me/.cache/fxsparse"),
    ],
)
def test_where_the_cache_is(variables, folder, monkeypatch):
    for name in ("FXSPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if sys.platform.startswith("linux"):
        assert build.cache_folder() == Path(folder)
