"""PyTorch's semi-structured kernels (2:4) for CUDA devices: which there are, and the calls that use them.

A weight is packed once (`torch.sparse.to_sparse_semi_structured`): its 2 values of every 4 and where they are. The
calls are functions of ordinary torch operations; with a dense weight in the place of a packed one they compute the
same on any device.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError

_WAY_OUT = "lower() without backend= has sparse kernels for the CPU"
_LEAST = (8, 0)
"""The compute capability from which on a device multiplies 2:4 (Ampere)."""


@dataclass(frozen=True)
class SemiStructuredKernels:
    """What a device can run.

    Attributes:
        name: of the library, for people.
        device: where weights have to be.
        multiples: dtype -> of what the rows and the columns of a weight have to be multiples.
        pack: from a dense contiguous (out, in) weight that is 2:4 to what `F.linear` takes in its place.
    """

    name: str
    device: torch.device
    multiples: Mapping[torch.dtype, tuple[int, int]]
    pack: Callable[[Tensor], Tensor]


def find_kernels(device: torch.device) -> SemiStructuredKernels:
    """The kernels for weights on a device.

    Raises:
        ConfigError: there are none: what is missing, and the way out.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        missing = "this torch is built without CUDA" if torch.version.cuda is None else "there is no CUDA device here"
        raise ConfigError(f"backend 'cuda': {missing}; {_WAY_OUT}")
    if device.type != "cuda":
        raise ConfigError(f"backend 'cuda': the module is on {device.type}; move it first: sparse.to('cuda')")
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < _LEAST:
        raise ConfigError(
            f"backend 'cuda': {name} has compute capability {capability[0]}.{capability[1]}, and 2:4 kernels need 8.0 "
            "or more; run the masked module as it is"
        )
    if torch.backends.cusparselt.is_available():
        kind: type = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
        return SemiStructuredKernels("cuSPARSELt", device, _multiples(kind), _pack_for_cusparselt)
    if capability[0] != 8:  # CUTLASS kernels of torch are for compute capability 8.x alone
        raise ConfigError(
            f"backend 'cuda': this torch has no cuSPARSELt, and {name} (compute capability {capability[0]}."
            f"{capability[1]}) needs it; install a torch with it, or run the masked module as it is"
        )
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    return SemiStructuredKernels("CUTLASS", device, _multiples(kind), _pack_for_cutlass)


def _multiples(kind: type) -> dict[torch.dtype, tuple[int, int]]:
    rules = kind._DTYPE_SHAPE_CONSTRAINTS  # type: ignore[attr-defined]
    dtypes = (torch.float16, torch.bfloat16)  # an int8 product needs scales, which no linear of torch has
    return {dtype: (rules[dtype].sparse_min_rows, rules[dtype].sparse_min_cols) for dtype in dtypes if dtype in rules}


def _pack_for_cusparselt(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this part of torch is a prototype
        packed = torch.sparse.to_sparse_semi_structured(weight.detach())
    if hasattr(packed, "fuse_transpose_cusparselt"):
        packed.fuse_transpose_cusparselt = True  # the kernel writes rows of outputs, without a pass to transpose them
    return packed


def _pack_for_cutlass(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight.detach())


def semi_structured_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a packed weight.

    Args:
        input: (..., in), of the weight's dtype; the kernel takes rows, so any other layout is copied.
        weight: packed (out, in), or dense.
        bias: (out).

    Returns:
        (..., out), contiguous.
    """
    rows = input.reshape(-1, input.shape[-1])
    return F.linear(rows, weight, bias).contiguous().view(*input.shape[:-1], weight.shape[0])


def semi_structured_conv(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of stride 1, as a linear over the channels.

    Args:
        input: (batch, in, *positions); with channels innermost in memory (channels_last) nothing is copied.
        weight: packed (out, in), or dense.
        bias: (out).

    Returns:
        (batch, out, *positions), channels innermost in memory.
    """
    return semi_structured_linear(input.movedim(1, -1), weight, bias).movedim(-1, 1)
