"""Random networks for the property test: programs of operations on tensors of 4 channels, nested and shared."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

C = 4
"""Channels of every value."""

Pair = namedtuple("Pair", "first second")


@dataclass
class Outcome:
    """What some of the networks return."""

    last: torch.Tensor
    mean: torch.Tensor | None = None


STEPS = {}
"""Name -> class of modules, or function of a block, that makes one value `(N, 4, H, W)` of two."""


def step(function):
    """A step without layers of its own: part of the forward of the block that it is in."""
    STEPS[function.__name__.replace("_", " ")] = function
    return function


def layered(**layers):
    """A step that is a module: with the layers, parameters and buffers that these functions make."""

    def decorate(function):
        def init(self):
            nn.Module.__init__(self)
            for name, make in layers.items():
                made = make()
                self.register_buffer(name, made) if type(made) is torch.Tensor else setattr(self, name, made)

        kind = type(function.__name__, (nn.Module,), {"forward": function, "__init__": init})
        STEPS[function.__name__.replace("_", " ")] = kind
        return function

    return decorate


def conv(size=3, **options):
    return lambda: nn.Conv2d(C, C, size, padding=size // 2, **options)


def weight(*shape):
    return lambda: nn.Parameter(torch.randn(shape) / 4)


@layered(layer=conv())
def convolution(self, a, b):
    return self.layer(a)


@layered(layer=conv(groups=C, bias=False))
def depthwise(self, a, b):
    return self.layer(a)


@layered(layer=conv(groups=2))
def grouped(self, a, b):
    return self.layer(a) + b.mean()


@layered(layer=lambda: nn.ConvTranspose2d(C, C, 2, stride=2))
def transposed(self, a, b):
    return F.max_pool2d(self.layer(a), 2)


@layered(layer=lambda: nn.Conv1d(C, C, 3, padding=1))
def convolution_1d(self, a, b):
    return self.layer(a.flatten(2)).view_as(a)


@layered(layer=lambda: nn.Conv2d(2 * C, C, 1))
def cat(self, a, b):
    return self.layer(torch.cat((a, b), dim=1))


@layered(layer=lambda: nn.Linear(C, C))
def linear(self, a, b):
    return self.layer(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@layered(own=weight(C, C, 3, 3))
def functional_convolution(self, a, b):
    return F.conv2d(a, self.own, stride=1, padding=1)


@layered(own=weight(C, C, 1, 1), gain=weight(C, 1, 1, 1))
def standardised(self, a, b):
    std, mean = torch.std_mean(self.own, dim=(1, 2, 3), keepdim=True)
    return F.conv2d(a, (self.own - mean) / (std + 1e-5) * self.gain)


@layered(own=weight(3 * C, C), bias=weight(3 * C))
def sliced_projection(self, a, b):
    q, k, v = F.linear(a.flatten(2).transpose(1, 2), self.own, self.bias).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(a.shape)


@layered(own=weight(C, C))
def parameter_matmul(self, a, b):
    return (a.movedim(1, -1) @ self.own.t()).movedim(-1, 1)


@layered(own=weight(2, C, C))
def experts(self, a, b):
    return torch.einsum("nchw,eck->nkhw", a, self.own) / 2


@layered(table=lambda: nn.Embedding(5, C))
def embedded_positions(self, a, b):
    return a + self.table(torch.arange(a.shape[-1], device=a.device) % 5).t()[None, :, None]


@layered(layer=lambda: nn.BatchNorm2d(C))
def norm(self, a, b):
    return self.layer(a)


@layered(layer=lambda: nn.GroupNorm(2, C))
def group_norm(self, a, b):
    return self.layer(a)


@layered(layer=lambda: nn.LayerNorm(C))
def layer_norm(self, a, b):
    return self.layer(a.transpose(1, -1)).transpose(1, -1)


@layered(layer=lambda: nn.Linear(C, C))
def gate(self, a, b):
    return b * torch.sigmoid(self.layer(a.mean((2, 3))))[:, :, None, None]


@layered(layers=lambda: nn.ModuleList(nn.Conv2d(C, C, 1) for _ in range(3)))
def loop_over_layers(self, a, b):
    for index, layer in enumerate(self.layers):
        a = layer(a) if index % 2 else a + layer(a)
    return a


@layered(small=lambda: nn.Conv2d(C, C, 1), large=lambda: nn.Conv2d(C, C, 1))
def branch_on_size(self, a, b):
    return self.large(a) if a.shape[2] > 6 or len(a) > 5 else self.small(a)


@layered(layers=lambda: nn.ModuleDict({"in4": nn.Conv2d(C, C, 1)}))
def layer_by_name(self, a, b):
    assert a.shape[1] == C, f"{a.shape} has no {C} channels"
    return self.layers[f"in{a.shape[1]}"](a)


@layered(layer=lambda: nn.Conv2d(C, C, 1))
def train_only(self, a, b):
    return self.layer(a) if self.training else a


@layered(mean=lambda: torch.zeros(C), calls=lambda: torch.zeros((), dtype=torch.long))
def running_mean(self, a, b):
    if self.training:
        self.mean.mul_(0.9).add_(0.1 * a.detach().mean((0, 2, 3)))
        self.calls += 1
    return a - self.mean[:, None, None]


@layered(target=lambda: nn.Conv2d(C, C, 1))
def checkpointed(self, a, b):
    return torch.utils.checkpoint.checkpoint(lambda value: torch.tanh(self.target(value)), a, use_reentrant=False)


@step
def relu(self, a, b):
    return F.relu(a)


@step
def relu_(self, a, b):
    return a.clone().relu_()


@step
def add(self, a, b):
    return a + b


@step
def in_place_add(self, a, b):
    a = a.clone()
    a += b
    return a


@step
def slice_assigned(self, a, b):
    a = a * 1
    a[:, 0] = b[:, 1].sigmoid()
    a[..., 0].mul_(2)
    return a


@step
def chunk(self, a, b):
    left, right = a.chunk(2, dim=1)
    return torch.cat((right * left.sigmoid(), left), dim=1)


@step
def split(self, a, b):
    first, *others = a.split((1, 3), dim=1)
    return torch.cat([*others, first.tanh()], 1)


@step
def view(self, a, b):
    n, c, h, w = a.shape
    return a.contiguous().view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@step
def flatten(self, a, b):
    return F.gelu(a.flatten(1)).unflatten(1, a.shape[1:])


@step
def folded_batch(self, a, b):
    n, c, h, w = a.size()
    rows = a.transpose(1, 2).reshape(n * h, c, w)
    return F.avg_pool1d(rows, 3, 1, 1).view(n, h, c, w).transpose(1, 2)


@step
def dropout(self, a, b):
    return F.dropout(a, 0.5, self.training)


@layered(layer=lambda: nn.Dropout2d(0.3))
def dropout_module(self, a, b):
    return self.layer(a)


@step
def noise(self, a, b):
    return a + 0.1 * torch.randn_like(b) if self.training else a


@step
def crop(self, a, b):
    h, w = a.shape[-2:]
    return F.interpolate(a[..., : h // 2, :], size=(h, w))


@step
def half_size(self, a, b):
    h, w = int(a.shape[2] / 2), a.shape[3] // 2
    small = F.adaptive_avg_pool2d(a, (h, w))
    return F.pad(small, (0, a.shape[3] - w, 0, a.shape[2] - h))


@step
def roll(self, a, b):
    return torch.roll(a, (1, -1), (2, 3)) * b.flip(-1)


@step
def masked(self, a, b):
    mask = torch.ones(a.shape[2], a.shape[3], dtype=torch.bool).tril()
    return torch.where(mask, a, b).masked_fill(~mask, 0.5)


@step
def scaled_by_size(self, a, b):
    return a * (a.shape[1] * a.shape[3]) ** -0.5 + a.numel() / max(a.shape[2], 2) / 100


@step
def loop_over_rows(self, a, b):
    rows = [row * (index + 1) for index, row in enumerate(a.unbind(2))]
    return torch.stack(rows, 2) / len(rows)


@step
def softmaxed(self, a, b):
    return torch.softmax(a @ b.mT, dim=-1) @ b


@step
def sorted_values(self, a, b):
    return a.sort(dim=1).values + b.topk(2, dim=1)[0].sum(1, keepdim=True)


@step
def reduced(self, a, b):
    return (a - a.amax(1, keepdim=True)) / (b.var((2, 3), keepdim=True, unbiased=False) + 1)


@step
def data_branch(self, a, b):
    if a.sum() > 0:
        return a
    return b


REFUSED = {"data branch": "if a.sum() > 0:"}
"""Operations that no capture takes, and the line that the error has to give."""


class Block(nn.Module):
    """Runs a program on a growing list of values, of which each step reads two.

    An entry of the program is `(name, i, j)`, the step and the values; a program in place of the name is a nested
    block, and `again` the module of an earlier entry.
    """

    def __init__(self, program):
        super().__init__()
        self.program = []
        self.steps = nn.ModuleList()
        for name, i, j in program:
            if name == "again":
                index = i % len(self.steps) if self.steps else None
            else:
                index = self.add(name)
            self.program.append((index if index is not None else STEPS.get(name, relu), i, j))

    def add(self, name):
        if isinstance(name, list):
            self.steps.append(Block(name))
        elif isinstance(STEPS[name], type):
            self.steps.append(STEPS[name]())
        else:
            return None
        return len(self.steps) - 1

    def forward(self, x, y=None):
        values = [x] if y is None else [x, y]
        for operation, i, j in self.program:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self.steps[operation](a, b) if isinstance(operation, int) else operation(self, a, b))
        return values[-1] + values[0]


class Net(nn.Module):
    """A block, with one of several ways to take arguments and to return."""

    def __init__(self, program, takes, gives):
        super().__init__()
        self.stem = nn.Conv2d(C, C, 3, padding=1)
        self.body = Block(program)
        self.gives = gives
        self.takes = takes

    def run(self, x, y, scale=1.0):
        first = self.stem(x) * scale
        last = self.body(first, y)
        mean = last.mean((2, 3))
        return {
            "tensor": lambda: last,
            "tuple": lambda: (last, [mean, None]),
            "dict": lambda: {"last": last, "more": {"mean": mean, "n": 3}},
            "namedtuple": lambda: Pair(last, mean),
            "dataclass": lambda: Outcome(last, mean=mean),
            "ordered": lambda: OrderedDict(last=last, sizes=last.shape[1]),
        }[self.gives]()


class TakesTensors(Net):
    def forward(self, x, y, scale=1.0):
        return self.run(x, y, scale)


class TakesPair(Net):
    def forward(self, pair):
        x, y = pair
        return self.run(x, y)


class TakesDict(Net):
    def forward(self, batch, *, scale=0.5):
        return self.run(batch["x"], batch["more"][0], scale)


class TakesKeywords(Net):
    def forward(self, x, mask=None, **others):
        return self.run(x if mask is None else x * mask, others["y"])


FORMS = {
    "tensors": (TakesTensors, lambda x, y: (x, y)),
    "pair": (TakesPair, lambda x, y: ([x, y],)),
    "dict": (TakesDict, lambda x, y: ({"x": x, "more": [y]},)),
    "keywords": (TakesKeywords, lambda x, y: {"x": x, "y": y}),
}
RETURNS = ("tensor", "tuple", "dict", "namedtuple", "dataclass", "ordered")
