"""Weights that are computed from a parameter, cut out of one, or used by another operation than a layer.

Each is a site: the mask goes on the parameter at the root, and the gradient reaches it through what is computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

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


CASES = {
    "weight_norm": ZooCase(WeightNorm, normal(2, 3, 8, 8), sites=2),
    "weight_standardization": ZooCase(WeightStandardization, normal(2, 3, 8, 8), sites=2),
    "scaled_weight": ZooCase(ScaledWeight, normal(4, 8), sites=2),
    "matmul_parameter": ZooCase(MatmulParameter, normal(4, 8), sites=2),
    "einsum_experts": ZooCase(EinsumExperts, normal(4, 8), sites=2),
    "fused_projection": ZooCase(FusedProjection, normal(2, 5, 8), sites=2),
    "sliced_weight": ZooCase(SlicedWeight, normal(4, 8), sites=2),
}
