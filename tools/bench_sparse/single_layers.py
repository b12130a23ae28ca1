"""Single layers, forward and both backward passes: dense, SparseProp's and ours."""

import copy
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .networks import Case, dense_network, relative_error
from .turns import Loaded, once

Shape = tuple[int, int, int, int, int]
"""Input channels, output channels, kernel (0: a linear layer), stride, side of the input picture (0: linear)."""


def distinct_layers(case: Case) -> list[Shape]:
    """The network's distinct layers in order of execution, without its first, which stays dense."""
    model, x = dense_network({**case, "batch": 1})
    found: list[Shape] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            found.append(
                (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], inputs[0].shape[-1])
            )
        else:
            found.append((layer.in_features, layer.out_features, 0, 0, 0))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(x)
    return list(dict.fromkeys(found[1:]))


def name_of(shape: Shape) -> str:
    inputs, outputs, kernel, stride, side = shape
    if not kernel:
        return f"linear {inputs}->{outputs}"
    return f"{kernel}x{kernel} {inputs}->{outputs} {side}x{side}" + ("" if stride == 1 else f" stride {stride}")


def macs(shape: Shape, batch: int) -> int:
    """Multiply-adds of the dense forward pass; each backward pass has as many."""
    inputs, outputs, kernel, stride, side = shape
    positions = ((side + stride - 1) // stride) ** 2 if kernel else 1
    return batch * inputs * outputs * max(kernel, 1) ** 2 * positions


def make(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """The dense layer, its input and the gradient of its output."""
    inputs, outputs, kernel, stride, side = case["layer"]
    torch.manual_seed(0)
    if kernel:
        layer: nn.Module = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        x = torch.randn(case["batch"], inputs, side, side)
    else:
        layer, x = nn.Linear(inputs, outputs, bias=False), torch.randn(case["batch"], inputs)
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))
    return layer, x.requires_grad_(), gradient


def passes(layer: nn.Module, x: Tensor, gradient: Tensor) -> Any:
    """A call that runs forward and both backward passes."""
    parameters = list(layer.parameters())

    def call() -> tuple[Tensor, Tensor]:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        output = layer(x)
        output.backward(gradient)
        return output.detach(), x.grad

    return call


def checked(layer: nn.Module, weight: Tensor, case: Case) -> Loaded:
    """Output and input gradient against the dense layer with the masked `weight`; its gradient where active."""
    dense, x, gradient = make(case)
    with torch.no_grad():
        dense.weight.copy_(weight)
    call = passes(layer, x, gradient)
    output, x_gradient = (tensor.clone() for tensor in call())
    expected, expected_gradient = passes(dense, x, gradient)()
    error = max(relative_error(output, expected), relative_error(x_gradient, expected_gradient))
    active = int((weight != 0).sum())
    for parameter in layer.parameters():
        if parameter.numel() == active and parameter.grad is not None:
            # in what order the active weights are held is a contender's own affair
            found, right = parameter.grad.flatten(), dense.weight.grad[weight != 0]
            error = max(error, relative_error(found.sort().values, right.sort().values))
    return Loaded(once(call), error, {"active": active})


def dense_layer(case: Case) -> Loaded:
    layer, x, gradient = make(case)
    if case.get("format") == "channels_last" and x.dim() == 4:
        layer = layer.to(memory_format=torch.channels_last)
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    return Loaded(once(passes(layer, x, gradient)))


def lowered_layer(case: Case) -> Loaded:
    import fxsparse

    layer, x, _ = make(case)
    example = x.detach()
    options = {**case["options"], "method": "static", "distribution": {"weight": case["sparsity"]}}
    sparse = fxsparse.sparsify(layer, example, sparsity=case["sparsity"], verify=False, **options)
    dense = copy.deepcopy(layer)
    sparse.copy_to(dense)
    weight = dense.weight.detach().clone()
    lowered = sparse.lower(train=True, layers="all")  # the kernels' own figures, not those of a layer left dense
    return checked(lowered.train(), weight, case)


def sparseprop_layer(case: Case) -> Loaded:
    from sparseprop.modules import SparseConv2d, SparseLinear

    layer, _, _ = make(case)
    weight = layer.weight.detach()
    removed = torch.randperm(weight.numel())[: int(case["sparsity"] * weight.numel())]
    weight.view(-1)[removed] = 0
    if isinstance(layer, nn.Linear):
        sparse = SparseLinear.from_dense(layer)
    else:
        sparse = SparseConv2d.from_dense(layer, vectorizing_over_on=case["variant"] == "over width")
    loaded = checked(sparse, weight, case)
    loaded.facts["version"] = version("sparseprop")
    return loaded
