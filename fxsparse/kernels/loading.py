"""Which kernels compute: the C++ ones, loaded or built when they are first needed, or `torch.sparse`."""

import os
import threading
import warnings

import torch

from ..core.errors import ConfigError, FxSparseWarning
from . import build

FALLBACK = "torch.sparse"

_lock = threading.Lock()
_in_use: str | None = None


def kernels_in_use() -> str:
    """ "AVX512", "AVX2", "DEFAULT" (NEON on ARM) for the C++ kernels compiled for that, or "torch.sparse".

    The first call in a process loads the kernels, and builds them where there is no build yet; so does the first call
    of a sparse operator. Where neither can be done, one warning says why, and `torch.sparse` takes their place.

    Raises:
        ConfigError: `FXSPARSE_KERNELS` is neither "on" nor "off".
    """
    global _in_use
    with _lock:
        if _in_use is None:
            _in_use = _load()
        return _in_use


def _load() -> str:
    wanted = os.environ.get("FXSPARSE_KERNELS") or "on"
    if wanted not in ("on", "off"):
        raise ConfigError(f"FXSPARSE_KERNELS={wanted!r}: expected on or off")
    if wanted == "off":
        return FALLBACK
    try:
        try:
            with build.kernel_library() as library:
                torch.ops.load_library(str(library))
        except OSError:  # what lies there is damaged, or of a machine with other libraries
            with build.kernel_library(anew=True) as library:
                torch.ops.load_library(str(library))
    except (build.BuildError, OSError) as error:
        cause = " ".join(str(error).split())
        warnings.warn(
            f"no sparse kernels: {cause}; torch.sparse takes their place, which is slower: install a C++20 compiler "
            "(or name one in CXX), or set FXSPARSE_KERNELS=off to do without",
            FxSparseWarning,
            stacklevel=4,
        )
        return FALLBACK
    return build.capability()
