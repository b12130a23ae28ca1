"""Weights that are computed from a parameter, cut out of one, or used by another operation than a layer.

Each is a site: the mask goes on the parameter at the root, and the gradient reaches it through what is computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from .case import ZooCase, normal


class WeightNorm(nn.Module):
    """A convolution under the weight_norm parametrization: its weight is g v / |v|, made anew each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class StandardizedConv2d(nn.Conv2d):
    """A convolution with its filters brought to zero mean and unit variance at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class WeightStandardization(nn.Module):
    """Weight-standardised convolutions: the operand is computed, and a zero in it is no zero after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardizedConv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class ScaledWeight(nn.Module):
    """A functional linear layer whose weight is multiplied by a learned gain first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.gain = nn.Parameter(torch.ones(8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.linear(x, self.weight * self.gain)))


class MatmulParameter(nn.Module):
    """A raw parameter (in, out) that enters by `@`: a linear layer in all but name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x @ self.weight))


class EinsumExperts(nn.Module):
    """Experts held as one 3-D parameter and mixed by a gate, by `einsum`."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 4) / 3)
        self.gate = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.gate(x), dim=-1)
        return torch.einsum("bi,eio,be->bo", x, self.experts, gate)


class FusedProjection(nn.Module):
    """Query, key and value from one raw parameter in one functional linear layer, then split."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(24, 8) / 3)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = F.linear(x, self.qkv).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


class SlicedWeight(nn.Module):
    """One parameter cut into the weights of three linear layers by slicing."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Parameter(torch.randn(12, 8) / 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (F.linear(x, self.in_proj[i : i + 4]) for i in (0, 4, 8))
        return self.head(torch.relu(first) * torch.sigmoid(second) + third)


class TransposedLinear(nn.Module):
    """Weights (in, out) that enter by `addmm` on flattened rows, as in the Conv1D of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12) / 3)
        self.bias = nn.Parameter(torch.zeros(12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 12)
        return self.head(torch.relu(hidden))


class SpectralNorm(nn.Module):
    """A convolution under the spectral_norm parametrization, whose power iteration changes buffers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class StackedExperts(nn.Module):
    """Experts that are linear layers of their own, stacked into one bank and applied by one `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        bank = torch.stack([expert.weight.t() for expert in self.experts])
        return self.head(torch.bmm(x.expand(3, -1, -1), bank).sum(0))


class RoutedExperts(nn.Module):
    """A bank of experts as one parameter, from which a gate chooses one for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.gate = nn.Linear(8, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        chance, chosen = self.gate(x).softmax(-1).max(-1)
        mixed = torch.bmm(self.bank[chosen], x.unsqueeze(-1)).squeeze(-1)
        return self.head(mixed * chance.unsqueeze(-1))


CASES = {
    "transposed_linear": ZooCase(TransposedLinear, normal(2, 5, 8), sites=2),
    "spectral_norm": ZooCase(SpectralNorm, normal(2, 3, 8, 8), sites=2),
    "stacked_experts": ZooCase(StackedExperts, normal(4, 8), sites=4),
    "routed_experts": ZooCase(RoutedExperts, normal(4, 8), sites=3),
    "weight_norm": ZooCase(WeightNorm, normal(2, 3, 8, 8), sites=2),
    "weight_standardization": ZooCase(WeightStandardization, normal(2, 3, 8, 8), sites=2),
    "scaled_weight": ZooCase(ScaledWeight, normal(4, 8), sites=2),
    "matmul_parameter": ZooCase(MatmulParameter, normal(4, 8), sites=2),
    "einsum_experts": ZooCase(EinsumExperts, normal(4, 8), sites=2),
    "fused_projection": ZooCase(FusedProjection, normal(2, 5, 8), sites=2),
    "sliced_weight": ZooCase(SlicedWeight, normal(4, 8), sites=2),
}
