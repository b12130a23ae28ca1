"""A bench for rules by hand: linears whose weights, masks and gradients are numbers that the test writes down."""

import pytest
import torch
from torch import nn

import fxsparse


class Rows(nn.Module):
    """Linears side by side on one input; with the identity as input, an output is the transposed weight."""

    def __init__(self, weights, dtype):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype) for weight in weights
        )

    def forward(self, x):
        return [layer(x[: layer.in_features, : layer.in_features]) for layer in self.layers]


class Run:
    """Sites of one row each (or of given matrices) under a method, stepped with gradients that are written down.

    The gradient of the loss with respect to the masked weight is exactly what `step` is given. The learning rate is 0
    unless an optimizer is given.
    """

    def __init__(self, weights, masks, method="rigl", optimizer=None, total_steps=100, targets=None, **options):
        dtype = options.pop("dtype", torch.float64)
        attach = {key: options.pop(key) for key in ("update_weights_first",) if key in options}
        weights = [
            torch.tensor(w, dtype=dtype).reshape(-1, len(w) if not isinstance(w[0], list) else len(w[0]))
            for w in weights
        ]
        masks = [torch.tensor(m, dtype=torch.bool).reshape(w.shape) for m, w in zip(masks, weights, strict=True)]
        self.names = [f"layers.{i}.weight" for i in range(len(weights))]
        targets = [int(m.sum()) for m in masks] if targets is None else targets
        sparsities = {
            name: 1 - target / w.numel() for name, target, w in zip(self.names, targets, weights, strict=True)
        }
        self.eye = torch.eye(max(w.shape[1] for w in weights), dtype=dtype)
        defaults = {"update_interval": 1, "drop_fraction": 0.5, "decay": "constant", "stop_fraction": 1.0}
        self.sparse = fxsparse.sparsify(
            Rows(weights, dtype), self.eye, method, sparsity=0.5, distribution=sparsities, **(defaults | options)
        )
        with torch.no_grad():
            for name, weight, mask in zip(self.names, weights, masks, strict=True):
                self.sparse.get_parameter(name).copy_(weight)
                self.sparse.masks[name].copy_(mask)
        self.sparse.apply_masks_()
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        self.optimizer = make(self.sparse.parameters())
        self.rewirer = self.sparse.attach(self.optimizer, total_steps, **attach)

    def backward(self, *gradients):
        outputs = self.sparse(self.eye)
        total = 0.0
        for output, gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                total = total + (output.T * torch.tensor(gradient, dtype=output.dtype).reshape(output.T.shape)).sum()
        total.backward()

    def step(self, *gradients):
        self.optimizer.zero_grad()
        self.backward(*gradients)
        self.optimizer.step()

    @property
    def masks(self):
        return [mask.int().flatten().tolist() for mask in self.sparse.masks.values()]

    @property
    def counts(self):
        return [sum(mask) for mask in self.masks]

    @property
    def weights(self):
        return [self.sparse.get_parameter(name).flatten().tolist() for name in self.names]

    def buffer(self, key, site=0):
        return self.optimizer.state[self.sparse.get_parameter(self.names[site])][key].flatten().tolist()


@pytest.fixture(scope="session")
def bench():
    """`bench(weights, masks, method, **options)`: a `Run`."""
    return Run
