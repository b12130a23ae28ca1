"""Which runs a comparison comes to, counted by hand, and in which order."""

import dataclasses
import json

import pytest

from fxsparse.core.errors import ConfigError
from fxsparse.training import TrainConfig


def names(runs):
    return [run.folder.name for run in runs]


def test_dense_is_run_once_a_seed_and_a_row_keeps_its_own_distribution(planned):
    rows = ["dense", "rigl", {"method": "rigl", "distribution": "uniform", "label": "RigL U", "sparsity": 0.5}]
    _, runs = planned(methods=rows, sparsities=[0.8, 0.9], distributions=["uniform", "erk"], seeds=[0, 1])
    assert names(runs[:6]) == [
        "dense-seed0",
        "rigl-0.8-uniform-seed0",
        "rigl-0.8-erk-seed0",
        "rigl-0.9-uniform-seed0",
        "rigl-0.9-erk-seed0",
        "rigl-u-0.5-uniform-seed0",
    ]
    assert len(runs) == 12 and len({run.folder for run in runs}) == 12
    assert {(run.sparsity, run.distribution) for run in runs if run.row.label == "dense"} == {(None, None)}
    third = runs[2].config
    assert (third.method, third.sparsity, third.distribution, third.seed) == ("rigl", 0.8, "erk", 0)
    assert runs[5].config.sparsity == 0.5 and runs[11].config.seed == 1


def test_shared_and_own_options_and_pairs_are_added_up(planned):
    options = {"steps": 5, "model": "small_resnet", "model_options": {"width": 2}, "lr": 0.5}
    rows = [{"method": "rigl", "lr": 0.1, "model_options": {"blocks": 1}}, "set"]
    _, runs = planned(options=options, methods=rows)
    rigl, plain = (run.config for run in runs)
    assert rigl.model_options == {"width": 2, "blocks": 1} and rigl.lr == 0.1 and rigl.steps == 5
    assert plain.model_options == {"width": 2} and plain.lr == 0.5
    assert rigl == rigl.resolved() and not rigl.plots and not rigl.tensorboard


def test_a_wrong_value_anywhere_is_refused_before_anything_is_there(planned, tmp_path):
    with pytest.raises(ConfigError, match=r"test\.yaml: broken: drop_fraction is 7"):
        planned(methods=["rigl", {"method": "set", "label": "broken", "drop_fraction": 7}])
    with pytest.raises(ConfigError, match=r"rigle.*did you mean rigl"):
        planned(methods=["dense", "rigle"])
    with pytest.raises(ConfigError, match=r"sparsity is 1\.5"):
        planned(methods=["rigl"], sparsities=[0.5, 1.5])
    assert not (tmp_path / "out").exists()


def test_a_lottery_ticket_comes_behind_the_pruning_run_of_its_own_place(planned):
    _, runs = planned(
        methods=["lottery", "dense"], sparsities=[0.8, 0.9], distributions=["uniform", "erk"], seeds=[4, 5]
    )
    assert len(runs) == 2 * (4 + 4 + 1)
    by_folder = {run.folder: run for run in runs}
    for index, run in enumerate(runs):
        if run.row.method == "lottery":
            (needed,) = (by_folder[folder] for folder in run.needs)
            place = (run.sparsity, run.distribution, run.seed)
            assert (needed.sparsity, needed.distribution, needed.seed) == place
            assert needed.row.label == "pruning" and not needed.row.shown
            assert run.config.masks_from == str(needed.folder) and runs.index(needed) < index
        else:
            assert run.needs == ()


def test_a_row_without_a_place_in_the_table_is_run_only_where_it_is_needed(planned):
    _, runs = planned(methods=[{"method": "lottery", "sparsity": 0.9}], sparsities=[0.8, 0.9])
    assert names(runs) == ["pruning-0.9-erk-seed0", "lottery-0.9-erk-seed0"]


def test_global_pruning_has_no_distribution_and_neither_has_its_ticket(planned):
    pruning = {"method": "pruning", "method_options": {"scope": "global"}, "label": "global"}
    _, runs = planned(methods=["lottery", pruning, "set"], distributions=["uniform", "erk"])
    assert names(runs) == ["global-0.9-seed0", "lottery-0.9-seed0", "set-0.9-uniform-seed0", "set-0.9-erk-seed0"]


def test_chains_of_references(planned):
    rows = [
        {"method": "rigl", "label": "last", "densities_from": {"label": "middle"}},
        {"method": "rigl", "label": "middle", "weights_from": {"method": "static"}},
        {"method": "set", "weights_from": {"method": "dense"}},
    ]
    _, runs = planned(methods=rows, distributions=["uniform", "erk"])
    assert names(runs) == [
        "static-0.9-uniform-seed0",
        "static-0.9-erk-seed0",
        "middle-0.9-uniform-seed0",
        "middle-0.9-erk-seed0",
        "last-0.9-uniform-seed0",
        "last-0.9-erk-seed0",
        "dense-seed0",
        "set-weights-from-dense-0.9-uniform-seed0",
        "set-weights-from-dense-0.9-erk-seed0",
    ]
    needs = {run.folder.name: [folder.name for folder in run.needs] for run in runs}
    assert needs["last-0.9-erk-seed0"] == ["middle-0.9-erk-seed0"]
    assert needs["set-weights-from-dense-0.9-erk-seed0"] == ["dense-seed0"]


def test_the_steps_that_others_rewind_to_are_kept(planned):
    rows = [
        {"method": "lottery", "rewind": 5},
        {"method": "lottery", "label": "of rigl", "masks_from": {"label": "R"}},
        {"method": "rigl", "label": "R"},
        {"method": "set", "weights_from": {"label": "R"}, "rewind": 7},
        {"method": "set", "label": "at its end", "weights_from": {"method": "static"}},
    ]
    _, runs = planned(methods=rows)
    kept = {run.row.label: run.config.keep_steps for run in runs}
    assert (kept["pruning"], kept["R"], kept["static"], kept["lottery, rewind 5"]) == ((0, 5), (0, 7), (), ())


def test_a_circle_and_a_place_that_is_not_there_are_named(planned):
    circle = [
        {"method": "rigl", "label": "a", "weights_from": {"label": "b"}},
        {"method": "rigl", "label": "b", "weights_from": {"label": "a"}},
    ]
    with pytest.raises(ConfigError, match="circle: a -> b -> a"):
        planned(methods=circle)
    rows = [{"method": "static", "distribution": "uniform"}, {"method": "rigl", "weights_from": {"method": "static"}}]
    with pytest.raises(ConfigError, match=r"rigl, weights_from static at 0\.9, erk needs one run of static.*no run"):
        planned(methods=rows, distributions=["erk"])


def test_every_config_survives_the_way_to_a_worker(planned):
    _, runs = planned(methods=["rigl", "dense"])
    for run in runs:
        told = json.loads(json.dumps(dataclasses.asdict(run.config)))
        assert TrainConfig.from_dict(told) == run.config
