"""2:4 weights on a CUDA device: rewiring as on the CPU, and inference on PyTorch's semi-structured kernels."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import models
from fxsparse.kernels.semi_structured import find_kernels
from fxsparse.runtime.group_selection import rewire_in_groups

pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels():
    try:
        return find_kernels(torch.device("cuda"))
    except fxsparse.ConfigError as error:
        pytest.skip(str(error))


def close(found, expected, share):
    assert found.shape == expected.shape
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference <= share, float(difference)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_rewiring_chooses_the_same_positions_as_on_the_cpu(layout):
    groups = fxsparse.core.group_layout.GroupLayout((64, 32, 3, 3), 2, 4)
    generator = torch.Generator().manual_seed(0)
    for ties in (False, True):
        weight, score = (torch.randn(64, 32, 3, 3, generator=generator) for _ in range(2))
        weight, score = (weight.round(), score.round()) if ties else (weight, score)
        weight, score = weight.to(memory_format=layout), score.to(memory_format=layout)
        mask = groups.random_mask(weight, generator)
        k = int(mask.sum()) // 3
        on_cpu = rewire_in_groups(weight.abs(), lambda own=score: own, mask, k, k, groups, True)
        there = [tensor.cuda() for tensor in (weight.abs(), score, mask)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # nothing waits
        try:
            on_device = rewire_in_groups(there[0], lambda own=there[1]: own, there[2], k, k, groups, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(one.cpu(), other) for one, other in zip(on_device, on_cpu, strict=True))


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_every_group_keeps_its_number_in_mixed_precision(method):
    torch.manual_seed(0)
    model = models.wide_resnet22_2().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (16,), device="cuda")
    sparse = fxsparse.sparsify(model, x, method, granularity="2:4", update_interval=5)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, fused=True)
    rewirer = sparse.attach(optimizer, total_steps=40)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(sparse(x), y)
        loss.backward()
        optimizer.step()
    assert len(rewirer.history) >= 4 and sum(rewirer.history[0].changed.values()) > 0
    for name, groups in sparse.group_layouts.items():
        assert groups.holds(sparse.masks[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(64,), (3, 7), (1,)])
def test_a_linear(kernels, dtype, bias, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128, bias=bias)).cuda().to(dtype)
    x = torch.randn(*batch, 256, device="cuda", dtype=dtype)
    sparse = fxsparse.sparsify(model, x, "static", granularity="2:4", verify=False).eval()
    lowered = sparse.lower("cuda")
    assert [decision.lowered for decision in lowered.decisions] == [True]
    kind = type(lowered.get_buffer("0.weight")).__name__
    assert kind == {"cuSPARSELt": "SparseSemiStructuredTensorCUSPARSELT"}.get(
        kernels.name, "SparseSemiStructuredTensorCUTLASS"
    )
    with torch.no_grad():
        close(lowered(x), sparse(x), 1e-2)
        exact = copy.deepcopy(sparse).double()(x.double())
        close(lowered(x), exact, 1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_convolutional_net(kernels, compiled):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=100).cuda().to(torch.bfloat16).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    sparse = fxsparse.sparsify(model, x, "static", granularity="2:4", verify=False).eval()
    lowered = sparse.lower("cuda")
    names = {decision.name for decision in lowered.decisions if decision.lowered}
    ones = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    strided = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    assert names == {f"{name}.weight" for name in ones - strided}
    run = torch.compile(lowered, fullgraph=True) if compiled else lowered
    with torch.no_grad():
        close(run(x), sparse(x), 5e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_encoder_of_the_size_of_vit_l(kernels, compiled):
    torch.manual_seed(0)
    encoder = torchvision.models.vit_l_16().encoder.cuda().to(torch.bfloat16).eval()
    x = torch.randn(4, 197, 1024, device="cuda", dtype=torch.bfloat16)
    sparse = fxsparse.sparsify(encoder, x, "static", granularity="2:4", verify=False).eval()
    lowered = sparse.lower("cuda")
    assert all(decision.lowered for decision in lowered.decisions) and len(lowered.decisions) == 4 * 24
    run = torch.compile(lowered, fullgraph=True) if compiled else lowered
    with torch.no_grad():
        close(run(x), sparse(x), 5e-2)


def test_float32_stays_dense_with_a_word(kernels):
    sparse = fxsparse.sparsify(nn.Sequential(nn.Linear(64, 64)).cuda(), torch.randn(2, 64).cuda(), granularity="2:4")
    with pytest.warns(
        fxsparse.FxSparseWarning, match=r"it is float32; convert the module first: sparse\.to\(torch\.bf"
    ):
        lowered = sparse.eval().lower("cuda")
    x = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        close(lowered(x), sparse(x), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparse.to(torch.bfloat16).lower("cuda").decisions[0].lowered  # captured in float32
