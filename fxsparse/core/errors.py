"""Every error and warning that fxsparse raises on purpose.

Each message names the layer, argument or file, the value met, and what would be accepted. Nothing is
changed before an error is raised.
"""

import math
import numbers


class FxSparseError(Exception):
    """Base class: catch this to catch everything that fxsparse raises on purpose."""


class CaptureError(FxSparseError):
    """`forward` could not be captured as a graph; names the module, the source line and the reason."""


class SelectionError(FxSparseError):
    """A selection of weights (`include`, `exclude`, `dense`, a site name) matches nothing or contradicts itself."""


class AllocationError(FxSparseError):
    """No density per site satisfies the request."""


class VerificationError(FxSparseError):
    """The rewritten graph does not compute what the eager model computes."""


class RuntimeStateError(FxSparseError):
    """The runtime cannot work with this optimizer or saved state."""


class InputError(FxSparseError):
    """A captured module was called with arguments that its graph was not captured for."""


class BakedSizeError(InputError, RuntimeError):
    """A node fails for sizes that the example did not have; also what torch raises where the model fails itself."""


class ConfigError(FxSparseError):
    """An option has a value that is not among its choices."""


class DataError(FxSparseError):
    """A data set is missing, damaged, or not what it should be."""


class CheckpointError(FxSparseError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class FxSparseWarning(UserWarning):
    """Base class of the warnings: something works, but perhaps not as expected."""


def check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Refuses what is not a finite number (or, if `whole`, not an integer) by the argument's name."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise ConfigError(f"{name}: {value!r} is not {'an integer' if whole else 'a finite number'}")


def nearest(name: str, choices, count: int = 3) -> str:
    """`"; did you mean a, b?"` for the choices closest to `name`, or the empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.4)
    return f"; did you mean {', '.join(close)}?" if close else ""
