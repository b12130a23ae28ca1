"""The command: what it lists, what it refuses, and that the page in docs/ is what it writes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "tools" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(tool, tmp_path, capsys, monkeypatch):
    """Runs it in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = tool.main(argv)
        return code, *capsys.readouterr()

    return run


def test_the_queue_is_listed(command, tmp_path):
    code, out, _ = command("status", "--device", "cpu")
    assert code == 0 and "129 runs: 0 finished, 129 not run" in out
    lines = out.splitlines()
    assert "45k-dense-seed0" in lines[2] and "not run" in lines[2] and "87,890" in lines[2]
    assert command("run", "--list", "--device", "cpu")[1] == out and list(tmp_path.iterdir()) == []
    assert "12 runs: 0 finished" in command("status", "--scaled")[1]
    assert "-no-nesterov" in command("status", "--no-nesterov")[1]
    assert "3 runs" in command("status", "--only", "45k-rigl-erk-0.1-*")[1]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("run --minutes 0", "--minutes is 0"),
        ("run --jobs none", "--jobs is 'none'"),
        ("run --jobs 0", "--jobs is '0'"),
        ("run --only nosuch", "--only nosuch: no run is called so; the first is 45k-dense-seed0"),
        ("run --scaled --dropout 0", "--scaled has a recipe of its own"),
        ("run --scaled --device cuda", "--scaled is for the CPU"),
        ("status --dropout 2", "dropout is 2.0"),
        ("status --stop-step 0", "stop_step is 0"),
        ("status --device cuda:99", "there is no device 'cuda:99'"),
        ("time --steps 0", "--steps is 0"),
        ("time --scaled", "leave --scaled out"),
    ],
)
def test_what_is_wrong_is_one_line(command, tmp_path, argv, told):
    code, _, err = command(*argv.split())
    assert code == 2 and told in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_page_in_docs_is_what_the_results_say(tool, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    written = tmp_path / "reproduction.md"
    assert tool.main(["page", "--results", str(ROOT / "results"), "--write", str(written)]) == 0
    assert "left out" not in capsys.readouterr().out
    assert written.read_text() == (ROOT / "docs" / "reproduction.md").read_text()
