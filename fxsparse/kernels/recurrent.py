"""A GRU with sparse weights, for inference: the whole loop over time is one operator.

What the gates take from the input is computed beforehand for all steps at once, by a linear layer, dense or sparse.
What they take from the state is one product of a matrix with one vector a step. That matrix is kept in tiles, which
`csrc/recurrent.h` explains; its rows, and those of the linear layer, are the three gates (reset, update, new value),
each padded to whole tiles, and within a gate in an order of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .no_gradient import without_gradient
from .operators import define

_ROWS, _COLUMNS, _PACKED, _BITS = 16, 32, 6, 5
_ops: Any = torch.ops.fxsparse


@dataclass(frozen=True)
class TiledGRU:
    """Both weights and biases of a GRU layer, as they are computed with.

    Attributes:
        input_weight: (3 * padded, inputs), of the linear layer; dense.
        input_mask: bool, of its shape.
        input_bias: (3 * padded).
        values: (steps, 16), the state's weights; 0 in lanes without one.
        runs: (runs, 3) int32: column of tiles, steps of each tile, number of tiles.
        rows: (tiles) int32: row of tiles.
        places: (words, 16) int32: six columns in the tile of 5 bits each, the first step's lowest; 0 in lanes without
            a weight. Every tile begins with a new word.
        stored: (steps) int16: a bit for each lane that has a weight.
        units: (hidden) int32: which unit of the state each row of a gate is.
        bias: (3 * padded), of the product with the state.
    """

    input_weight: Tensor
    input_mask: Tensor
    input_bias: Tensor
    values: Tensor
    runs: Tensor
    rows: Tensor
    places: Tensor
    stored: Tensor
    units: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls,
        input_weight: Tensor,
        state_weight: Tensor,
        input_mask: Tensor,
        state_mask: Tensor,
        input_bias: Tensor | None = None,
        state_bias: Tensor | None = None,
    ) -> "TiledGRU":
        """Of the weights of `nn.GRU`: (3 * hidden, inputs) and (3 * hidden, hidden), masks of their shapes, biases."""
        hidden = state_weight.shape[1]
        units = _order(state_mask.reshape(3, hidden, hidden))

        def gates(given: Tensor | None) -> Tensor:
            """Rows of the three gates in their order, padded."""
            if given is None:
                return gates(input_weight.new_zeros(3 * hidden))
            parts = given.detach().reshape(3, hidden, *given.shape[1:])[:, units]
            padding = parts.new_zeros(3, -hidden % _ROWS, *given.shape[1:])
            return torch.cat([parts, padding], 1).flatten(0, 1)

        return cls(
            gates(input_weight * input_mask),
            gates(input_mask),
            gates(input_bias),
            *_tiled(gates(state_weight), gates(state_mask)),
            units.int(),
            gates(state_bias),
        )

    @property
    def tiles(self) -> list[Tensor]:
        """What the operator takes beside values and bias."""
        return [self.runs, self.rows, self.places, self.stored, self.units]


def _order(mask: Tensor) -> Tensor:
    """The units, those side by side that have as many weights as one another in each column of tiles.

    Of a mask (3, units, units). A tile has as many steps as its fullest row has weights, so rows that differ leave
    lanes empty. Greedy: each tile begins with the fullest unit left, and takes those that lengthen it least.
    """
    whole = torch.nn.functional.pad(mask.detach(), (0, -mask.shape[2] % _COLUMNS))
    counts = whole.unflatten(2, (-1, _COLUMNS)).sum(3).transpose(0, 1).flatten(1).float()  # (units, tiles)
    total = counts.sum(1)
    left = torch.arange(len(counts))
    order: list[int] = []
    while len(left):
        if len(order) % _ROWS == 0:
            best, fullest = total[left].argmax(), counts.new_zeros(counts.shape[1])
        else:
            longer = (counts[left] - fullest).clamp_(min=0).sum(1)
            best = (longer * (total.max() + 1) - total[left]).argmin()
        order.append(int(left[best]))
        fullest = torch.maximum(fullest, counts[left[best]])
        left = torch.cat([left[:best], left[best + 1 :]])
    return torch.tensor(order, dtype=torch.int64)


def _tiled(matrix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, runs, rows, places and stored. In a column of tiles those with as many steps follow one another."""
    row, column = mask.nonzero(as_tuple=True)
    high, wide = matrix.shape[0] // _ROWS, -(-matrix.shape[1] // _COLUMNS)
    slot = row * wide + column // _COLUMNS  # of one row in one tile; ascending
    counts = torch.bincount(slot, minlength=matrix.shape[0] * wide)
    within = torch.arange(len(slot)) - (counts.cumsum(0) - counts)[slot]
    steps = counts.reshape(high, _ROWS, wide).amax(1).t()  # (columns of tiles, rows of tiles)
    order = torch.argsort(steps, dim=1, stable=True)
    ordered = steps.gather(1, order).flatten()
    rank = (torch.argsort(order, dim=1) + high * torch.arange(wide)[:, None])[column // _COLUMNS, row // _ROWS]
    step = (ordered.cumsum(0) - ordered)[rank] + within
    words = -(-ordered // _PACKED)
    word = (words.cumsum(0) - words)[rank] + within // _PACKED
    values = matrix.new_zeros(int(ordered.sum()), _ROWS)
    values[step, row % _ROWS] = matrix[row, column]
    stored = torch.zeros(values.shape, dtype=torch.int32)
    stored[step, row % _ROWS] = 1
    places = torch.zeros(int(words.sum()), _ROWS, dtype=torch.int32)
    shifted = (column % _COLUMNS << _BITS * (within % _PACKED)).int()
    places.index_put_((word, row % _ROWS), shifted, accumulate=True)
    filled = ordered > 0
    tiles = torch.stack([torch.arange(wide).repeat_interleave(high), ordered], 1)[filled]
    kinds, sizes = torch.unique_consecutive(tiles, dim=0, return_counts=True)
    runs = torch.cat([kinds, sizes[:, None]], 1).int()
    lanes = (stored << torch.arange(_ROWS, dtype=torch.int32)).sum(1).to(torch.int16)
    return values, runs, order.flatten()[filled].int(), places, lanes


def untiled(values: Tensor, tiles: Sequence[Tensor]) -> Tensor:
    """The dense weight of the state again: (3 * padded, hidden), rows in the order of the tiles."""
    runs, rows, places, lanes, units = (part.long() for part in tiles)
    steps = runs[:, 1].repeat_interleave(runs[:, 2])  # of each tile
    words = -(-steps // _PACKED)
    within = torch.arange(len(values)) - (steps.cumsum(0) - steps).repeat_interleave(steps)
    word = (words.cumsum(0) - words).repeat_interleave(steps) + within // _PACKED
    place = places[word] >> (_BITS * (within % _PACKED))[:, None] & (_COLUMNS - 1)
    row = rows.repeat_interleave(steps)[:, None] * _ROWS + torch.arange(_ROWS)
    column = runs[:, 0].repeat_interleave(runs[:, 1] * runs[:, 2])[:, None] * _COLUMNS + place
    stored = lanes[:, None] >> torch.arange(_ROWS) & 1 == 1
    hidden = len(units)
    matrix = values.new_zeros(3 * (hidden + -hidden % _ROWS), hidden)
    matrix[row[stored], column[stored]] = values[stored]
    return matrix


@define(
    "sparse_gru(Tensor x, Tensor h, Tensor values, Tensor[] tiles, Tensor bias) -> (Tensor, Tensor)", in_kernels=True
)
def _sparse_gru(x, h, values, tiles, bias):
    """Where the C++ kernels could not be built."""
    if x.shape[1] == 0:
        raise RuntimeError("a sequence has at least one step")
    weight, units = untiled(values, tiles), tiles[4].long()
    states = []
    for from_input in x.unbind(1):
        of_input, of_state = (
            part.unflatten(1, (3, -1))[:, :, : len(units)].unbind(1)
            for part in (from_input, torch.addmm(bias, h, weight.t()))
        )
        reset, update = (torch.sigmoid(of_input[i] + of_state[i]) for i in (0, 1))
        fresh = torch.tanh(of_input[2] + reset * of_state[2])
        h = torch.empty_like(h).index_copy_(1, units, fresh + update * (h[:, units] - fresh))
        states.append(h)
    return torch.stack(states, 1), h.clone()


@torch.library.register_fake("fxsparse::sparse_gru")
def _(x, h, values, tiles, bias):
    return x.new_empty((x.shape[0], x.shape[1], h.shape[1])), torch.empty_like(h, memory_format=torch.contiguous_format)


def lowered_gru(
    from_input: Tensor, h: Tensor, values: Tensor, tiles: list[Tensor], bias: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """`torch.gru` of one layer and direction, given what its gates take from the input; for inference.

    Args:
        from_input: (time, batch, 3 * padded), or with `batch_first` (batch, time, 3 * padded): the result of the linear
            layer of `TiledGRU`; float32 or float64.
        h: (1, batch, hidden), the first state.
        values, tiles, bias: as of `TiledGRU`.

    Returns:
        The states, (time, batch, hidden) or (batch, time, hidden), and the last one, (1, batch, hidden).
    """
    x = from_input if batch_first else from_input.transpose(0, 1)
    inputs = (x, h, values, bias)
    states, last = (without_gradient(y, *inputs) for y in _ops.sparse_gru(x, h[0], values, tiles, bias))
    return (states if batch_first else states.transpose(0, 1)), last[None]
