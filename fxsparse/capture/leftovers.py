"""Values of a trace that outlive it, because forward put them in a cache, or in a list or dict of a class or module.

The user's own model would find them there: an `lru_cache` that was filled while tracing answers with a proxy.
"""

import functools
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .concrete_proxy import ConcreteProxy


def remove_leftovers(handed_out: Sequence[weakref.ref], kind: type = ConcreteProxy) -> bool:
    """Empties every `lru_cache` that holds a proxy, and takes proxies out of lists, dicts and sets.

    A proxy that is kept under a name (a global variable) stays, and says what it is when it is used.

    Args:
        handed_out: weak references to all proxies of the trace, which has let go of them itself.
        kind: what they are, if not proxies.

    Returns:
        Whether forward keeps values outside the model in another way than an `lru_cache`.
    """
    if _alive(handed_out):
        gc.collect()
    if _alive(handed_out):
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper and _holds(thing, kind):
                thing.cache_clear()
    left = _alive(handed_out)
    containers = [thing for thing in gc.get_referrers(*left) if isinstance(thing, (list, dict, set))] if left else []
    containers = [container for container in containers if container is not left and not _is_of_a_node(container)]
    for container in containers:
        if type(container) is list:
            container[:] = [item for item in container if type(item) is not kind]
        elif isinstance(container, dict) and not _is_namespace(container):
            for key in [key for key, item in container.items() if type(item) is kind]:
                dict.__delitem__(container, key)  # a subclass may forbid its own
        elif type(container) is set:
            container.difference_update([item for item in container if type(item) is kind])
    return bool(left) if kind is ConcreteProxy else bool(containers)  # torch itself keeps a fake tensor at times


@contextmanager
def fake_leftovers_removed(notes: list[str]) -> Iterator[None]:
    """The same for fake tensors: what forward puts away outside the model while it is exported is taken out.

    Args:
        notes: gets a sentence where there was something.
    """
    before = {id(thing) for thing in gc.get_objects() if type(thing) is FakeTensor}
    try:
        yield
    finally:
        gc.collect()
        left = [weakref.ref(t) for t in gc.get_objects() if type(t) is FakeTensor and id(t) not in before]
        if remove_leftovers(left, FakeTensor):
            notes.append("forward puts tensors away outside the model; the graph does not")


def _is_of_a_node(container: Any) -> bool:
    """Whether something is the meta of a graph's node, of which torch keeps some."""
    return isinstance(container, dict) and any(type(owner) is fx.Node for owner in gc.get_referrers(container))


def _is_namespace(container: dict) -> bool:
    """Whether a dict holds the names of a module or an object's attributes, which code relies on to exist."""
    return "__builtins__" in container or any(
        getattr(owner, "__dict__", None) is container for owner in gc.get_referrers(container)
    )


def _alive(references: Sequence[weakref.ref]) -> list[Any]:
    return [proxy for reference in references if (proxy := reference()) is not None]


def _holds(cache: Any, kind: type) -> bool:
    """Whether a cache has something of a kind among its keys and results."""
    found = [cache]
    for _ in range(5):
        referents = gc.get_referents(*found)
        if any(type(thing) is kind for thing in referents):
            return True
        found = [t for t in referents if isinstance(t, (dict, list, tuple)) or type(t).__name__ == "_lru_list_elem"]
    return False
