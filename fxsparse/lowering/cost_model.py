"""What a layer costs, sparse and dense: measured on this machine, once for each kind of layer.

A kind is the layer's shapes and settings, its density in steps of a tenth of itself, the dtype, the number of threads
and whether gradients count. Measurements are kept in the cache folder, so that a second lowering does not wait.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import SparsePattern, sparse_conv2d, sparse_conv2d_fused, sparse_linear, sparse_linear_fused
from ..kernels.build import cache_folder
from ..kernels.layout import channels_contiguous
from ..passes.find_lowerable import SparseCall

_REPEATS = 3
_LARGEST = 2**22
"""Elements of a weight that is measured whole; of a larger one some output channels are, and the time is scaled."""
_STEP = math.log(1.1)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call."""

    sparse: float
    dense: float


class CostModel:
    """Measures layers, or remembers. `folder=None` remembers nothing beyond this object."""

    def __init__(self, folder: Path | None = None, *, persistent: bool = True) -> None:
        self._file = None
        if persistent:
            self._file = (folder or cache_folder()) / "layer-times.json"
        self._known: dict[str, list[float]] = _read(self._file)

    def estimate(
        self, call: SparseCall, density: float, block: int, dtype: torch.dtype, train: bool, between: bool = False
    ) -> Estimate:
        """Seconds of `call` with a weight of that density: forward, and with `train` both backward passes.

        Dense is the faster of torch's two memory formats; or, `between` layers that run on sparse kernels, what it is
        on their layout and back in it.
        """
        step = density_step(density)
        kind = {
            "call": {**asdict(call), "mode": "", "node": "", "input": call.input.shape, "output": call.output.shape},
            "density": step,
            "block": block,
            "dtype": str(dtype),
            "train": train,
            "between": between,
        }
        part = _part_of(call)
        share = part.weight[0] / call.weight[0]
        times = self.remembered(kind, lambda: _measure(part, nearest_density(step), block, dtype, train, between))
        return Estimate(*(seconds / share for seconds in times))

    def remembered(self, kind: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
        """The seconds of a kind of call, measured where they are not known; `kind` is what they depend on."""
        machine = {
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        key = json.dumps(kind | machine, sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = measure()
            _write(self._file, self._known)
        return self._known[key]


def density_step(density: float) -> int:
    """Densities that are measured as one have the same step."""
    return round(math.log(max(density, 1e-6)) / _STEP)


def nearest_density(step: int) -> float:
    """The density that stands for a step."""
    return math.exp(step * _STEP)


def _read(file: Path | None) -> dict[str, list[float]]:
    try:
        known = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path | None, known: dict[str, list[float]]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{time.monotonic_ns()}")
        scratch.write_text(json.dumps(known))
        scratch.replace(file)
    except OSError:
        return  # a folder that cannot be written: it is measured again the next time


def _part_of(call: SparseCall) -> SparseCall:
    """The call with fewer output channels where its weight is large, so that no such tensor is made."""
    outputs, row = call.weight[0], math.prod(call.weight[1:])
    kept = max(_LARGEST // row // 8 * 8, 8)
    if call.groups > 1 or kept >= outputs:
        return call
    return replace(call, weight=(kept, *call.weight[1:]))


def _measure(
    call: SparseCall, density: float, block: int, dtype: torch.dtype, train: bool, between: bool
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    shape = call.weight[:2] if call.linear else call.weight
    rows = torch.rand(shape[0] // block, math.prod(shape[1:]), generator=generator) < min(density, 1.0)
    mask = rows.repeat_interleave(block, 0).reshape(shape)
    pattern = SparsePattern.of(mask, call.groups, block)
    weight = torch.randn(shape, generator=generator, dtype=dtype) * mask
    values = pattern.gather(weight)
    x = torch.randn(call.input.shape, generator=generator, dtype=dtype)
    if not call.linear and x.dim() == 3:
        x = x.unsqueeze(2)
    sparse = _sparse_call(call, values, pattern, block, train)
    formats = [torch.contiguous_format] if call.linear else [torch.contiguous_format, torch.channels_last]
    dense = [_dense_call(call, weight, layout) for layout in formats]
    inputs = [x if call.linear else x.transpose(0, 1).contiguous().transpose(0, 1)]
    inputs += [x.contiguous(memory_format=layout) for layout in formats]
    if between and not call.linear:
        own = _dense_call(call, weight, torch.contiguous_format)
        dense, inputs = [lambda x, w: channels_contiguous(own(x, w))], [inputs[0]] * 2
    weights = [values, *([weight] * len(dense))]
    times = best_seconds([_step(f, x, w, train) for f, x, w in zip([sparse, *dense], inputs, weights, strict=True)])
    return [times[0], min(times[1:])]


def _sparse_call(
    call: SparseCall, values: Tensor, pattern: SparsePattern, block: int, train: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    tensors = pattern.tensors
    settings = (call.weight, call.stride, call.padding, call.dilation, call.groups, block)
    if call.linear and train:
        return lambda x, w: sparse_linear(x, w, tensors, None, call.weight[:2], block)
    if call.linear:
        return lambda x, w: sparse_linear_fused(x, w, tensors, None, call.weight[0], block, None, None)
    if train:
        return lambda x, w: sparse_conv2d(x, w, tensors, None, *settings)
    return lambda x, w: sparse_conv2d_fused(x, w, tensors, None, None, *settings, None, None)


def _dense_call(call: SparseCall, weight: Tensor, layout: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if call.linear:
        return lambda x, w: F.linear(x, w)
    formatted = weight.contiguous(memory_format=layout)
    return lambda x, w: F.conv2d(
        x, formatted if w is weight else w, None, call.stride, call.padding, call.dilation, call.groups
    )


def _step(function: Callable, x: Tensor, weight: Tensor, train: bool) -> Callable[[], Any]:
    if not train:

        def forward() -> Any:
            with torch.no_grad():
                return function(x, weight)

        return forward
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def both() -> Any:
        y = function(x, weight)
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    return both


def best_seconds(calls: list[Callable[[], Any]]) -> list[float]:
    """The least seconds of each of some calls, which take turns."""
    best = [math.inf] * len(calls)
    for turn in range(_REPEATS + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                best[index] = min(best[index], time.perf_counter() - start)
    return best
