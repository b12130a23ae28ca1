"""The operators in torch's machinery: opcheck, compiled graphs, exported programs, threads."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import nn

from fxsparse.kernels import SparsePattern, kernels_in_use, sparse_conv2d, sparse_linear
from fxsparse.kernels.operators import SCHEMAS


class Net(nn.Module):
    """Convolution, then linear, on stored weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.rand(8, 3, 3, 3) < 0.3, torch.rand(5, 8) < 0.5
        self.conv_pattern, self.linear_pattern = SparsePattern.of(self.conv), SparsePattern.of(self.linear)
        self.conv_values = nn.Parameter(torch.randn(self.conv_pattern.count))
        self.linear_values = nn.Parameter(torch.randn(self.linear_pattern.count))
        self.bias = nn.Parameter(torch.randn(8))
        for index, part in enumerate(self.conv_pattern.tensors):
            self.register_buffer(f"conv{index}", part)
        for index, part in enumerate(self.linear_pattern.tensors):
            self.register_buffer(f"linear{index}", part)

    def forward(self, x):
        parts = [getattr(self, f"conv{index}") for index in range(5)]
        x = sparse_conv2d(x, self.conv_values, parts, self.bias, (8, 3, 3, 3), (2, 1), (1, 1)).relu()
        parts = [getattr(self, f"linear{index}") for index in range(5)]
        return sparse_linear(x.mean((2, 3)), self.linear_values, parts, None, (5, 8))

    def dense(self, x):
        conv, linear = (
            self.conv_pattern.scatter(self.conv_values.detach()),
            self.linear_pattern.scatter(self.linear_values.detach()),
        )
        return F.linear(F.conv2d(x, conv, self.bias, (2, 1), 1).relu().mean((2, 3)), linear)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def operator_calls():
    mask = torch.rand(8, 4, 3, 2, generator=torch.Generator().manual_seed(0)) < 0.4
    pattern = SparsePattern.of(mask, groups=2)
    x, dy = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 3, 4)
    values, bias = torch.randn(pattern.count), torch.randn(8)
    settings = [8, 4, 3, 2], [2, 1], [1, 0], [1, 1], 2, 1
    linear = SparsePattern.of(torch.rand(8, 6) < 0.4)
    vectors, weights = torch.randn(3, 2, 6), torch.randn(linear.count)
    wanted = [tensor.clone().requires_grad_() for tensor in (x, values, bias, dy)]
    return {
        "sparse_conv2d": [(wanted[0], wanted[1], pattern.tensors, wanted[2], *settings)],
        "sparse_conv2d_fused": [
            (x, values, pattern.tensors, bias, dy, *settings, 0.0, None),
            (x, values, pattern.tensors, None, None, *settings, None, None),
        ],
        "sparse_conv2d_input_gradient": [(wanted[3], x, wanted[1], pattern.tensors, *settings)],
        "sparse_conv2d_weight_gradient": [(wanted[3], wanted[0], pattern.tensors, *settings)],
        "sparse_linear_fused": [
            (part, weights, linear.tensors, bias, 8, 1, None, 1.0)
            for part in (vectors, vectors[0, 0], vectors[:1, 0], vectors[:0])
        ],
    }


def test_every_operator_is_checked():
    assert list(operator_calls()) == [schema.split("(")[0] for schema in SCHEMAS]


@pytest.mark.parametrize("name", [schema.split("(")[0] for schema in SCHEMAS])
def test_opcheck(name):
    for args in operator_calls()[name]:
        torch.library.opcheck(getattr(torch.ops.fxsparse, name), args)


def test_a_compiled_graph_is_whole_and_trains(net):
    x = torch.randn(2, 3, 9, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for module in (compiled, net):
        net.zero_grad()
        y = module(x)
        assert relative_error(y, net.dense(x)) < 1e-5
        y.square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
        if module is compiled:
            first = gradients
    for name, gradient in gradients.items():
        assert relative_error(first[name], gradient) < 1e-5


def test_inductor_takes_the_layouts(net, compiled):
    del compiled
    with torch.no_grad():
        function = torch.compile(net, fullgraph=True)
        for images in (2, 5):
            x = torch.randn(images, 3, 9, 8)
            assert relative_error(function(x), net.dense(x)) < 1e-5


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_an_exported_program_runs_where_nothing_was_lowered(net, tmp_path, kernels):
    x = torch.randn(2, 3, 9, 8)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("images", min=1)}})
    torch.export.save(program, tmp_path / "net.pt2")
    x = torch.randn(3, 3, 9, 8)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, fxsparse.kernels as kernels\n"
        "y = torch.export.load(sys.argv[1] + '/net.pt2').module()(torch.load(sys.argv[1] + '/x.pt'))\n"
        "torch.save((kernels.kernels_in_use(), y), sys.argv[1] + '/y.pt')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        if kernels == "off":
            patch.setenv("FXSPARSE_KERNELS", "off")
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    in_use, y = torch.load(tmp_path / "y.pt")
    assert in_use == (kernels_in_use() if kernels == "on" else "torch.sparse")
    assert relative_error(y, net.dense(x)) < 1e-5


def test_other_devices_are_refused():
    args = operator_calls()["sparse_conv2d_fused"][0]
    elsewhere = tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args)
    assert torch.ops.fxsparse.sparse_conv2d_fused(*elsewhere).device.type == "meta"  # shapes alone
    with pytest.raises(ValueError, match="on the CPU"):
        torch.ops.fxsparse.sparse_conv2d_fused(args[0].to_sparse(), *args[1:])


def test_threads_change_rounding_alone_and_repeat_it(compiled):
    """Results by threads: near one another, and each time the same; three output rows for sixteen threads too."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        for outputs, size, block in ((64, 12, 1), (3, 2, 1), (64, 12, 4)):
            mask = (torch.rand(outputs // block, 1, 32, 3, 3) < 0.2).expand(-1, block, -1, -1, -1)
            pattern = SparsePattern.of(mask.reshape(outputs, 32, 3, 3), block=block)
            x, values, dy = torch.randn(8, 32, size, size), torch.randn(pattern.count), None
            settings = [outputs, 32, 3, 3], [1, 1], [1, 1], [1, 1], 1, block
            results = []
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                for _ in range(2):
                    y = compiled.sparse_conv2d(x, values, pattern.tensors, None, *settings)
                    dy = torch.randn_like(y) if dy is None else dy
                    dx = compiled.sparse_conv2d_input_gradient(dy, x, values, pattern.tensors, *settings)
                    dw = compiled.sparse_conv2d_weight_gradient(dy, x, pattern.tensors, *settings)
                    results.append((y, dx, dw))
                assert all(map(torch.equal, *results[-2:]))
            for result in results[2:]:
                for actual, one in zip(result, results[0], strict=True):
                    assert relative_error(actual, one) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_several_threads_do_compute(compiled):
    """The kernels call OpenMP of torch's own number of threads: those of a process that runs them number as many."""
    code = (
        "import os, torch, fxsparse.kernels as k\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(3)\n"
        "p = k.SparsePattern.of(torch.ones(64, 64, 1, 1, dtype=torch.bool))\n"
        "k.sparse_conv2d(torch.ones(4, 64, 32, 32), torch.ones(p.count), p.tensors, None, (64, 64, 1, 1))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) >= 2  # without OpenMP in the build there is one thread, whatever is asked for


def test_no_warnings(ops):
    args = operator_calls()["sparse_conv2d_fused"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.sparse_conv2d_fused(*args)
