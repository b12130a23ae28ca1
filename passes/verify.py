"""Runs the rewritten graph beside the eager model and refuses it where they differ."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.capture.guards import module_state_kept
from fxsparse.core.errors import VerificationError

from .trace import split_example


def verify(name: str, eager: nn.Module, rewritten: nn.Module, example_input: Any) -> list[str]:
    """Compares outputs in eval and in train mode: bit for bit on the CPU, to 1e-4 relative elsewhere.

    Both modules share parameters and buffers, masked weights being 0 in storage, so the eager one is the
    model whose weights were multiplied by the masks. Random numbers, buffers, attributes and training flags
    are put back.

    Args:
        name: of the user's model, for messages.

    Returns:
        What could not be compared, a sentence each (a model whose own forward fails in train mode).

    Raises:
        VerificationError: the mode, the output and the largest difference.
    """
    args, kwargs = split_example(example_input)
    notes = []
    training = rewritten.training
    modes = {module: module.training for module in (*eager.modules(), *rewritten.modules())}
    try:
        for mode in ("eval", "train"):
            for module in (eager, rewritten):
                module.train(mode == "train")
            try:
                expected = _outputs(eager, args, kwargs)
            except Exception as error:
                notes.append(f"{mode} mode is not verified: the model itself fails there: {error}")
                continue
            try:
                actual = _outputs(rewritten, args, kwargs)
            except Exception as error:
                raise VerificationError(f"the graph of {name} fails in {mode} mode: {error}") from error
            _compare(f"the graph of {name} in {mode} mode", expected, actual)
    finally:
        for module, flag in modes.items():
            module.training = flag
        rewritten.train(training) if rewritten.training != training else None
    return notes


@torch.enable_grad()  # as in training: without gradients some of torch's modules take other kernels
def _outputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of the output, from seeded random numbers and with buffers put back afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    args, kwargs = _copied(args), _copied(kwargs)
    try:
        with torch.random.fork_rng(), module_state_kept(module):
            torch.manual_seed(0)
            leaves = list(_leaves(module(*args, **kwargs)))
            return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _copied(tree: Any) -> Any:
    """The example again, since a forward may change its inputs in place."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _leaves(output: Any) -> Iterator[Any]:
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield key
            yield from _leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _leaves(value)
    elif dataclasses.is_dataclass(output):
        for entry in dataclasses.fields(output):
            yield from _leaves(getattr(output, entry.name))
    else:
        yield output


def _compare(what: str, expected: list[Any], actual: list[Any]) -> None:
    if len(expected) != len(actual):
        raise VerificationError(f"{what} returns {len(actual)} values, the model {len(expected)}")
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(wanted, Tensor):
            if wanted != got:
                raise VerificationError(f"{what} returns {got!r} as output {index}, the model {wanted!r}")
        elif not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise VerificationError(f"{what} returns another kind of tensor as output {index}")
        else:
            tolerance = 0.0 if wanted.device.type == "cpu" else 1e-4
            if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
                difference = (got.double() - wanted.double()).abs().max().item()
                raise VerificationError(
                    f"{what} computes something else than the model: output {index} differs by up to {difference:.3g}"
                )
