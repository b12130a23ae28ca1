"""Sparse kernels on the CPU: patterns of active weights, and the operators that compute with them alone."""

from . import update_steps
from .loading import kernels_in_use
from .operators import sparse_conv2d, sparse_conv2d_fused, sparse_linear, sparse_linear_fused
from .pattern import SparsePattern

__all__ = [
    "SparsePattern",
    "kernels_in_use",
    "sparse_conv2d",
    "sparse_conv2d_fused",
    "sparse_linear",
    "sparse_linear_fused",
    "update_steps",
]
