"""RigL on weights in every form: what holds for a convolution holds for a recurrent, projected or computed weight."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxsparse
from fxsparse.models.zoo import ZOO

STEPS, INTERVAL = 20, 10
TOKENS = torch.randint(0, 12, (8, 6), generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.gru = nn.GRU(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, tokens):
        return self.head(self.gru(self.embedding(tokens))[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        memory = self.encoder(x)
        return self.head(self.cross(x[:, :1], memory, memory)[0][:, 0])


class ScaledStdConv(nn.Conv2d):
    """Weight standardisation with a learned gain, as normaliser-free networks have it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        rows, scale = self.weight.reshape(1, self.out_channels, -1), self.weight[0].numel() ** -0.5
        weight = F.batch_norm(rows, None, None, (self.gain * scale).view(-1), training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


def convolutions(make):
    return nn.Sequential(make(3, 16, 3), nn.ReLU(), make(16, 16, 3), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 4))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 16, 12) / 4)
        self.second = nn.Parameter(torch.randn(3, 12, 4) / 4)
        self.gate = nn.Linear(16, 3)

    def forward(self, x):
        x = x.mean(1)
        hidden = torch.bmm(x.expand(3, -1, -1), self.first).relu()
        return torch.einsum("ebh,eho,be->bo", hidden, self.second, self.gate(x).softmax(-1))


NETS = {
    "gru": (Recurrent, TOKENS, 5),
    "attention": (Attending, SEQUENCE, 11),
    "weight norm": (lambda: convolutions(lambda *sizes: parametrizations.weight_norm(nn.Conv2d(*sizes))), IMAGES, 3),
    "spectral norm": (
        lambda: convolutions(lambda *sizes: parametrizations.spectral_norm(nn.Conv2d(*sizes))),
        IMAGES,
        3,
    ),
    "weight standardisation": (lambda: convolutions(ScaledStdConv), IMAGES, 3),
    "experts": (Experts, SEQUENCE, 3),
}


@pytest.mark.parametrize("name", NETS)
def test_rigl_trains_it(name):
    make, x, count = NETS[name]
    torch.manual_seed(0)
    sparse = fxsparse.sparsify(make(), x, "rigl", sparsity=0.5, update_interval=INTERVAL, stop_fraction=0.9)
    assert len(sparse.sites) == count
    optimizer = torch.optim.Adam(sparse.parameters(), lr=5e-3)
    rewirer = sparse.attach(optimizer, total_steps=STEPS)
    target = torch.arange(len(x)) % 4
    before = {key: mask.clone() for key, mask in sparse.masks.items()}
    counts = sparse.active_counts
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), target)
        losses.append(loss.item())
        loss.backward()
        for key, mask in sparse.masks.items():
            outside = sparse.get_parameter(key).grad[~mask]
            assert (outside != 0).any() if step == INTERVAL and outside.numel() else not outside.any(), (key, step)
        weights = {key: sparse.get_parameter(key).detach().clone() for key in sparse.masks}
        optimizer.step()
        assert sparse.active_counts == counts
        for key, mask in sparse.masks.items():
            weight = sparse.get_parameter(key)
            assert not weight[~mask].any()
            if step == INTERVAL:  # no weight moves in a step that rewires
                kept = mask & before[key]
                assert torch.equal(weight[kept], weights[key][kept])
    assert len(rewirer.history) == 1
    assert any((mask != before[key]).any() for key, mask in sparse.masks.items())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name", ["module_gru", "module_lstm", "attention", "weight_norm", "sliced_weight", "cell_loop"]
)
def test_the_dense_gradient_is_that_of_the_masked_model(name):
    """Against an eager model whose stored weights are masked."""
    torch.manual_seed(0)
    case = ZOO[name]
    model, x = case.make(), case.example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = fxsparse.sparsify(model, x, sparsity=0.5, distribution="uniform", exclude=())
    sparse.copy_to(model)
    sparse.dense_gradient = True
    for module in (model, sparse):
        output = module(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert torch.equal(sparse.get_parameter(key).grad, parameter.grad), key


def test_a_weight_tied_to_an_embedding_is_masked_for_both_by_name():
    case = ZOO["tied_embedding"]
    torch.manual_seed(0)
    model, tokens = case.make(), case.example()
    by_default = fxsparse.sparsify(model, tokens, sparsity=0.5)
    assert "embedding.weight" not in by_default.masks
    assert "tied to an embedding" in {item.name: item.reason for item in by_default.uncovered}["embedding.weight"]
    sparse = fxsparse.sparsify(
        model, tokens, sparsity=0.5, include=["embedding.weight"], update_interval=INTERVAL, stop_fraction=0.9
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer, total_steps=STEPS)
    counts, mask = sparse.active_counts, sparse.masks["embedding.weight"]
    table = sparse.get_parameter("embedding.weight")
    with torch.no_grad():
        table.add_(1)  # what lies outside the mask now would show in both uses
        outside = sparse(tokens)
        table.masked_fill_(~mask, 0)
        assert torch.equal(sparse(tokens), outside)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sparse(tokens).square().mean().backward()
        optimizer.step()
        assert not table[~mask].any() and sparse.active_counts == counts
