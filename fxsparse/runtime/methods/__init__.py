"""The methods by name. A new one is a file here and an entry in the table."""

from ...core.errors import ConfigError, nearest
from .base import Method, Moment, Need, Quota
from .rigl import RigL
from .set import SET
from .static import Dense, Static

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Dense, Static, SET, RigL)}


def methods() -> list[str]:
    """The names that `sparsify(..., method=...)` accepts."""
    return list(METHODS)


def make_method(method: str | Method) -> Method:
    """A method from its name, or the method itself."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ConfigError(f"method: {method!r} is not one of {', '.join(METHODS)}{nearest(str(method), METHODS)}")
    return METHODS[method]()


__all__ = [
    "METHODS",
    "SET",
    "Dense",
    "Method",
    "Moment",
    "Need",
    "Quota",
    "RigL",
    "Static",
    "make_method",
    "methods",
]
