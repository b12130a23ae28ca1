"""The networks of the paper and the report: sizes and costs as published, and the GRU against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import models

# name, conv and linear weights, weight tensors, MACs of one example
PUBLISHED = [
    ("wide_resnet22_2", 1_076_912, 23, 157_730_048),
    ("resnet50_cifar", 23_652_032, 54, 1_298_014_208),
    ("mobilenet_v1", 4_209_088, 28, 568_740_352),
    ("char_gru", 1_179_648, 5, 16 * 1_179_648),
    ("small_resnet", 77_072, 10, 763_520),
    ("lenet5", 61_470, 5, 416_520),
]
OURS = [row[0] for row in PUBLISHED]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(("name", "weights", "tensors", "macs"), PUBLISHED)
def test_weights_and_macs(name, weights, tensors, macs):
    with torch.device("meta"):
        model = models.build(name)
    assert len(layers(model)) == tensors
    assert sum(layer.weight.numel() for layer in layers(model)) == weights
    model.eval()  # BatchNorm1d takes no batch of one in train mode
    with FlopCounterMode(display=False) as counter:
        model(models.example_input(name, batch=1).to("meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", OURS)
def test_width_scales_the_hidden_weights_by_its_square(name):
    with torch.device("meta"):
        full = layers(models.build(name))
        half = layers(models.build(name, width=models.default_width(name) / 2))
    assert len(full) == len(half)
    inner = full[2].weight.numel() / half[2].weight.numel()
    assert inner == (2 if full[2].weight.shape[1] == 1 else 4)  # a depthwise kernel has one input channel
    assert full[-1].out_features == half[-1].out_features


@pytest.mark.parametrize("name", OURS)
def test_classes_channels_and_narrow_width(name):
    size = {"mobilenet_v1": 64}.get(name)
    in_channels = None if name == "char_gru" else 2
    width = models.default_width(name) / 8
    model = models.build(name, num_classes=7, in_channels=in_channels, width=width)
    example = models.example_input(name, size=size, in_channels=in_channels)
    if name == "char_gru":
        example = example % 7
    out = model(example)
    logits = out[0] if name == "char_gru" else out
    assert logits.shape == ((2, 16, 7) if name == "char_gru" else (2, 7))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_resnet_takes_other_sizes(size):
    model = models.small_resnet(in_channels=3, blocks=2)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_wide_resnet_dropout_is_off_by_default_and_in_eval():
    x = models.example_input("wide_resnet22_2")
    plain, dropping = models.wide_resnet22_2(), models.wide_resnet22_2(dropout=0.3)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


def test_wide_resnet_16_8_has_11_million_parameters():
    with torch.device("meta"):  # Zagoruyko and Komodakis, table 4: 11.0M and 36.5M
        assert round(sum(p.numel() for p in models.WideResNet(16, 8).parameters()) / 1e6, 1) == 11.0
        assert round(sum(p.numel() for p in models.WideResNet(28, 10).parameters()) / 1e6, 1) == 36.5


def test_wide_resnet_refuses_an_impossible_depth():
    with pytest.raises(ValueError, match=r"23.*6 n \+ 4"):
        models.WideResNet(depth=23)


def test_every_resnet50_block_starts_as_its_shortcut():
    model = models.resnet50_cifar(width=0.125)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert len(blocks) == 16
    assert all(not block.bn3.weight.any() for block in blocks)
    x = torch.randn(2, blocks[1].conv1.in_channels, 4, 4).relu()
    assert torch.equal(blocks[1](x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gru_equals_pytorchs(dtype):
    model = models.char_gru(width=1 / 16).to(dtype)
    layer = model.gru
    reference = nn.GRU(8, 32, batch_first=True, dtype=dtype)
    with torch.no_grad():
        layer.input_to_hidden.weight.copy_(reference.weight_ih_l0)
        layer.input_to_hidden.bias.copy_(reference.bias_ih_l0)
        layer.hidden_to_hidden.weight.copy_(reference.weight_hh_l0)
        layer.hidden_to_hidden.bias.copy_(reference.bias_hh_l0)
    x = torch.randn(3, 9, 8, dtype=dtype)
    state = torch.randn(3, 32, dtype=dtype)
    states, last = layer(x, state)
    expected, expected_last = reference(x, state[None])
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(last, expected_last[0])
    states.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.input_to_hidden.weight.grad, reference.weight_ih_l0.grad)
    torch.testing.assert_close(layer.hidden_to_hidden.weight.grad, reference.weight_hh_l0.grad)
    torch.testing.assert_close(layer.hidden_to_hidden.bias.grad, reference.bias_hh_l0.grad)


def test_char_gru_carries_its_state():
    model = models.char_gru(width=1 / 16)
    tokens = models.example_input("char_gru", size=12)
    whole, last = model(tokens)
    first, state = model(tokens[:, :5])
    second, carried = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(carried, last)


def test_char_gru_is_the_same_by_one_call():
    torch.manual_seed(0)
    unrolled = models.char_gru(width=1 / 16)
    torch.manual_seed(0)
    whole = models.char_gru(width=1 / 16, unrolled=False)
    assert [type(module) for module in whole.modules()].count(nn.GRU) == 1
    tokens, state = models.example_input("char_gru", size=12), torch.randn(2, 32)
    for found, expected in zip(whole(tokens, state), unrolled(tokens, state), strict=True):
        torch.testing.assert_close(found, expected)


def test_char_gru_ties_its_embedding_on_request():
    assert models.char_gru(width=1 / 16).output.weight.shape == (256, 8)
    tied = models.char_gru(width=1 / 16, tie_embedding=True)
    assert tied.output.weight is tied.embedding.weight
    tied(models.example_input("char_gru"))[0].sum().backward()


def test_small_resnet_learns_the_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    order = torch.randperm(1797)
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16 - 0.5
    labels = torch.tensor(digits.target)[order]
    model = models.small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(120):
        batch = torch.randint(1437, (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean()
    assert accuracy > 0.95
