"""Configurations: what is refused and how, what is filled in, what a resumed run may change."""

import dataclasses

import pytest

import fxsparse
from fxsparse.core.errors import ConfigError
from fxsparse.runtime.methods import METHODS
from fxsparse.training import TrainConfig
from fxsparse.training.config import config_options

WRONG = [
    ({"method": "rigle"}, ["method", "rigle", "did you mean rigl", "static", "set", "dense"]),
    ({"model": "wide_resnet22"}, ["model", "wide_resnet22_2", "small_resnet", "resnet50"]),
    ({"data": "cifar"}, ["data set", "cifar10", "digits", "fashion-mnist", "imagefolder"]),
    ({"optimizer": "adamax"}, ["optimizer", "sgd, adam, adamw"]),
    ({"schedule": "linear"}, ["schedule", "step, cosine, constant"]),
    ({"amp": "fp8"}, ["amp", "none, bf16, fp16"]),
    ({"compile": "max"}, ["compile", "none, default, reduce-overhead"]),
    ({"compile": 1}, ["compile is 1", "text"]),
    ({"data_device": "gpu"}, ["data_device", "auto, device, cpu"]),
    ({"data": "text:a", "channels_last": True}, ["channels_last is True", "for images"]),
    ({"eval_batch_size": 0}, ["eval_batch_size is 0", "[1, inf)"]),
    ({"sparsity": 1.0}, ["sparsity is 1.0", "[0, 1)"]),
    ({"sparsity": -0.1}, ["sparsity is -0.1", "[0, 1)"]),
    ({"sparsity": float("nan")}, ["sparsity is nan", "[0, 1)"]),
    ({"sparsity": "much"}, ["sparsity is 'much'", "a number"]),
    ({"steps": 0}, ["steps is 0", "[1, inf)"]),
    ({"steps": 2.5}, ["steps is 2.5", "whole number"]),
    ({"steps": True}, ["steps is True", "whole number"]),
    ({"gamma": 0}, ["gamma", "(0, 1]"]),
    ({"lr": float("inf")}, ["lr is inf"]),
    ({"seed": -1}, ["seed is -1"]),
    ({"seed": None}, ["seed is None", "whole number"]),
    ({"dense": "first"}, ["dense is 'first'", "a list"]),
    ({"exclude": [3]}, ["exclude is 3", "text"]),
    ({"model_options": ["width=2"]}, ["model_options", "KEY=VALUE"]),
    ({"epochs": 3, "steps": 5}, ["epochs is 3", "steps is 5"]),
    ({"nesterov": True, "optimizer": "adam"}, ["nesterov", "sgd"]),
    ({"nesterov": True, "momentum": 0.0}, ["nesterov", "momentum"]),
    ({"milestones": (0.5, 0.25)}, ["milestones is 0.5 0.25", "rise"]),
    ({"milestones": (10.5,)}, ["milestones", "whole steps"]),
    ({"clip_norm": 0}, ["clip_norm is 0.0", "(0, inf)"]),
    ({"data": "digits", "model": "char-gru"}, ["char_gru takes text", "digits is images"]),
    ({"data": "text:a", "model": "small_resnet"}, ["small_resnet takes images", "text:a is text"]),
    ({"data": "text:a", "flip": True}, ["flip is True", "for images"]),
    ({"data": "text:a", "image_size": 8}, ["image_size is 8", "for images"]),
    ({"data": "text:a", "validation": 8}, ["validation is 8", "for images"]),
    ({"sequence_length": 8}, ["sequence_length is 8", "for text"]),
    ({"data": "text:a", "sequence_length": 0}, ["sequence_length is 0", "[1, inf)"]),
    ({"data": "text:a", "split": (0.5, 0.5)}, ["split is 0.5 0.5", "1 together"]),
    ({"data": "text:a", "split": (0.9, 0.2, 0.1)}, ["split is 0.9 0.2 0.1", "1 together"]),
    ({"data": "text:a", "split": (0.9, 0.1, 0.0)}, ["split is 0.9 0.1 0.0", "only the validation part may be 0"]),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_wrong_value_is_refused_in_one_line_that_says_what_would_do(options, said):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_the_cifar_defaults_are_the_recipe_of_the_report():
    config = TrainConfig(data="cifar10").resolved()
    assert (config.model, config.epochs, config.batch_size) == ("wide_resnet22_2", 250, 128)
    assert (config.lr, config.momentum, config.weight_decay, config.gamma) == (0.1, 0.9, 5e-4, 0.2)
    assert (config.flip, config.crop) == (True, 4)
    assert (config.update_interval, config.drop_fraction, config.stop_fraction) == (100, 0.3, 0.75)


def test_what_is_given_wins_over_the_recipe():
    config = TrainConfig(data="cifar10", steps=7, crop=0, flip=False, lr=0.0).resolved()
    assert (config.steps, config.epochs, config.crop, config.flip, config.lr) == (7, None, 0, False, 0.0)
    assert config.resolved() == config


def test_every_data_set_has_everything_filled_in():
    may_be_none = {
        "flops",
        "image_size",
        "train_images",
        "include",
        "fused",
        "threads",
        "workers",
        "eval_interval",
        "checkpoint_interval",
        "steps",
        "redistribution",
        "weights_from",
        "masks_from",
        "densities_from",
        "rewind",
    }
    images = {"sequence_length", "split", "clip_norm"}
    for data in ("digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder:somewhere"):
        config = dataclasses.asdict(TrainConfig(data=data).resolved())
        assert {name for name, value in config.items() if value is None} == may_be_none | images
    config = dataclasses.asdict(TrainConfig(data="text:somewhere").resolved())
    assert {name for name, value in config.items() if value is None} == may_be_none | {"flip", "crop"}


def test_the_text_defaults_are_the_papers_where_a_cpu_can_follow():
    config = TrainConfig(data="text:somewhere").resolved()
    assert (config.model, config.sparsity, config.batch_size) == ("char_gru", 0.75, 32)
    assert (config.optimizer, config.lr, config.weight_decay, config.clip_norm) == ("adam", 7e-4, 5e-4, 10)
    assert (config.update_interval, config.drop_fraction, config.decay) == (100, 0.1, "cosine")
    assert TrainConfig(data="text:somewhere", flops=0.5).resolved().sparsity is None


def test_dashes_and_underscores_name_the_same_network_of_ours():
    config = TrainConfig(data="text:somewhere", model="char-gru")
    assert config.model == "char_gru"
    assert config.changed_by({"model": "char-gru"}) == config
    with pytest.raises(ConfigError, match="unknown model 'vit-b-16'"):
        TrainConfig(model="vit-b-16")


def test_json_gives_the_same_configuration_back():
    config = TrainConfig(
        model="small_resnet",
        model_options={"width": 4, "blocks": 2},
        dense=("first", "last"),
        include=("stages.*",),
        milestones=(0.5, 70),
        lr=1e-3,
    )
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"sparsty": 0.5}', '{"sparsity": 7}'])
def test_what_is_not_a_configuration_is_refused(text):
    with pytest.raises(ConfigError):
        TrainConfig.from_json(text)


def test_a_misspelt_option_is_told_what_it_may_have_meant():
    with pytest.raises(ConfigError, match=r"sparsty.*sparsity"):
        TrainConfig.from_dict({"sparsty": 0.5})


def test_a_resumed_run_may_change_only_what_the_result_does_not_depend_on():
    config = TrainConfig(steps=100, seed=3).resolved()
    changed = config.changed_by({"checkpoint_interval": 5, "data_root": "elsewhere", "seed": 3})
    assert (changed.checkpoint_interval, changed.data_root, changed.steps) == (5, "elsewhere", 100)
    for name, value in {
        "seed": 4,
        "steps": 200,
        "epochs": 2,
        "lr": 0.2,
        "method": "set",
        "dense": ("a",),
    }.items():
        with pytest.raises(ConfigError, match=f"--{name}.*contradicts"):
            config.changed_by({name: value})


def test_a_new_method_needs_no_change_here(monkeypatch):
    class Newcomer(fxsparse.Method):
        name = "newcomer"

    monkeypatch.setattr("fxsparse.runtime.methods.METHODS", {"dense": METHODS["dense"], "newcomer": Newcomer})
    assert TrainConfig(method="newcomer").method == "newcomer"
    with pytest.raises(ConfigError, match=r"unknown method 'rigl'.*, newcomer"):
        TrainConfig(method="rigl")


def test_every_option_says_what_it_is():
    for option in config_options().values():
        assert option.help


def test_masks_are_not_packed_with_channels():
    with pytest.raises(ConfigError, match="pack_masks is for single weights"):
        TrainConfig(method="rigl-struct", granularity="channel", pack_masks=True)
