"""Sparse kernels on the CPU: patterns of active weights, and the operators that compute with them alone."""

from . import update_steps
from .operators import sparse_conv2d, sparse_conv2d_fused, sparse_linear, sparse_linear_fused
from .pattern import SparsePattern

__all__ = [
    "SparsePattern",
    "sparse_conv2d",
    "sparse_conv2d_fused",
    "sparse_linear",
    "sparse_linear_fused",
    "update_steps",
]
