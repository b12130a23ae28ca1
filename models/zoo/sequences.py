"""Recurrent and attention networks, with PyTorch's own modules and written out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..char_gru import CharGRU
from .case import ZooCase, integers, normal


class ModuleGRU(nn.Module):
    """A character model with `nn.GRU`, which takes its weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.gru = nn.GRU(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, state = self.gru(self.embedding(tokens), state)
        return self.head(x), state


class ModuleLSTM(nn.Module):
    """A bidirectional `nn.LSTM`, which returns a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 12)

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, (hidden, cell) = self.lstm(self.embedding(tokens))
        return self.head(x), (hidden, cell)


def unrolled_gru() -> nn.Module:
    """The paper's GRU in miniature: a loop over time, with one weight that has a use in every step."""
    return CharGRU(num_classes=12, width=1 / 32)


class CellLoop(nn.Module):
    """`nn.GRUCell` called in a Python loop: weights with several uses."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for frame in x.unbind(1):
            state = self.cell(frame, state)
        return self.head(state)


class TransformerLayer(nn.Module):
    """`nn.TransformerEncoderLayer` under a mask.

    In eval mode without gradients it takes a fused path that reads the weights by another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.layer(x, src_mask=causal, is_causal=True))


class Attention(nn.Module):
    """`nn.MultiheadAttention`: a raw in-projection, and an out-projection that is a Linear never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(x, x, x)
        return self.head(x + mixed), weights


class DecoderLayer(nn.Module):
    """`nn.TransformerDecoderLayer`: attention to something else, which cuts its packed weight into two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.layer(x, memory))


class OwnAttention(nn.Module):
    """Attention written out with linear layers, dropout inside the fused kernel, and a rotary table."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.register_buffer("rotation", torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.1]))

    def split(self, x: Tensor) -> Tensor:
        """(B, T, 8) to (B, heads, T, 4)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def rotate(self, x: Tensor) -> Tensor:
        angle = self.rotation[: x.shape[-2]]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()), -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.rotate(self.split(self.query(x))), self.rotate(self.split(self.key(x)))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            self.split(self.value(x)),
            dropout_p=0.1 if self.training else 0.0,
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


TOKENS = integers(12, 2, 5)
SEQUENCE = normal(2, 5, 8)

CASES = {
    "module_gru": ZooCase(ModuleGRU, TOKENS, sites=5),
    "module_lstm": ZooCase(ModuleLSTM, TOKENS, sites=5),
    "unrolled_gru": ZooCase(unrolled_gru, TOKENS, sites=5),
    "cell_loop": ZooCase(CellLoop, SEQUENCE, sites=3),
    "transformer_layer": ZooCase(TransformerLayer, SEQUENCE, sites=5),
    "attention": ZooCase(Attention, SEQUENCE, sites=3),
    "decoder_layer": ZooCase(DecoderLayer, lambda: (SEQUENCE(), normal(2, 7, 8, seed=1)()), dropout=True, sites=7),
    "own_attention": ZooCase(OwnAttention, SEQUENCE, dropout=True, sites=4),
}
