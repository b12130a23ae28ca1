"""The command line: one line for what the user got wrong, everything in --help, resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import fxsparse
from fxsparse.cli import main
from fxsparse.core.errors import ConfigError
from fxsparse.training.config import config_options

ROOT = Path(__file__).resolve().parents[2]
SHORT = "train --model small_resnet --model-options width=4 --steps 12 --update-interval 5 --threads 1".split()
SHORT += "--no-tensorboard --no-plots --no-progress".split()

WRONG = [
    ("train --method rigle", ["'rigle'", "did you mean rigl", "dense", "static", "set"]),
    ("train --model smal_resnet", ["'smal_resnet'", "small_resnet"]),
    ("train --data mnist", ["'mnist'", "digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder"]),
    ("train --optimizer lion", ["'lion'", "sgd, adam, adamw"]),
    ("train --schedule slow", ["step, cosine, constant"]),
    ("train --amp fp8", ["none, bf16, fp16"]),
    ("train --sparsity 1.5", ["sparsity is 1.5", "[0, 1)"]),
    ("train --steps many", ["--steps", "'many'", "int"]),
    ("train --distribution erq", ["erq", "erk"]),
    ("train --decay sudden", ["sudden", "cosine"]),
    ("train --device cuda:99", ["cuda:99", "auto", "cpu"]),
    ("train --epochs 1 --steps 5", ["epochs", "steps"]),
    ("train --dense nosuch.weight", ["nosuch.weight"]),
    ("train --model-options width", ["KEY=VALUE"]),
    ("train --model-options depth=3", ["depth", "width"]),
    ("train --model resnet18", ["resnet18", "in_channels"]),
    ("train --steps", ["--steps", "argument"]),
    ("train --sparsty 0.5", ["--sparsty"]),
    ("train --resume nowhere", ["nowhere"]),
    ("train --data imagefolder:nowhere", ["nowhere"]),
    ("train --validation 99999", ["99999"]),
    ("train --data text:nowhere", ["there is no text nowhere"]),
    ("train --data text:.", ["is a folder"]),
    ("train --data text:nowhere --flip", ["flip", "for images"]),
    ("train --model char-gru", ["char_gru takes text"]),
    ("data moby-dick --source nowhere.tgz", ["nowhere.tgz"]),
    ("data cifar11", ["cifar11", "cifar10"]),
    ("data cifar10 --source nowhere.tgz", ["nowhere.tgz"]),
    ("data", ["NAME"]),
    ("brain", ["brain", "train", "data"]),
    ("", ["COMMAND"]),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "said"), WRONG, ids=[command for command, _ in WRONG])
def test_what_the_user_got_wrong_is_one_line(command, said, tmp_path, capfd):
    assert main(command.split()) == 2
    out, err = capfd.readouterr()
    assert err.startswith("fxsparse: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert out == ""
    for part in said:
        assert part in err
    assert not (tmp_path / "runs").exists()


def test_help_names_every_option_and_its_default(capsys):
    assert main(["train", "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for option in config_options().values():
        assert option.flag in text
    for part in (
        "default: 0.9",
        "30 for digits",
        "250 for cifar10, cifar100;",
        "0.1 for sgd",
        "(default: no)",
        "{sgd,adam,adamw}",
        "--resume",
        "90%:",
    ):
        assert part in text
    for command in ([], ["data"]):
        assert main([*command, "--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fxsparse {fxsparse.__version__}\n"


def test_it_trains_and_refuses_to_overwrite_and_knows_a_finished_run(capsys, tmp_path):
    assert main(SHORT) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "digits-small_resnet-rigl-0.9-seed0"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_options"], config["steps"], config["plots"]) == ({"width": 4}, 12, False)
    out = capsys.readouterr().out
    assert "sparsity 0.899" in out and "test accuracy" in out and "mask changes" in out

    assert main(SHORT) == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["train", "--resume", str(folder), "--steps", "13"]) == 2
    assert "--steps 13 contradicts the run to resume, which has 12" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder), "--steps", "12", "--no-progress"]) == 0


def test_an_unwritable_place_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main([*SHORT, "--out", "file/run"]) == 2
    assert capsys.readouterr().err.startswith("fxsparse: error: could not write to the run folder file/run")


def test_flags_of_every_kind(tmp_path):
    flags = "--milestones 0.5 9 --dense first last --no-nesterov --crop 1 --flip --lr 0.05 --method static"
    assert main([*SHORT, *flags.split(), "--out", "run", "--model-options", "blocks=1"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["milestones"] == [0.5, 9] and config["dense"] == ["first", "last"]
    assert (config["nesterov"], config["crop"], config["flip"], config["lr"]) == (False, 1, True, 0.05)
    assert config["model_options"] == {"width": 4, "blocks": 1}


def test_ctrl_c_in_a_terminal_saves_and_says_how_to_resume(tmp_path):
    flags = ["--steps", "100000", "--log-interval", "1", "--out", "run", "--model-options", "width=2"]
    command = [sys.executable, "-m", "fxsparse", *SHORT, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"fxsparse: interrupted after step \d+; continue with: fxsparse train --resume run\n", err)
    assert len(list((tmp_path / "run/checkpoints").glob("step-*.pt"))) == 1


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, capsys):
    def interrupted(config, saved):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxsparse.training.loop.build", interrupted)
    assert main(SHORT) == 130
    assert capsys.readouterr().err == "fxsparse: interrupted\n"


def test_a_warning_of_ours_is_one_line(monkeypatch, capsys):
    def warned(config, saved):
        warnings.warn("something to know", fxsparse.FxSparseWarning, stacklevel=2)
        raise ConfigError("enough")

    monkeypatch.setattr("fxsparse.training.loop.build", warned)
    assert main(SHORT) == 2
    assert capsys.readouterr().err == "fxsparse: warning: something to know\nfxsparse: error: enough\n"


def test_tools_train_is_the_same_command():
    program = [sys.executable, str(ROOT / "tools/train.py"), "--method", "rigle"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("fxsparse: error: unknown method 'rigle'")
