"""Networks that take sequences (N, 7, 16)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .net import Net, head


def _tied_linear(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    return m.head(m.shared(m.shared(x).relu()))


def _tied_transposed(m: Net, x: Tensor) -> Tensor:
    code = F.linear(x, m.kernel).relu()
    return m.head(F.linear(code, m.kernel.t()))


def _attention(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    n, t, _ = x.shape
    q, k, v = m.qkv(x).view(n, t, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(5)).softmax(-1)
    return m.head(x + m.out((weights @ v).transpose(1, 2).reshape(n, t, 20))).mean(1)


def _fused_attention(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, -1, 5).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return m.head(m.out(y.transpose(1, 2).flatten(2))).mean(1)


def _grouped_queries(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, -1, 5).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.head(m.out(y.transpose(1, 2).reshape(n, t, -1))).mean(1)


def _repeated_keys(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, -1, 5).transpose(1, 2) for layer in (m.q, m.k, m.v))
    k = k[:, :, None].expand(n, 2, 3, t, 5).reshape(n, 6, t, 5)
    y = F.scaled_dot_product_attention(q, k, v.repeat_interleave(3, 1), is_causal=True)
    return m.head(m.out(y.transpose(1, 2).reshape(n, t, -1))).mean(1)


def _rotary(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, -1, 6).transpose(1, 2) for layer in (m.q, m.k, m.v))
    turned = [y * m.cos + torch.cat((-y[..., 3:], y[..., :3]), -1) * m.sin for y in (q, k)]
    y = F.scaled_dot_product_attention(*turned, v)
    return m.head(m.out(y.transpose(1, 2).reshape(n, t, -1))).mean(1)


def _hidden_attention(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(m.second(m.first(x + m.attention(x, x, x)[0]).relu())).mean(1)


def _prenorm(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.second(F.gelu(m.first(m.norm(x))))
    return m.head(x).mean(1)


def _time_conv(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x.transpose(1, 2))
    return m.head(m.next(m.slope(y)).mean(2))


def _parameter_product(m: Net, x: Tensor) -> Tensor:
    return m.head((m.stem(x).relu() @ m.matrix).tanh()).mean(1)


def _attention_layers(heads: int, keys: int, size: int) -> dict[str, nn.Module]:
    return {
        "q": nn.Linear(16, heads * size),
        "k": nn.Linear(16, keys * size),
        "v": nn.Linear(16, keys * size),
        "out": nn.Linear(heads * size, 12),
        "head": head(12),
    }


def _with_buffers(net: Net, **buffers: Tensor) -> Net:
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    return net


SEQUENCE_NETS: dict[str, Callable[[], Net]] = {
    "tied linear": lambda: Net(_tied_linear, stem=nn.Linear(16, 8), shared=nn.Linear(8, 8), head=head(8)),
    "tied and transposed": lambda: Net(_tied_transposed, kernel=nn.Parameter(torch.randn(6, 16) / 4), head=head(16)),
    "attention": lambda: Net(
        _attention, stem=nn.Linear(16, 12), qkv=nn.Linear(12, 60), out=nn.Linear(20, 12), head=head(12)
    ),
    "fused attention": lambda: Net(_fused_attention, **_attention_layers(4, 4, 5)),
    "grouped queries": lambda: Net(_grouped_queries, **_attention_layers(6, 2, 5)),
    "repeated keys": lambda: Net(_repeated_keys, **_attention_layers(6, 2, 5)),
    "rotary embedding": lambda: _with_buffers(
        Net(_rotary, **_attention_layers(4, 4, 6)), cos=torch.rand(1, 1, 7, 6), sin=torch.rand(1, 1, 7, 6)
    ),
    "nn.MultiheadAttention": lambda: Net(
        _hidden_attention,
        stem=nn.Linear(16, 12),
        attention=nn.MultiheadAttention(12, 3, batch_first=True),
        first=nn.Linear(12, 10),
        second=nn.Linear(10, 6),
        head=head(6),
    ),
    "pre-norm": lambda: Net(
        _prenorm,
        stem=nn.Linear(16, 8),
        norm=nn.LayerNorm(8),
        first=nn.Linear(8, 12),
        second=nn.Linear(12, 8),
        head=head(8),
    ),
    "convolution over time": lambda: Net(
        _time_conv, conv=nn.Conv1d(16, 8, 3), slope=nn.PReLU(8), next=nn.Conv1d(8, 6, 2), head=head(6)
    ),
    "matrix product with a parameter": lambda: Net(
        _parameter_product, stem=nn.Linear(16, 8), matrix=nn.Parameter(torch.randn(8, 6) / 3), head=head(6)
    ),
}
