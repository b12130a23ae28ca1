"""Runs the rewritten graph beside the eager model and refuses it where they differ."""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.capture.guards import module_state_kept, random_state_kept
from fxsparse.capture.shown_weights import fast_path_off
from fxsparse.core.arguments import is_object, map_leaves
from fxsparse.core.errors import InputError, VerificationError

from .trace import split_example


@runtime_checkable
class _HasUnits(Protocol):
    """A module that runs submodules of the eager one by graphs."""

    def units_apart(self) -> AbstractContextManager: ...


def verify(name: str, eager: nn.Module, rewritten: nn.Module, example_input: Any) -> list[str]:
    """Compares outputs in eval and in train mode: bit for bit on the CPU, to 1e-4 relative elsewhere.

    Both modules share parameters and buffers, masked weights being 0 in storage, so the eager one is the
    model whose weights were multiplied by the masks. Where something may be kept from call to call, there is a
    second call. Random numbers, buffers, attributes and training flags are put back.

    Args:
        name: of the user's model, for messages.

    Returns:
        What could not be compared, a sentence each (a model whose own forward fails in train mode), and whether the
        masked model gives NaN.

    Raises:
        VerificationError: the mode, the output and the largest difference.
        InputError: the model itself fails on the example, in both modes.
    """
    args, kwargs = split_example(example_input)
    notes = []
    gives_nan = False
    training = rewritten.training
    modes = {module: module.training for module in (*eager.modules(), *rewritten.modules())}
    # What is kept from call to call would show in a second one: an attribute, a constant changed in place.
    calls = 2 if getattr(rewritten, "notes", ()) or hasattr(rewritten, "_tensor_constant0") else 1
    try:
        for mode in ("eval", "train"):
            for module in (eager, rewritten):
                module.train(mode == "train")
            try:
                with rewritten.units_apart() if isinstance(rewritten, _HasUnits) else nullcontext():
                    expected = _outputs(eager, args, kwargs, calls)
            except Exception as error:
                notes.append(f"{mode} mode is not verified: the model itself fails there: {error}")
                continue
            try:
                actual = _outputs(rewritten, args, kwargs, calls)
            except Exception as error:
                raise VerificationError(f"the graph of {name} fails in {mode} mode: {error}") from error
            what = f"the graph of {name} in {mode} mode"
            _compare(what, expected[0], actual[0])
            gives_nan |= any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in expected[0])
            if calls > 1:
                _compare(f"{what}, called again,", expected[1], actual[1])
        if len(notes) == 2:
            raise InputError(
                f"{name} itself fails on example_input: {notes[0].partition(': the model itself fails there: ')[2]}"
            )
    finally:
        for module, flag in modes.items():
            module.training = flag
        rewritten.train(training) if rewritten.training != training else None
    if gives_nan:
        notes.append(
            "the masked model gives NaN; so does weight norm of a filter without an active weight: lower the sparsity "
            "of that weight with explicit=, or exclude it"
        )
    return notes


@torch.enable_grad()  # as in training: without gradients some of torch's modules take other kernels
def _outputs(module: nn.Module, args: tuple, kwargs: dict[str, Any], calls: int) -> list[list[Any]]:
    """The leaves of the output of each of several calls in a row.

    Random numbers are seeded, buffers and attributes put back afterwards.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    outputs = []
    try:
        with fast_path_off(), torch.random.fork_rng(), random_state_kept(), module_state_kept(module):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            for _ in range(calls):
                leaves = _leaves(module(*_copied(args), **_copied(kwargs)))
                outputs.append([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        return outputs
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # those that nobody wrote to are known to be as they were
                    buffer.copy_(before)


def _copied(tree: Any) -> Any:
    """The example again, since a forward may change its inputs in place."""
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


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
    elif is_object(output):
        yield type(output)
        yield from _leaves(vars(output))
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
