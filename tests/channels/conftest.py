"""What the tests of channels share: networks with every number random, atoms chosen, masked and perturbed."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn


@pytest.fixture
def tools():
    """Functions on models and atoms; see each."""
    return SimpleNamespace(
        randomised=randomised,
        half_of=half_of,
        masked=masked,
        perturbed=perturbed,
        assert_close=assert_close,
        outputs=outputs,
    )


def randomised(model, dtype=torch.float64):
    """The model with random weights (outputs of order one), affines, biases and statistics, and no randomness."""
    generator = torch.Generator().manual_seed(0)
    model = model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "gamma" not in name and "layer_scale" not in name:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]
                parameter.normal_(0, 1.4 / math.sqrt(fan_in), generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def half_of(groups, fraction=0.5, seed=0):
    """A random part of the exact atoms of every group; never a whole group."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for group in groups.groups:
        atoms = group.with_status("exact")
        count = min(math.ceil(len(atoms) * fraction), len(group.atoms) - 1)
        chosen += [atoms[index] for index in torch.randperm(len(atoms), generator=generator)[:count].tolist()]
    return chosen


def _tensor(model, name):
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


@torch.no_grad()
def masked(model, atoms, roles=("consumer", "producer", "copy", "carrier")):
    """A copy in which the slices of these atoms are 0; statistics of normalisations stay."""
    model = copy.deepcopy(model)
    for atom in atoms:
        for item in atom.slices:
            tensor = _tensor(model, item.tensor)
            if item.role in roles and isinstance(tensor, nn.Parameter):
                tensor.index_fill_(item.dim, torch.tensor(item.indices), 0)
    return model


@torch.no_grad()
def perturbed(model, atoms):
    """A copy in which everything that makes these atoms' channels is something else."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    consumed = {}
    for atom in atoms:
        for item in atom.of("consumer"):
            consumed.setdefault(item.tensor, []).append(item)
    saved = {name: _tensor(model, name).clone() for name in consumed}
    for atom in atoms:
        for item in atom.slices:
            tensor = _tensor(model, item.tensor)
            if item.role != "consumer" and tensor.is_floating_point():
                view = tensor.index_select(item.dim, torch.tensor(item.indices))
                other = torch.rand(view.shape, generator=generator, dtype=torch.float64).to(view) + 0.7
                tensor.index_copy_(item.dim, torch.tensor(item.indices), other)
    for name, items in consumed.items():  # what is masked as a consumer stays masked
        for item in items:
            index = torch.tensor(item.indices)
            _tensor(model, name).index_copy_(item.dim, index, saved[name].index_select(item.dim, index))
    return model


def outputs(model, x, training=False):
    """All tensors that a model gives, statistics put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    with torch.no_grad():
        torch.manual_seed(0)
        result = model(x)
        for buffer, before in buffers:
            buffer.copy_(before)
    leaves = torch.utils._pytree.tree_leaves(
        vars(result) if hasattr(result, "__dict__") and not isinstance(result, (torch.Tensor, dict, tuple)) else result
    )
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_close(expected, actual, tolerance):
    """To a tolerance relative to the largest output, which has to be of order one."""
    assert len(expected) == len(actual) > 0
    for one, other in zip(expected, actual, strict=True):
        scale = one.abs().max().item()
        assert 1e-3 < scale < 1e4, f"outputs of size {scale} prove nothing"
        assert one.shape == other.shape
        assert (one - other).abs().max().item() <= tolerance * max(scale, 1.0)
