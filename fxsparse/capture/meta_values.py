"""Runs graph nodes on plain meta tensors: for models that are on the meta device as a whole.

A third of the cost of fake tensors, and less able: a tensor that is made on another device does not mix. Who
uses it falls back to fake tensors where it fails. For eval mode only.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from .fake_values import FakeEvaluator


def is_on_meta(model: nn.Module) -> bool:
    """Whether all parameters and buffers are on the meta device, and there are any."""
    tensors = [*model.parameters(), *model.buffers()]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


class MetaEvaluator(FakeEvaluator):
    """Evaluates nodes on the model's own tensors, which are on meta and have no contents to change."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.mode = nullcontext()  # type: ignore[assignment]

    def twin(self, tensor: Tensor) -> Tensor:
        """An alias of the tensor, without its history."""
        if id(tensor) not in self._twins:
            with self.apart():
                alias = tensor.detach().requires_grad_(tensor.requires_grad)
            self._twins[id(tensor)] = (tensor, alias)
        return self._twins[id(tensor)][1]

    def run(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        """As of fake tensors; modules run on what they hold."""
        if kind != "call_module":
            return super().run(kind, target, args, kwargs)
        with self.apart():
            return self.root.get_submodule(target)(*args, **kwargs)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While a value is computed, the tracer's patches stand aside."""
        before, self.running = self.running, True
        try:
            yield
        finally:
            self.running = before
