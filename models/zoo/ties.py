"""One parameter with several uses, one module with several names, and modules without any use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import ZooCase, call, integers, normal


class TiedLinear(nn.Module):
    """Two linear layers share one weight Parameter but not their biases: one mask, one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class TiedTranspose(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed.

    The mask has to reach the transposed use as well, though that operand is computed from the parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.decoder_bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.decoder_bias)


class TiedDilations(nn.Module):
    """One kernel under three convolutions of different dilation: one site with three unlike uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        wider = [F.conv2d(x, weight, bias, padding=d, dilation=d) for d in (2, 3)]
        return self.head(F.relu(self.conv(x) + sum(wider)).mean((2, 3)))


class TiedEmbedding(nn.Module):
    """The output head's weight is the embedding's: masking the head's use alone gives another model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class CalledTwice(nn.Module):
    """One convolution called twice: two nodes, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(x))
        return self.conv(x)


class CalledInLoop(nn.Module):
    """A block with BatchNorm called three times over: its statistics move three times a step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class AliasedModule(nn.Module):
    """One submodule under two names: the state dict lists its tensors twice, the parameters once."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([self.encoder, nn.Linear(8, 8)])
        self.head = self.blocks[1]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.encoder(x))
        return self.head(torch.relu(self.blocks[0](x)))


class Unused(nn.Module):
    """A submodule, a parameter and a buffer that forward never touches, between ones that it does.

    They vanish from a traced graph, yet belong into the state dict, at their place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.unused = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        self.unused_scale = nn.Parameter(torch.ones(3))
        self.register_buffer("unused_version", torch.tensor(1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class ParameterContainers(nn.Module):
    """Linear layers held as a ParameterList of weights and a ParameterDict of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(3)])
        self.biases = nn.ParameterDict({f"layer{i}": torch.zeros(8) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        for i, weight in enumerate(self.weights):
            x = torch.tanh(F.linear(x, weight, self.biases[f"layer{i}"]))
        return x


class ModuleContainers(nn.Module):
    """A ModuleDict picked by key and a ModuleList walked backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU()})
        self.branches = nn.ModuleDict({"left": nn.Linear(8, 4), "right": nn.Linear(8, 4)})
        self.layers = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for name, branch in sorted(self.branches.items(), reverse=True)]
        x = torch.cat(branches, dim=1)
        for name, layer in zip(("gelu", "relu"), reversed(self.layers), strict=True):
            x = self.activations[name](layer(x))
        return x


def lazy_linear() -> nn.Module:
    """A LazyLinear after its first call: a Linear by then, which once had hooks."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    call(model, normal(1, 3, 8, 8)())
    return model


CASES = {
    "tied_linear": ZooCase(TiedLinear, normal(4, 8), sites=2),
    "tied_transpose": ZooCase(TiedTranspose, normal(4, 8), sites=1),
    "tied_dilations": ZooCase(TiedDilations, normal(2, 3, 8, 8), sites=2),
    "tied_embedding": ZooCase(TiedEmbedding, integers(12, 2, 5), sites=1),
    "called_twice": ZooCase(CalledTwice, normal(2, 3, 8, 8), sites=2),
    "called_in_loop": ZooCase(CalledInLoop, normal(2, 3, 8, 8), sites=3),
    "aliased_module": ZooCase(AliasedModule, normal(4, 8), sites=2),
    "unused": ZooCase(Unused, normal(4, 8), sites=2),
    "parameter_containers": ZooCase(ParameterContainers, normal(4, 8), sites=3),
    "module_containers": ZooCase(ModuleContainers, normal(4, 8), sites=4),
    "lazy_linear": ZooCase(lazy_linear, normal(2, 3, 8, 8), sites=2),
}
