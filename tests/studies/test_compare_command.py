"""`fxsparse compare` from the command line: the files it writes, its exit codes, one line for every mistake."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsparse.cli import main

YAML = """
title: Two methods
options: {model: small_resnet, model_options: {width: 2}, steps: 6, batch_size: 16, update_interval: 2, threads: 1}
methods: [static, {method: rigl, label: RigL}]
seeds: [0, 1]
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(YAML)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "CONFIG.yaml"),
        ("nowhere.yaml", "could not read nowhere.yaml"),
        ("two.yaml --jobs 0", "--jobs is 0"),
        ("two.yaml --limit-minutes 0", "--limit-minutes is 0"),
        ("two.yaml --table out.txt", "--table out.txt is no .md file"),
        ("two.yaml --list --table-only", "--table-only"),
        ("two.yaml --tabel x.md", "--tabel"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, said, capsys):
    assert main(["compare", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("fxsparse: error: ") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_list_then_table_only_then_all_of_it(capsys):
    assert main(["compare", "two.yaml", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("not run") == 4 and "0 of 4 runs finished" in listed and not Path("runs").exists()

    assert main(["compare", "two.yaml", "--table-only"]) == 0
    assert "| RigL | not run |" in Path("runs/two/comparison.md").read_text()
    assert "no picture yet" in capsys.readouterr().out

    assert main(["compare", "two.yaml"]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^\[(\d)/4\] ", err, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "table: runs/two/comparison.md, runs/two/comparison.csv" in out
    text = Path("runs/two/comparison.md").read_text()
    assert text.startswith("# Two methods\n") and text.endswith("Made by:\n\n    fxsparse compare two.yaml\n")
    results = [
        json.loads(path.read_text())["test_accuracy"]
        for path in sorted(Path("runs/two/runs").glob("rigl-*/*.json"))
        if path.name == "result.json"
    ]
    assert len(results) == 2 and f"{50 * sum(results):.2f} ± " in text
    assert Path("runs/two/comparison.csv").read_text().count("\n") == 3

    assert main(["compare", "two.yaml", "--list"]) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out
    assert main(["compare", "two.yaml", "--table", "docs/methods.md"]) == 0
    moved = Path("docs/methods.md").read_text()
    assert moved.replace("methods.png", "comparison.png").startswith(text[: text.index("Made by")])
    assert "fxsparse compare two.yaml --table docs/methods.md" in moved and Path("docs/methods.csv").exists()


def test_a_failed_run_is_told_in_the_table_and_in_the_exit_code(capsys):
    Path("two.yaml").write_text(YAML.replace("static,", "{method: static, dense: [nosuch.weight]},"))
    assert main(["compare", "two.yaml"]) == 1
    assert "2 of 4 runs failed" in capsys.readouterr().err
    text = Path("runs/two/comparison.md").read_text()
    assert "| 2 failed |" in text and "seed 1 failed: " in text and "nosuch.weight" in text


def test_ctrl_c_writes_the_table_and_says_how_to_go_on(capsys):
    made = []

    def interrupt_later(*arguments):
        made.append(1)
        if len(made) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_post_hook(interrupt_later)
    try:
        assert main(["compare", "two.yaml", "--out", "my runs"]) == 130
        err = capsys.readouterr().err
        assert err.endswith(
            "fxsparse: interrupted, 1 of 4 runs finished; continue with: fxsparse compare two.yaml --out 'my runs'\n"
        )
        assert "not run" in Path("my runs/comparison.md").read_text()
        assert main(["compare", "two.yaml", "--out", "my runs"]) == 0
    finally:
        handle.remove()
    assert len(made) == 4 * 6


def test_two_commands_do_not_work_in_one_folder(capsys):
    from fxsparse.training.locks import held

    with held("runs/two/.lock"):
        assert main(["compare", "two.yaml"]) == 2
        assert "another process is at work in runs/two" in capsys.readouterr().err
