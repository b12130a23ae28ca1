"""The paper's character-level language model (section 4.2): one GRU between an embedding and a readout.

The GRU is written out with `nn.Linear`s and a Python loop over time, so that every operation is in the graph, which is
unrolled for the length of its example. `unrolled=False` has `nn.GRU` in its place, which is masked as well, as one call
for all steps, and is what runs fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .widths import scaled


class GRULayer(nn.Module):
    """One-layer GRU over (B, T, inputs), equal to `nn.GRU(inputs, hidden, batch_first=True)`.

    `input_to_hidden` and `hidden_to_hidden` hold `weight_ih_l0`, `bias_ih_l0`, `weight_hh_l0` and
    `bias_hh_l0` as they are: three gates (reset, update, new) of `hidden` rows each.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_to_hidden = nn.Linear(inputs, 3 * hidden)
        self.hidden_to_hidden = nn.Linear(hidden, 3 * hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, inputs) and the state (B, hidden) to the states (B, T, hidden) and the last one."""
        from_input = self.input_to_hidden(x)
        states = []
        for t in range(x.shape[1]):
            reset_x, update_x, new_x = from_input[:, t].chunk(3, dim=-1)
            reset_h, update_h, new_h = self.hidden_to_hidden(state).chunk(3, dim=-1)
            reset = torch.sigmoid(reset_x + reset_h)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + reset * new_h)
            state = new + update * (state - new)
            states.append(state)
        return torch.stack(states, dim=1), state


class WholeGRU(nn.Module):
    """A `GRULayer`'s weights in `nn.GRU`, with the interface of `GRULayer`."""

    def __init__(self, layer: GRULayer) -> None:
        super().__init__()
        self.hidden = layer.hidden
        with torch.random.fork_rng(
            devices=[]
        ):  # the layers after it draw the numbers that they draw beside a `GRULayer`
            self.gru = nn.GRU(layer.input_to_hidden.in_features, layer.hidden, batch_first=True)
        with torch.no_grad():
            for own, linear in (("ih", layer.input_to_hidden), ("hh", layer.hidden_to_hidden)):
                getattr(self.gru, f"weight_{own}_l0").copy_(linear.weight)
                getattr(self.gru, f"bias_{own}_l0").copy_(linear.bias)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As of `GRULayer`."""
        states, last = self.gru(x, state[None])
        return states, last[0]


class CharGRU(nn.Module):
    """Next-character model: tokens (B, T) int64 to logits (B, T, num_classes) and the last GRU state.

    `num_classes` is the size of the vocabulary. `width` scales the embedding (128), the GRU (512) and the
    two readout layers (256, 128). The paper calls its embedding shared; `tie_embedding=True` makes the
    output layer's weight the embedding's. `unrolled=False` runs the same weights by `nn.GRU`, under its names for them.
    Returns the state (B, hidden) to carry to the next stretch of text.
    """

    def __init__(
        self, num_classes: int = 256, width: float = 1.0, tie_embedding: bool = False, unrolled: bool = True
    ) -> None:
        super().__init__()
        embedding, hidden, readout = scaled(128, width), scaled(512, width), scaled(256, width)
        self.embedding = nn.Embedding(num_classes, embedding)
        layer = GRULayer(embedding, hidden)
        self.gru = layer if unrolled else WholeGRU(layer)
        self.readout1 = nn.Linear(hidden, readout)
        self.readout2 = nn.Linear(readout, embedding)
        self.output = nn.Linear(embedding, num_classes)
        if tie_embedding:
            # Keep the linear layer's values: with the embedding's unit variance the first logits are huge.
            self.embedding.weight = self.output.weight

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        if state is None:
            state = x.new_zeros(x.shape[0], self.gru.hidden)
        x, state = self.gru(x, state)
        x = F.relu(self.readout1(x))
        x = F.relu(self.readout2(x))
        return self.output(x), state


def char_gru(num_classes: int = 256, width: float = 1.0, tie_embedding: bool = False, unrolled: bool = True) -> CharGRU:
    """The paper's GRU: 1,179,648 linear weights in 5 tensors, beside the embedding's 32,768."""
    return CharGRU(num_classes, width, tie_embedding, unrolled)
