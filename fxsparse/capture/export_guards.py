"""What has to be arranged around `torch.export`: what it would lose is refused, and what it says is held back."""

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..core.errors import CaptureError
from .export_sizes import sizes_spelled_out
from .guards import checkpointing_off
from .no_grad_regions import INFERENCE_MODE

Refusal = Callable[[str], CaptureError]
"""Makes the error of a reason."""


_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


class OutsideGradientsRefused(TorchFunctionMode):
    """Refuses hooks on tensors, and tensors with a gradient that are not the model's, of which export takes a copy."""

    def __init__(self, own: Iterable[Tensor], refused: Refusal) -> None:
        super().__init__()
        self.own = {id(tensor): tensor for tensor in own}
        self.refused = refused

    def allow(self, tensor: Tensor) -> Tensor:
        """Lets one more tensor pass."""
        self.own[id(tensor)] = tensor
        return tensor

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _HOOKS:
            raise self.refused("a hook is registered on a tensor, which a graph cannot hold")
        for leaf in pytree.tree_leaves((args, kwargs)):
            if type(leaf) in (Tensor, nn.Parameter) and id(leaf) not in self.own and leaf.requires_grad:
                raise self.refused("a tensor that is not in the model takes part, and it has a gradient")
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet_export(refused: Refusal) -> Iterator[None]:
    """For the time of an export: no log, no checkpointing, and what export would lose is refused."""

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        is_custom_operator = cls.__module__ == "torch._library.autograd"  # stays a node, which has its own backward
        if not is_custom_operator and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise refused(f"torch.export would lose the backward pass of the autograd function {cls.__name__}")
        return plain_apply.__get__(None, cls)(*args, **kwargs)

    def enter_inference_mode(region: torch.inference_mode) -> Any:
        if region.mode:  # of which export keeps nothing, not even that there are no gradients
            raise refused(INFERENCE_MODE)
        return plain_inference_mode(region)

    plain_apply = torch.autograd.Function.__dict__["apply"]
    plain_inference_mode = torch.inference_mode.__enter__
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        stack.enter_context(redirect_stderr(io.StringIO()))  # export prints the graph of what it could not do
        stack.enter_context(sizes_spelled_out())
        stack.enter_context(checkpointing_off())
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", enter_inference_mode))
        if hasattr(symbolic_config, "backed_size_oblivious"):  # else sizes of 0 and 1 are refused at run time
            stack.enter_context(
                symbolic_config.patch(  # type: ignore[attr-defined]
                    backed_size_oblivious=True
                )
            )
        stack.enter_context(torch.enable_grad())
        yield
