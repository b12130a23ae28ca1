"""Builds the C++ kernels at their first use, and keeps them in a cache folder."""

import os
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "csrc"

FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""Compiler flags by `torch.backends.cpu.get_cpu_capability()`; the vector classes of ATen go by the macros."""


def load_kernels() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in FLAGS else "DEFAULT"
    macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    folder = Path(os.environ.get("FXSPARSE_CACHE", Path.home() / ".cache/fxsparse")) / capability
    folder.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "fxsparse_kernels",
        [str(SOURCES / "operators.cpp")],
        extra_cflags=["-O3", *FLAGS.get(capability, ()), *macros],
        build_directory=str(folder),
        is_python_module=False,
    )


def cache_folder() -> Path:
    """Where built kernels and measurements are kept."""
    return Path(os.environ.get("FXSPARSE_CACHE", Path.home() / ".cache/fxsparse"))
