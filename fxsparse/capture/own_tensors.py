"""Records what forward does to the model's own tensors when it does not reach them as attributes.

`self.weight` gives a proxy. `self.parameters()`, `self._buffers["mean"]`, a list of tensors or a tensor that is
no buffer give the real tensor; computing with it alone would run once, at trace time, and freeze the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property, resolve_name
from torch.utils import _pytree as pytree

from ..core.graphs import IN_PLACE_OPERATORS
from .concrete_proxy import ConcreteProxy

_IN_PLACE_METHODS = frozenset(["__setitem__", "__delitem__", *(f"__{name}__" for name in IN_PLACE_OPERATORS)])
_IDENTITY = frozenset(["__hash__", "__deepcopy__"])


class OwnTensorsRecorded(TorchFunctionMode):
    """While it is active, torch functions see proxies in place of the model's tensors.

    In-place changes of any other real tensor are refused: they would happen once, and not at every call.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.tracer.values.running or name in _IDENTITY:
            return func(*args, **kwargs)
        if name == "__get__":
            found = func(*args, **kwargs)  # shapes and dtypes of the model's tensors are constants; `.data` is not
            owner = self.tracer.own_proxy(args[0]) if isinstance(found, Tensor) else None
            return found if owner is None else getattr(owner, func.__self__.__name__)
        args, kwargs = pytree.tree_map(self._recorded, (args, kwargs))
        is_proxy = bool(args) and type(args[0]) is ConcreteProxy
        if args and not is_proxy and isinstance(args[0], Tensor) and _is_in_place(name):
            raise self.tracer.refused(
                f"{resolve_name(func) or name} changes a constant in place, which would happen once and not at every "
                "call; register it as a buffer, or make it with torch.zeros or its like"
            )
        if is_proxy and is_tensor_method_or_property(func):
            if name == "__set__":
                return setattr(args[0], func.__self__.__name__, args[1])
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _recorded(self, leaf: Any) -> Any:
        proxy = self.tracer.own_proxy(leaf)
        return leaf if proxy is None else proxy


def _is_in_place(name: str) -> bool:
    return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are attributes of a module without being its parameters or buffers."""
    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{key}" if prefix else key, value
