"""Control flow and arithmetic on shapes, and tensors made in forward from them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import ZooCase, integers, normal


class ShapeBranch(nn.Module):
    """Branches on sizes, dtype, number of dimensions and contiguity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3 or x.shape[0] == 0:
            x = x.unsqueeze(0)
        if x.dtype != self.conv.weight.dtype:
            x = x.to(self.conv.weight.dtype)
        x = F.relu(self.conv(x))
        while min(x.shape[-2:]) > 2:
            x = F.relu(self.down(x))
        if not x.is_contiguous():
            x = x.contiguous()
        return self.head(x.flatten(2).mean(-1) if x.shape[2:].numel() > 1 else x.flatten(1))


class ShapeAsserts(nn.Module):
    """Assertions on shapes, with the shape in the message, and a shape unpacked for a patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = 4
        self.embed = nn.Linear(3 * self.patch**2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        p = self.patch
        assert c == 3, f"expected 3 channels, got {c}"
        assert h % p == 0 and w % p == 0, f"{tuple(x.shape)} does not divide into patches of {p}"
        torch._assert(h == w, f"expected a square picture, got {h}x{w}")
        x = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
        return self.head(torch.relu(self.embed(x)).mean(1))


class LengthLoop(nn.Module):
    """Python loops over `x.size(1)` and `len(x)`, with indexing by the loop's number."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for i in range(x.size(1)):
            state = torch.tanh(self.step(x[:, i]) + state)
        rows = [self.head(state[i]) for i in range(len(x))]
        return torch.stack(rows)


class TensorIteration(nn.Module):
    """Iteration over a tensor, `enumerate` and `zip` over two, and unpacking of one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | int = 0
        for weight, frame in enumerate(x.transpose(0, 1), start=1):
            total = total + weight * torch.relu(self.fc(frame))
        first, *_, last = x.unbind(1)
        return self.head(total) + sum(self.head(a * b) for a, b in zip(first, last, strict=True))


class HalfSize(nn.Module):
    """Sizes halved by `int(size / 2)`, `round` and `//`, and a float made from their product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[2] / 2), round(x.shape[3] * 0.5)
        y = F.relu(self.conv(F.interpolate(x, size=(height, width))))
        y = y * (x.shape[1] * height * width) ** -0.5
        top, rest = y.split([y.shape[2] // 2, y.shape[2] - y.shape[2] // 2], dim=2)
        return self.head(torch.cat((rest, top), dim=2))


class FormattedShape(nn.Module):
    """A submodule chosen by a string that is made from a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({f"in{n}": nn.Linear(n, 8) for n in (4, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        key = f"in{x.shape[-1]}"
        if key not in self.stems:
            raise ValueError(f"no stem for {x.shape}, only {sorted(self.stems)}")
        return self.head(torch.relu(self.stems[key](x)))


class PositionalEmbedding(nn.Module):
    """A learned table of positions and a class token, cut and expanded to the input's length."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 16, 8) / 10)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.positions[:, : x.shape[1]]
        return self.head(torch.relu(self.fc(x))[:, 0])


class ArangePositions(nn.Module):
    """`torch.arange(x.shape[1])` looked up in an embedding: a factory that a plain trace runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.positions = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)[None]
        return self.head(torch.relu(x))


class Factories(nn.Module):
    """zeros, full, ones and new_zeros from the input's sizes, for a state and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        start = torch.zeros(x.size(0), 1, 8, device=x.device, dtype=x.dtype)
        start = start + x.new_zeros((n, 1, 1))
        causal = torch.full((t + 1, t + 1), float("-inf"), device=x.device).triu(1)
        x = torch.cat((start, torch.relu(self.fc(x))), dim=1)
        mixed = torch.softmax(x @ x.transpose(1, 2) + causal, dim=-1) @ x
        return self.head(mixed * torch.ones(t + 1, 1, device=x.device).cumsum(0).rsqrt())


SEQUENCE = normal(2, 5, 8)

CASES = {
    "shape_branch": ZooCase(ShapeBranch, normal(2, 3, 9, 9), sites=3),
    "shape_asserts": ZooCase(ShapeAsserts, normal(2, 3, 8, 8), sites=2),
    "length_loop": ZooCase(LengthLoop, SEQUENCE, sites=2),
    "tensor_iteration": ZooCase(TensorIteration, SEQUENCE, sites=2),
    "half_size": ZooCase(HalfSize, normal(2, 3, 8, 10), sites=2),
    "formatted_shape": ZooCase(FormattedShape, normal(4, 8), sites=2),
    "positional_embedding": ZooCase(PositionalEmbedding, SEQUENCE, sites=2),
    "arange_positions": ZooCase(ArangePositions, integers(12, 2, 5), sites=1),
    "factories": ZooCase(Factories, SEQUENCE, sites=2),
}
