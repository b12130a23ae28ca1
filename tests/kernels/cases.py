"""Random convolutions with what they should give; as a script, what the kernels of this process make of them."""

import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxsparse.kernels import SparsePattern, kernels_in_use, loading


@dataclass
class Case:
    """A convolution and its operands; `dense` is the masked weight."""

    x: torch.Tensor
    dense: torch.Tensor
    mask: torch.Tensor
    bias: torch.Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    block: int

    def __post_init__(self):
        self.pattern = SparsePattern.of(self.mask, self.groups, self.block)
        self.values = self.pattern.gather(self.dense)
        size = F.conv2d(self.x, self.dense, None, *self.convolution).shape
        generator = torch.Generator().manual_seed(1)
        self.dy = torch.randn(size, dtype=self.x.dtype, generator=generator)
        self.residual = torch.randn(size, dtype=self.x.dtype, generator=generator)

    @property
    def convolution(self):
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def settings(self):
        return list(self.dense.shape), *self.convolution, self.block

    def computed(self, ops):
        """Output, fused output, and the two gradients, by the operators in `ops`."""
        x, values, pattern = self.x, self.values, self.pattern.tensors
        return [
            ops.sparse_conv2d(x, values, pattern, self.bias, *self.settings),
            ops.sparse_conv2d_fused(x, values, pattern, self.bias, self.residual, *self.settings, -0.5, 1.0),
            ops.sparse_conv2d_input_gradient(self.dy, x, values, pattern, *self.settings),
            ops.sparse_conv2d_weight_gradient(self.dy, x, pattern, *self.settings),
        ]

    def expected(self):
        """The same from torch's dense convolution, in float64."""
        x, dense = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.dense))
        bias = None if self.bias is None else self.bias.double()
        y = F.conv2d(x, dense, bias, *self.convolution)
        y.backward(self.dy.double())
        return [
            y.detach(),
            (y.detach() + self.residual.double()).clamp(-0.5, 1.0),
            x.grad,
            dense.grad.flatten()[self.pattern.indices()],
        ]


def random_case(seed):
    """Every choice of a convolution, small."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups, block = rng.choice([1, 1, 1, 2, 3]), rng.choice([1, 1, 2, 4, 8])
    kernel = [rng.choice([1, 2, 3, 5]) for _ in range(2)] if rng.random() < 0.7 else [1, 1]
    stride = [rng.choice([1, 1, 2, 3]) for _ in range(2)]
    padding = [rng.choice([0, 0, 1, 2]) for _ in range(2)]
    dilation = [rng.choice([1, 1, 2]) for _ in range(2)]
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = [rng.choice([1, 5, 9, 14, 17, 33]) for _ in range(2)]
    size = [max(size[i], least[i]) for i in range(2)]
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    channels, outputs = rng.choice([1, 3, 8, 17]), groups * block * rng.choice([1, 2, 5])
    shape = (outputs, channels, *kernel)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=dtype)

    kept = torch.rand(outputs // block, 1, *shape[1:], generator=generator) < rng.choice([0.0, 0.1, 0.3, 0.9, 1.0])
    mask = kept.expand(-1, block, -1, -1, -1).reshape(shape)
    x = randn(rng.choice([1, 1, 2, 5]), groups * channels, *size)
    bias = randn(outputs) if rng.random() < 0.5 else None
    return Case(x, randn(*shape) * mask, mask, bias, stride, padding, dilation, groups, block)


def wide_case(seed):
    """So many channels and weights that the kernels go through them in tiles; of all sorts of tiles."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block, kernel = rng.choice([1, 1, 1, 2, 4, 8]), rng.choice([[1, 1], [3, 3], [3, 3], [1, 5]])
    channels, outputs = rng.choice([72, 100, 264, 1030]), rng.choice([8, 136, 264])
    if kernel != [1, 1]:
        channels = min(channels, 264)
    size = [rng.choice([7, 14, 16, 33]) for _ in range(2)]
    stride, padding = [rng.choice([1, 1, 2])] * 2, [kernel[0] // 2, kernel[1] // 2]
    shape = (outputs, channels, *kernel)
    kept = torch.rand(outputs // block, 1, *shape[1:], generator=generator) < rng.choice([0.05, 0.2, 0.5])
    mask = kept.expand(-1, block, -1, -1, -1).reshape(shape)
    x = torch.randn(rng.choice([1, 1, 2]), channels, *size, generator=generator)
    dense = torch.randn(shape, generator=generator) * mask / (channels * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    return Case(x, dense, mask, bias, stride, padding, [1, 1], 1, block)


def relative_error(actual, expected):
    """Greatest difference over greatest magnitude."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-6))


def main(count, library, target):
    """Runs `count` cases with the kernels of a library (or those that this process finds), and keeps the results."""
    if library != "-":
        torch.ops.load_library(library)
        loading._in_use = "given"
    cases = [random_case(seed) for seed in range(int(count))] + [wide_case(seed) for seed in range(int(count) // 10)]
    results = [case.computed(torch.ops.fxsparse) for case in cases]
    for index, (case, found) in enumerate(zip(cases, results, strict=True)):
        for actual, expected in zip(found, case.expected(), strict=True):
            assert relative_error(actual, expected) < 1e-5, index
    for case in cases[::7]:
        size = case.x.shape[2:]
        if min(size) >= 3:
            torch.ops.fxsparse.max_pool2d(case.x, [3, 2], [2, 1], [1, 0])
        torch.ops.fxsparse.plane_mean(case.x)
    torch.save((kernels_in_use(), results), target)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
