"""Networks by name: what is accepted, what is refused and in which words."""

import pytest
import torch

from fxsparse import models
from fxsparse.core.errors import ConfigError


def test_names_are_ours_and_torchvisions():
    names = models.names()
    ours = ["wide_resnet22_2", "resnet50_cifar", "mobilenet_v1", "char_gru", "small_resnet"]
    assert names[: len(ours)] == ours
    assert {"resnet18", "vit_b_16", "swin_v2_t", "googlenet", "inception_v3", "maxvit_t"} <= set(names)
    assert len(set(names)) == len(names)
    assert not {"fcn_resnet50", "fasterrcnn_resnet50_fpn", "raft_small", "quantized_resnet18"} & set(names)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_by_name(name):
    with torch.device("meta"):
        model = models.build(name, num_classes=7, in_channels=3).eval()
    assert model(models.example_input(name).to("meta")).shape == (2, 7)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_outputs(name):
    with torch.device("meta"):
        model = models.build(name, num_classes=7, init_weights=False).train()
    example = models.example_input(name).to("meta")
    assert example.shape[-1] == {"googlenet": 224, "inception_v3": 299}[name]
    assert all(out.shape == (2, 7) for out in model(example))


def test_options_reach_the_network():
    assert models.build("wide_resnet22_2", width=0.5).fc.in_features == 64
    assert models.build("resnet18", num_classes=4, zero_init_residual=True).fc.out_features == 4
    assert models.build("char_gru", tie_embedding=True, width=0.1).embedding.num_embeddings == 256


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wide_resnet22", {}, ["wide_resnet22'", "did you mean wide_resnet22_2"]),
        ("resnet5", {}, ["resnet5'", "resnet50"]),
        ("xyzzy", {}, ["xyzzy", "small_resnet", "torchvision"]),
        ("small_resnet", {"depth": 3}, ["small_resnet", "'depth'", "blocks"]),
        ("char_gru", {"in_channels": 3}, ["char_gru", "'in_channels'", "tie_embedding"]),
        ("resnet18", {"width": 0.5}, ["resnet18", "'width'"]),
        ("resnet18", {"in_channels": 1}, ["resnet18", "in_channels is 1", "3"]),
        ("small_resnet", {"num_classes": 0}, ["num_classes is 0"]),
        ("small_resnet", {"width": -1.0}, ["width is -1.0"]),
        ("small_resnet", {"width": "wide"}, ["width is 'wide'"]),
        ("mobilenet_v1", {"dropout": 2.0}, ["mobilenet_v1", "dropout"]),
    ],
)
def test_errors_are_one_line_and_name_the_choices(name, options, words):
    with pytest.raises(ConfigError) as error:
        models.build(name, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_default_width():
    assert models.default_width("small_resnet") == 16
    assert models.default_width("resnet50_cifar") == 1
    with pytest.raises(ConfigError, match="resnet18 takes no option 'width'"):
        models.default_width("resnet18")


def test_example_input():
    assert models.example_input("wide_resnet22_2").shape == (2, 3, 32, 32)
    assert models.example_input("small_resnet").shape == (2, 1, 8, 8)
    assert models.example_input("small_resnet", batch=5, size=28, in_channels=3).shape == (5, 3, 28, 28)
    assert models.example_input("char_gru", size=9).dtype == torch.int64
    assert models.example_input("inception_v3").shape == (2, 3, 299, 299)
    state = torch.get_rng_state()
    assert torch.equal(models.example_input("small_resnet"), models.example_input("small_resnet"))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ConfigError, match="small_resnet"):
        models.example_input("smal_resnet")


def test_dashes_are_underscores_in_names_of_ours():
    assert models.build("char-gru", width=0.1).embedding.num_embeddings == 256
    assert models.example_input("small-resnet").shape == (2, 1, 8, 8)
    assert models.default_width("wide-resnet22-2") == 1
    assert [models.canonical(name) for name in ("char-gru", "char_gru", "vit-b-16")] == [
        "char_gru",
        "char_gru",
        "vit-b-16",
    ]
    with pytest.raises(ConfigError, match="unknown model 'vit-b-16'"):
        models.build("vit-b-16")


def test_which_networks_read_text():
    assert [name for name in models.names() if models.takes_text(name)] == ["char_gru"]
    assert models.takes_text("char-gru")
