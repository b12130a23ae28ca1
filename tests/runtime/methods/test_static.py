"""What never rewires: static, dense, lottery tickets over given masks."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import ConfigError
from fxsparse.core.errors import SelectionError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def train(sparse, steps=6):
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    rewirer = sparse.attach(optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sparse(X).square().sum().backward()
        optimizer.step()
    return rewirer


def test_a_lottery_ticket_keeps_its_masks_and_its_early_weights():
    model = net()
    masks = {"0.weight": torch.rand(5, 6) < 0.4, "2.weight": torch.rand(3, 5) < 0.6}
    sparse = fxsparse.sparsify(model, X, "lottery", masks=masks, update_interval=2)
    for name, mask in masks.items():
        assert torch.equal(sparse.masks[name], mask)
        assert sparse.masks[name] is not mask
        assert torch.equal(sparse.get_parameter(name), model.get_parameter(name) * mask)
    assert sparse.active_counts == sparse.target_counts == {name: int(mask.sum()) for name, mask in masks.items()}
    assert train(sparse).history == []
    for name, mask in masks.items():
        assert torch.equal(sparse.masks[name], mask)
        assert (sparse.get_parameter(name)[~mask] == 0).all()


def test_given_masks_are_where_rigl_starts():
    masks = {"0.weight": torch.arange(30).reshape(5, 6) < 10, "2.weight": torch.arange(15).reshape(3, 5) < 15}
    sparse = fxsparse.sparsify(net(), X, "rigl", masks=masks, update_interval=1)
    rewirer = train(sparse)
    assert sparse.active_counts == {"0.weight": 10, "2.weight": 15}
    assert sum(record.changed["0.weight"] for record in rewirer.history) > 0
    assert int(masks["0.weight"].sum()) == 10 and bool(masks["0.weight"].flatten()[:10].all())  # the user's own


def test_wrong_masks_are_refused_by_name():
    good = {"0.weight": torch.ones(5, 6).bool(), "2.weight": torch.ones(3, 5).bool()}
    for change, error, message in [
        ({"0.wieght": good["0.weight"]}, SelectionError, "'0.wieght' is not a weight site; did you mean 0.weight"),
        ({"0.weight": torch.ones(6, 5).bool()}, SelectionError, r"0.weight is torch.bool of shape \(6, 5\); it takes"),
        ({"0.weight": torch.ones(5, 6)}, SelectionError, r"0.weight is torch.float32 of shape \(5, 6\)"),
        ({"0.weight": [1, 2]}, SelectionError, "0.weight is list"),
    ]:
        with pytest.raises(error, match=message):
            fxsparse.sparsify(net(), X, "static", masks=good | change)
    with pytest.raises(SelectionError, match=r"masks: there is none for 2\.weight; give all 2"):
        fxsparse.sparsify(net(), X, "static", masks={"0.weight": good["0.weight"]})
    with pytest.raises(ConfigError, match="masks bring their own densities; leave sparsity and flops out"):
        fxsparse.sparsify(net(), X, "static", masks=good, sparsity=0.5)
    with pytest.raises(ConfigError, match="lottery needs masks="):
        fxsparse.sparsify(net(), X, "lottery")
    for method in ("pruning", "snip", "dense"):
        with pytest.raises(ConfigError, match=f"method {method} starts dense"):
            fxsparse.sparsify(net(), X, method, masks=good)


def test_dense_is_the_model_itself_bit_for_bit():
    model = net()
    sparse = fxsparse.sparsify(model, X, "dense", sparsity=0.9, distribution="uniform")
    assert sparse.sparsity == 0.0
    train(sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, sparse.get_parameter(name))
