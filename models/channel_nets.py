"""Small networks that are each hard to shrink for one reason, which the name gives.

`CHANNEL_NETS` maps a name to a function that makes the network; all but those of `SEQUENCE_NETS` take images
(N, 3, 12, 12), the others sequences (N, 7, 16).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name, and a function that uses them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def _head(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 5)


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _chunk_both(m: Net, x: Tensor) -> Tensor:
    a, b = m.norm(m.conv(x)).relu().chunk(2, dim=1)
    return m.head(_pooled(torch.cat((m.left(a), m.right(b)), 1)))


def _equal_split(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).relu().split(4, dim=1)
    return m.head(_pooled(m.left(a) * m.right(b).sigmoid()))


def _uneven_split(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).relu().split([3, 5], dim=1)
    return m.head(_pooled(m.left(a) + m.right(b)))


def _shuffle(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    a, b = x.chunk(2, 1)
    return m.head(_pooled(m.next(torch.cat((a, m.left(b)), 1))))


def _channels_last(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).permute(0, 2, 3, 1)
    return m.head(m.second(m.first(x).relu()).mean((1, 2)))


def _tied_linear(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    return m.head(m.shared(m.shared(x).relu()))


def _tied_transposed(m: Net, x: Tensor) -> Tensor:
    code = F.linear(x, m.kernel).relu()
    return m.head(F.linear(code, m.kernel.t()))


def _two_flattens(m: Net, x: Tensor) -> Tensor:
    a = F.adaptive_avg_pool2d(m.left(x), 2).flatten(1)
    b = F.adaptive_avg_pool2d(m.right(x).relu(), 3).flatten(1)
    return m.head(torch.cat((a, b), 1))


def _baked_view(m: Net, x: Tensor) -> Tensor:
    x = F.adaptive_max_pool2d(m.conv(x), 4).view(-1, 8 * 4 * 4)
    return m.head(m.hidden(x).relu())


def _computed_view(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).relu()
    return m.head(x.reshape(x.size(0), x.size(1) * x.size(2) * x.size(3)))


def _multiplier(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(m.depthwise(m.conv(x).relu()).relu())))


def _glu(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(F.glu(m.conv(x), 1))))


def _pixel_shuffle(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(F.pixel_shuffle(m.conv(x), 2).relu())))


def _first_four(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    return m.head(_pooled(m.left(x[:, :4]) + m.right(x)))


def _functional(m: Net, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.kernel, m.shift, padding=1).relu()
    return F.linear(_pooled(x) * m.scale, m.readout)


def _weight_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(m.normed(m.conv(x).relu()).relu())))


def _residual_on_input(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(x + m.back(m.conv(x).relu()))))


def _residual(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    x = x + m.second(m.first(x).relu())
    return m.head(_pooled(x.relu()))


def _unet(m: Net, x: Tensor) -> Tensor:
    top = m.down(x).relu()
    low = m.low(F.max_pool2d(top, 2)).relu()
    up = m.up(low)
    return _pooled(m.out(m.join(torch.cat((top, up, F.interpolate(low, scale_factor=2.0)), 1)).relu()))


def _grouped_transpose(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(m.up(m.conv(x).relu()).relu())))


def _grouped(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.norm(m.grouped(m.conv(x).relu())).relu()))


def _cascade(m: Net, x: Tensor) -> Tensor:
    a, b, c = m.one(x), m.two(x), m.three(x)
    left, right = torch.cat((a, b, c), 1).relu().split([7, 5], 1)
    again = torch.cat((right, m.mid(left), a), 1)
    first, rest = again[:, :6], again[:, 6:]
    return m.head(_pooled(torch.cat((m.left(first), rest), 1)))


def _cat_batch(m: Net, x: Tensor) -> Tensor:
    both = torch.cat((m.left(x), m.right(x)), 0).relu()
    a, b = m.next(both).chunk(2, 0)
    return m.head(_pooled(a) - _pooled(b))


def _cat_space(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(torch.cat((m.left(x), m.right(x).relu()), 3)).relu()))


def _group_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.next(m.norm(torch.cat((m.left(x), m.right(x)), 1)).relu()).relu()))


def _two_resolutions(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    return m.head(_pooled(m.shared(x).relu()) + _pooled(m.shared(F.avg_pool2d(x, 2)).relu()))


def _gate(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    gate = m.expand(m.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
    spatial = m.spatial(x).sigmoid()
    return m.head(_pooled(x * gate * spatial))


def _channel_mean(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(_pooled(m.next(x - x.mean(1, keepdim=True)).relu()))


def _layer_scale(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(_pooled(x + m.gamma * m.second(m.first(x).relu())))


def _padded_shortcut(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    y = m.second(m.first(x).relu())
    return m.head(_pooled((y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()))


def _unknown(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).relu()
    return m.head(_pooled(m.next(x) + torch.cdist(x, x).mean((1, 2, 3))[:, None, None, None]))


def _in_sequence(m: Net, x: Tensor) -> Tensor:
    return m.head(_pooled(m.body(x)))


def _image_tokens(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).flatten(2).transpose(1, 2)
    x = torch.cat((m.token.expand(x.shape[0], -1, -1), x), 1) + m.position
    x = x + m.second(F.gelu(m.first(m.norm(x))))
    return m.head(x[:, 0])


def _unbind(m: Net, x: Tensor) -> Tensor:
    a, b, c = m.conv(x).unflatten(1, (3, 4)).unbind(1)
    return m.head(_pooled(m.next(a * b + c)))


def _roll(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).relu()
    return m.head(_pooled(m.next(x.roll(3, 1) + m.other(x))))


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
        "head": _head(12),
    }


def _with_buffers(net: Net, **buffers: Tensor) -> Net:
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    return net


IMAGE_NETS: dict[str, Callable[[], Net]] = {
    "chunk, both used": lambda: Net(
        _chunk_both, conv=_conv(3, 8), norm=nn.BatchNorm2d(8), left=_conv(4, 4), right=_conv(4, 6), head=_head(10)
    ),
    "equal split": lambda: Net(_equal_split, conv=_conv(3, 8), left=_conv(4, 6), right=_conv(4, 6), head=_head(6)),
    "split([3, 5])": lambda: Net(_uneven_split, conv=_conv(3, 8), left=_conv(3, 6), right=_conv(5, 6), head=_head(6)),
    "channel shuffle": lambda: Net(
        _shuffle, conv=_conv(3, 8), norm=nn.BatchNorm2d(8), left=_conv(4, 6), next=_conv(10, 6), head=_head(6)
    ),
    "channels last": lambda: Net(
        _channels_last, conv=_conv(3, 8), first=nn.Linear(8, 12), second=nn.Linear(12, 6), head=_head(6)
    ),
    "cat of two flattens": lambda: Net(_two_flattens, left=_conv(3, 6), right=_conv(3, 5), head=_head(6 * 4 + 5 * 9)),
    "baked view": lambda: Net(_baked_view, conv=_conv(3, 8), hidden=nn.Linear(128, 10), head=_head(10)),
    "computed view": lambda: Net(_computed_view, conv=_conv(3, 6), head=_head(6 * 144)),
    "depthwise multiplier 2": lambda: Net(
        _multiplier, conv=_conv(3, 6), depthwise=_conv(6, 12, groups=6), next=_conv(12, 6), head=_head(6)
    ),
    "GLU": lambda: Net(_glu, conv=_conv(3, 12), next=_conv(6, 8), head=_head(8)),
    "pixel shuffle": lambda: Net(_pixel_shuffle, conv=_conv(3, 24), next=_conv(6, 8), head=_head(8)),
    "x[:, :4]": lambda: Net(
        _first_four, conv=_conv(3, 8), norm=nn.BatchNorm2d(8), left=_conv(4, 6), right=_conv(8, 6), head=_head(6)
    ),
    "functional convs": lambda: Net(
        _functional,
        kernel=nn.Parameter(torch.randn(8, 3, 3, 3) / 4),
        shift=nn.Parameter(torch.randn(8)),
        scale=nn.Parameter(torch.rand(8) + 0.5),
        readout=nn.Parameter(torch.randn(5, 8)),
    ),
    "weight norm": lambda: Net(
        _weight_norm,
        conv=_conv(3, 8),
        normed=nn.utils.parametrizations.weight_norm(_conv(8, 8)),
        next=_conv(8, 6),
        head=_head(6),
    ),
    "residual onto the input": lambda: Net(
        _residual_on_input, conv=_conv(3, 8), back=_conv(8, 3), next=_conv(3, 8), head=_head(8)
    ),
    "residual": lambda: Net(
        _residual, stem=_conv(3, 8), norm=nn.BatchNorm2d(8), first=_conv(8, 6), second=_conv(6, 8), head=_head(8)
    ),
    "U-Net": lambda: Net(
        _unet,
        down=_conv(3, 6),
        low=_conv(6, 8),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        join=_conv(20, 8),
        out=_conv(8, 4),
    ),
    "grouped transposed convolution": lambda: Net(
        _grouped_transpose,
        conv=_conv(3, 12),
        up=nn.ConvTranspose2d(12, 9, 3, 2, 1, groups=3),
        next=_conv(9, 6),
        head=_head(6),
    ),
    "grouped convolution": lambda: Net(
        _grouped, conv=_conv(3, 12), grouped=_conv(12, 8, groups=4), norm=nn.BatchNorm2d(8), head=_head(8)
    ),
    "cat, split, cat": lambda: Net(
        _cascade, one=_conv(3, 4), two=_conv(3, 5), three=_conv(3, 3), mid=_conv(7, 4), left=_conv(6, 6), head=_head(13)
    ),
    "cat along the batch": lambda: Net(
        _cat_batch, left=_conv(3, 6), right=_conv(3, 6), next=_conv(6, 8), head=_head(8)
    ),
    "cat along space": lambda: Net(_cat_space, left=_conv(3, 6), right=_conv(3, 6), next=_conv(6, 8), head=_head(8)),
    "GroupNorm after cat": lambda: Net(
        _group_norm, left=_conv(3, 6), right=_conv(3, 6), norm=nn.GroupNorm(3, 12), next=_conv(12, 8), head=_head(8)
    ),
    "conv at two resolutions": lambda: Net(_two_resolutions, stem=_conv(3, 6), shared=_conv(6, 8), head=_head(8)),
    "gates": lambda: Net(
        _gate,
        conv=_conv(3, 8),
        norm=nn.BatchNorm2d(8),
        squeeze=_conv(8, 4, 1),
        expand=_conv(4, 8, 1),
        spatial=_conv(8, 1),
        head=_head(8),
    ),
    "channel mean": lambda: Net(_channel_mean, conv=_conv(3, 8), next=_conv(8, 6), head=_head(6)),
    "layer scale": lambda: Net(
        _layer_scale,
        stem=_conv(3, 8),
        first=_conv(8, 6),
        second=_conv(6, 8),
        gamma=nn.Parameter(torch.rand(8, 1, 1) + 0.5),
        head=_head(8),
    ),
    "padded shortcut": lambda: Net(
        _padded_shortcut, stem=_conv(3, 4), first=_conv(4, 6, stride=2), second=_conv(6, 8), head=_head(8)
    ),
    "unknown operation": lambda: Net(_unknown, conv=_conv(3, 8), next=_conv(8, 6), head=_head(6)),
    "sequential": lambda: Net(
        _in_sequence,
        body=nn.Sequential(
            _conv(3, 8),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
            _conv(8, 6),
            nn.InstanceNorm2d(6, affine=True),
            nn.ELU(),
        ),
        head=_head(6),
    ),
    "image tokens": lambda: Net(
        _image_tokens,
        conv=nn.Conv2d(3, 8, 4, 4),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        position=nn.Parameter(torch.randn(1, 10, 8)),
        norm=nn.LayerNorm(8),
        first=nn.Linear(8, 12),
        second=nn.Linear(12, 8),
        head=_head(8),
    ),
    "unbind": lambda: Net(_unbind, conv=_conv(3, 12), next=_conv(4, 6), head=_head(6)),
    "roll": lambda: Net(_roll, conv=_conv(3, 8), other=_conv(8, 8), next=_conv(8, 6), head=_head(6)),
}

SEQUENCE_NETS: dict[str, Callable[[], Net]] = {
    "tied linear": lambda: Net(_tied_linear, stem=nn.Linear(16, 8), shared=nn.Linear(8, 8), head=_head(8)),
    "tied and transposed": lambda: Net(_tied_transposed, kernel=nn.Parameter(torch.randn(6, 16) / 4), head=_head(16)),
    "attention": lambda: Net(
        _attention, stem=nn.Linear(16, 12), qkv=nn.Linear(12, 60), out=nn.Linear(20, 12), head=_head(12)
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
        head=_head(6),
    ),
    "pre-norm": lambda: Net(
        _prenorm,
        stem=nn.Linear(16, 8),
        norm=nn.LayerNorm(8),
        first=nn.Linear(8, 12),
        second=nn.Linear(12, 8),
        head=_head(8),
    ),
    "convolution over time": lambda: Net(
        _time_conv, conv=nn.Conv1d(16, 8, 3), slope=nn.PReLU(8), next=nn.Conv1d(8, 6, 2), head=_head(6)
    ),
    "matrix product with a parameter": lambda: Net(
        _parameter_product, stem=nn.Linear(16, 8), matrix=nn.Parameter(torch.randn(8, 6) / 3), head=_head(6)
    ),
}

CHANNEL_NETS: dict[str, Callable[[], Net]] = IMAGE_NETS | SEQUENCE_NETS


def example_of(name: str, batch: int = 2, seed: int = 0) -> Tensor:
    """An input for a network of `CHANNEL_NETS`."""
    shape = (3, 12, 12) if name in IMAGE_NETS else (7, 16)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
