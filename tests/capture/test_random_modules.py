"""Random small networks: whatever a handful of operations make up, captured it equals eager."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse

CHANNELS = 4

OPERATIONS = (
    "conv",
    "shared conv",
    "depthwise",
    "norm",
    "linear",
    "relu",
    "relu_",
    "add",
    "iadd",
    "cat",
    "chunk",
    "view",
    "gate",
    "dropout",
    "crop",
    "train only",
)


class RandomNet(nn.Module):
    """Runs a program of `(operation, i, j)` on a growing list of (N, 4, H, W) tensors, of which it reads two."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.shared = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.layers = nn.ModuleDict()
        for step, (operation, _, _) in enumerate(program):
            self.layers[str(step)] = {
                "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
                "norm": lambda: nn.BatchNorm2d(CHANNELS),
                "linear": lambda: nn.Linear(CHANNELS, CHANNELS),
                "cat": lambda: nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
                "gate": lambda: nn.Linear(CHANNELS, CHANNELS),
                "train only": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
            }.get(operation, nn.Identity)()

    def forward(self, x):
        values = [self.shared(x)]
        for step, (operation, i, j) in enumerate(self.program):
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self.step(operation, self.layers[str(step)], a, b))
        return {"last": values[-1], "all": sum(value.mean((2, 3)) for value in values), "n": len(values)}

    def step(self, operation, layer, a, b):
        n, c, h, w = a.shape
        if operation == "shared conv":
            return self.shared(a)
        if operation == "linear":
            return layer(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if operation == "relu":
            return F.relu(a)
        if operation == "relu_":
            return a.clone().relu_()
        if operation == "add":
            return a + b
        if operation == "iadd":
            a = a.clone()
            a += b
            return a
        if operation == "cat":
            return layer(torch.cat((a, b), dim=1))
        if operation == "chunk":
            left, right = a.chunk(2, dim=1)
            return torch.cat((right * left.sigmoid(), left), dim=1)
        if operation == "view":
            return a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if operation == "gate":
            return b * torch.sigmoid(layer(a.mean((2, 3))))[:, :, None, None]
        if operation == "dropout":
            return F.dropout(a, 0.5, self.training)
        if operation == "crop":
            return F.interpolate(a[..., : h // 2, :], size=(h, w))
        if operation == "train only":
            return layer(a) if self.training else a
        return layer(a)  # conv, depthwise, norm


programs = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=8
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=programs, sparsity=st.sampled_from([0.0, 0.5, 0.9]), batch=st.sampled_from([2, 3]))
def test_a_random_network_equals_eager(program, sparsity, batch):
    torch.manual_seed(0)
    model = RandomNet(program)
    sparse = fxsparse.sparsify(
        model, torch.randn(2, CHANNELS, 6, 6), sparsity=sparsity, distribution="uniform", verify=False
    )
    eager = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in sparse.masks.items():
            eager.get_parameter(name).mul_(mask)
            sparse.get_parameter(name)[~mask] = 7.0  # what stands outside a mask has no influence
    x = torch.randn(batch, CHANNELS, 6, 6)
    for mode in (True, False):
        outputs = []
        for module in (eager, sparse):
            module.train(mode).zero_grad()
            torch.manual_seed(1)
            outputs.append(module(x))
            outputs[-1]["all"].square().sum().backward()
        expected, actual = outputs
        assert torch.equal(expected["last"], actual["last"]) and torch.equal(expected["all"], actual["all"])
        assert expected["n"] == actual["n"]
        ours, buffers = dict(sparse.named_parameters()), dict(sparse.named_buffers())
        for name, parameter in eager.named_parameters():
            gradient = parameter.grad
            if gradient is not None and name in sparse.masks:
                gradient = gradient * sparse.masks[name]
            own = ours[name].grad
            assert (gradient is None) == (own is None) and (gradient is None or torch.equal(gradient, own)), name
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in eager.named_buffers())
    assert [key for key in sparse.state_dict() if not key.endswith("_mask")] == list(model.state_dict())
    used = {name for name, parameter in eager.named_parameters() if parameter.ndim > 1 and parameter.grad is not None}
    trained = {site.name for site in sparse.sites}
    assert used <= trained
