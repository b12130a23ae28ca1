"""The queue's order, and the recipe's numbers in every run."""

import dataclasses

import pytest

from fxsparse.core.errors import ConfigError
from fxsparse.reproduction.published import all_places
from fxsparse.reproduction.queue import Recipe, full_queue, scaled_queue, with_options
from fxsparse.runtime.schedule import UpdateSchedule
from fxsparse.training.experiment import build
from fxsparse.training.schedule import learning_rate


@pytest.fixture(scope="module")
def queue():
    return full_queue()


def test_every_prefix_is_of_use(queue):
    names = [run.name for run in queue]
    methods = ("static", "set", "rigl")
    assert names[:4] == ["45k-dense-seed0", *(f"45k-{method}-erk-0.1-seed0" for method in methods)]
    assert names[4:7] == [f"45k-{method}-uniform-0.1-seed0" for method in methods]
    assert {name.split("-seed")[0] for name in names[7:13]} == {
        f"45k-{method}-{distribution}-0.2" for method in methods for distribution in ("erk", "uniform")
    }
    a_seed = len(all_places())
    assert [run.seed for run in queue] == [0] * a_seed + [1] * a_seed + [2] * a_seed
    later = [run.config.validation for run in queue[:a_seed]]
    assert later == sorted(later, reverse=True) and names[33] == "50k-dense-seed0"


def test_every_accuracy_is_run_once_a_seed(queue):
    assert len({run.name for run in queue}) == len(queue) == 3 * 43
    for seed in range(3):
        places = [(id(run.place.row), run.place.density) for run in queue if run.seed == seed]
        assert sorted(places) == sorted((id(each.row), each.density) for each in all_places())


def test_the_recipe(queue):
    for run in queue:
        config = run.config
        assert (config.model, config.data, config.batch_size) == ("wide_resnet22_2", "cifar10", 128)
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 5e-4)
        assert (config.flip, config.crop, config.nesterov, config.model_options) == (True, 4, True, {"dropout": 0.3})
        images = 50_000 - config.validation
        assert images == int(run.name[:2]) * 1000 and config.steps == 250 * images // 128
        assert (config.update_interval, config.drop_fraction, config.decay) == (100, 0.3, "cosine")
        assert config.seed == run.seed and config.semantics == "paper" and config.train_images is None
        assert config.sparsity == pytest.approx(1 - run.place.density)


@pytest.mark.parametrize(
    ("name", "stretch"),
    [("45k-rigl-erk-0.1-seed0", 1), ("45k-rigl-2x-erk-0.1-seed0", 2), ("50k-rigl-erk-0.5-seed2", 1)],
)
def test_learning_rate_and_end_of_rewiring(queue, name, stretch):
    config = next(run.config for run in queue if run.name == name)
    steps = config.steps * stretch
    assert next(run.steps for run in queue if run.name == name) == steps
    milestones = [each * config.extend for each in config.milestones]  # as `Experiment.rate_at` has them
    for passed, rate in ((0, 0.1), (30_000, 0.02), (60_000, 0.004), (90_000, 0.0008)):
        for step in (stretch * passed, stretch * (passed + 30_000) - 1):
            if step < steps:
                assert learning_rate(
                    step, steps, base=config.lr, schedule=config.schedule, milestones=milestones, gamma=config.gamma
                ) == pytest.approx(rate)
    schedule = UpdateSchedule.for_run(
        steps, update_interval=config.update_interval, stop_fraction=config.stop_fraction, drop_fraction=0.3
    )
    end = stretch * 75_000
    assert schedule.is_update_step(end - 100) and not schedule.is_update_step(end)


def test_the_methods(queue):
    methods = {run.place.row.label: run.config for run in queue}
    assert methods["RigL 2x"].extend == 2 and methods["RigL"].extend == 1
    assert methods["pruning"].method_options == {"scope": "global"}
    assert methods["RigL-struct"].method == "rigl-struct" and methods["small-dense"].method == "small-dense"
    assert {config.extend for label, config in methods.items() if label != "RigL 2x"} == {1}


def test_what_the_report_leaves_open_is_in_the_name(queue):
    recipe = Recipe(nesterov=False, dropout=0.0, stop_step=65_918)
    other = full_queue(recipe)
    assert other[3].name == "45k-rigl-erk-0.1-seed0-no-nesterov-dropout0-stop65918"
    assert not other[3].config.nesterov and other[3].config.model_options == {"dropout": 0.0}
    assert round(other[3].config.stop_fraction * 87_890) == 65_918
    assert not {run.name for run in other} & {run.name for run in queue}
    assert full_queue(Recipe(semantics="report"))[0].config.semantics == "report"
    for wrong in ({"dropout": 1.0}, {"stop_step": 0}, {"stop_step": 99_999}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Recipe(**wrong)


def test_the_scaled_queue_is_small_and_says_so():
    runs = scaled_queue()
    assert len(runs) == 12 and all(run.name.startswith("scaled-") for run in runs)
    assert [run.place.row.label for run in runs[:4]] == ["dense", "static", "SET", "RigL"]
    for run in runs:
        assert (run.config.train_images, run.config.steps, run.config.model_options) == (8_000, 2_000, {"width": 0.25})
        assert run.config.threads == 1


def test_options_that_change_the_result_are_refused(queue):
    assert with_options(queue[:1], {"device": "cpu", "threads": 3})[0].config.threads == 3
    with pytest.raises(ConfigError, match="lr"):
        with_options(queue[:1], {"lr": 0.5})


FIRST_LAYER = 16 * 1 * 3 * 3  # weights, of pictures with one channel
WEIGHTS = 1_076_912 - 2 * 16 * 9  # of WideResNet-22-2, likewise


@pytest.mark.slow
def test_every_run_can_be_built_and_has_its_density(queue):
    for run in queue[: len(all_places())]:
        config = dataclasses.replace(run.config, data="digits", validation=0, verify=False)
        parts = build(config)
        row, density = run.place.row, run.place.density
        goal = parts.sparse.target_counts if parts.sparse.method.starts_dense else parts.sparse.active_counts
        assert parts.total_steps == run.steps
        if row.label == "small-dense":
            assert 0.95 * density < sum(goal.values()) / WEIGHTS < 1.05 * density
            continue
        assert sum(mask.numel() for mask in parts.sparse.masks.values()) == WEIGHTS
        achieved = sum(goal.values()) / WEIGHTS
        if row.label == "RigL-struct":
            assert achieved == pytest.approx(density, rel=0.05), run.name  # whole channels, and an undivided classifier
        elif row.distribution == "uniform" or row.label == "pruning":
            expected = (density * (WEIGHTS - FIRST_LAYER) + FIRST_LAYER) / WEIGHTS
            assert achieved == pytest.approx(expected, abs=3e-5), run.name
        else:
            assert achieved == pytest.approx(density, abs=3e-5), run.name
