"""Networks that take images (N, 3, 12, 12)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .net import Net, conv, head, pooled


def _chunk_both(m: Net, x: Tensor) -> Tensor:
    a, b = m.norm(m.conv(x)).relu().chunk(2, dim=1)
    return m.head(pooled(torch.cat((m.left(a), m.right(b)), 1)))


def _equal_split(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).relu().split(4, dim=1)
    return m.head(pooled(m.left(a) * m.right(b).sigmoid()))


def _uneven_split(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).relu().split([3, 5], dim=1)
    return m.head(pooled(m.left(a) + m.right(b)))


def _shuffle(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    a, b = x.chunk(2, 1)
    return m.head(pooled(m.next(torch.cat((a, m.left(b)), 1))))


def _channels_last(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).permute(0, 2, 3, 1)
    return m.head(m.second(m.first(x).relu()).mean((1, 2)))


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
    return m.head(pooled(m.next(m.depthwise(m.conv(x).relu()).relu())))


def _glu(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(F.glu(m.conv(x), 1))))


def _pixel_shuffle(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(F.pixel_shuffle(m.conv(x), 2).relu())))


def _first_four(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    return m.head(pooled(m.left(x[:, :4]) + m.right(x)))


def _functional(m: Net, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.kernel, m.shift, padding=1).relu()
    return F.linear(pooled(x) * m.scale, m.readout)


def _weight_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.normed(m.conv(x).relu()).relu())))


def _residual_on_input(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(x + m.back(m.conv(x).relu()))))


def _residual(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    x = x + m.second(m.first(x).relu())
    return m.head(pooled(x.relu()))


def _unet(m: Net, x: Tensor) -> Tensor:
    top = m.down(x).relu()
    low = m.low(F.max_pool2d(top, 2)).relu()
    up = m.up(low)
    return pooled(m.out(m.join(torch.cat((top, up, F.interpolate(low, scale_factor=2.0)), 1)).relu()))


def _grouped_transpose(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.up(m.conv(x).relu()).relu())))


def _grouped(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.norm(m.grouped(m.conv(x).relu())).relu()))


def _cascade(m: Net, x: Tensor) -> Tensor:
    a, b, c = m.one(x), m.two(x), m.three(x)
    left, right = torch.cat((a, b, c), 1).relu().split([7, 5], 1)
    again = torch.cat((right, m.mid(left), a), 1)
    first, rest = again[:, :6], again[:, 6:]
    return m.head(pooled(torch.cat((m.left(first), rest), 1)))


def _cat_batch(m: Net, x: Tensor) -> Tensor:
    both = torch.cat((m.left(x), m.right(x)), 0).relu()
    a, b = m.next(both).chunk(2, 0)
    return m.head(pooled(a) - pooled(b))


def _cat_space(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(torch.cat((m.left(x), m.right(x).relu()), 3)).relu()))


def _group_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.norm(torch.cat((m.left(x), m.right(x)), 1)).relu()).relu()))


def _two_resolutions(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    return m.head(pooled(m.shared(x).relu()) + pooled(m.shared(F.avg_pool2d(x, 2)).relu()))


def _gate(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.conv(x)).relu()
    gate = m.expand(m.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
    spatial = m.spatial(x).sigmoid()
    return m.head(pooled(x * gate * spatial))


def _channel_mean(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(pooled(m.next(x - x.mean(1, keepdim=True)).relu()))


def _layer_scale(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(pooled(x + m.gamma * m.second(m.first(x).relu())))


def _padded_shortcut(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    y = m.second(m.first(x).relu())
    return m.head(pooled((y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()))


def _unknown(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).relu()
    return m.head(pooled(m.next(x) + torch.cdist(x, x).mean((1, 2, 3))[:, None, None, None]))


def _in_sequence(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.body(x)))


def _image_tokens(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).flatten(2).transpose(1, 2)
    x = torch.cat((m.token.expand(x.shape[0], -1, -1), x), 1) + m.position
    x = x + m.second(F.gelu(m.first(m.norm(x))))
    return m.head(x[:, 0])


def _unbind(m: Net, x: Tensor) -> Tensor:
    a, b, c = m.conv(x).unflatten(1, (3, 4)).unbind(1)
    return m.head(pooled(m.next(a * b + c)))


def _roll(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).relu()
    return m.head(pooled(m.next(x.roll(3, 1) + m.other(x))))


IMAGE_NETS: dict[str, Callable[[], Net]] = {
    "chunk, both used": lambda: Net(
        _chunk_both, conv=conv(3, 8), norm=nn.BatchNorm2d(8), left=conv(4, 4), right=conv(4, 6), head=head(10)
    ),
    "equal split": lambda: Net(_equal_split, conv=conv(3, 8), left=conv(4, 6), right=conv(4, 6), head=head(6)),
    "split([3, 5])": lambda: Net(_uneven_split, conv=conv(3, 8), left=conv(3, 6), right=conv(5, 6), head=head(6)),
    "channel shuffle": lambda: Net(
        _shuffle, conv=conv(3, 8), norm=nn.BatchNorm2d(8), left=conv(4, 6), next=conv(10, 6), head=head(6)
    ),
    "channels last": lambda: Net(
        _channels_last, conv=conv(3, 8), first=nn.Linear(8, 12), second=nn.Linear(12, 6), head=head(6)
    ),
    "cat of two flattens": lambda: Net(_two_flattens, left=conv(3, 6), right=conv(3, 5), head=head(6 * 4 + 5 * 9)),
    "baked view": lambda: Net(_baked_view, conv=conv(3, 8), hidden=nn.Linear(128, 10), head=head(10)),
    "computed view": lambda: Net(_computed_view, conv=conv(3, 6), head=head(6 * 144)),
    "depthwise multiplier 2": lambda: Net(
        _multiplier, conv=conv(3, 6), depthwise=conv(6, 12, groups=6), next=conv(12, 6), head=head(6)
    ),
    "GLU": lambda: Net(_glu, conv=conv(3, 12), next=conv(6, 8), head=head(8)),
    "pixel shuffle": lambda: Net(_pixel_shuffle, conv=conv(3, 24), next=conv(6, 8), head=head(8)),
    "x[:, :4]": lambda: Net(
        _first_four, conv=conv(3, 8), norm=nn.BatchNorm2d(8), left=conv(4, 6), right=conv(8, 6), head=head(6)
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
        conv=conv(3, 8),
        normed=nn.utils.parametrizations.weight_norm(conv(8, 8)),
        next=conv(8, 6),
        head=head(6),
    ),
    "residual onto the input": lambda: Net(
        _residual_on_input, conv=conv(3, 8), back=conv(8, 3), next=conv(3, 8), head=head(8)
    ),
    "residual": lambda: Net(
        _residual, stem=conv(3, 8), norm=nn.BatchNorm2d(8), first=conv(8, 6), second=conv(6, 8), head=head(8)
    ),
    "U-Net": lambda: Net(
        _unet,
        down=conv(3, 6),
        low=conv(6, 8),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        join=conv(20, 8),
        out=conv(8, 4),
    ),
    "grouped transposed convolution": lambda: Net(
        _grouped_transpose,
        conv=conv(3, 12),
        up=nn.ConvTranspose2d(12, 9, 3, 2, 1, groups=3),
        next=conv(9, 6),
        head=head(6),
    ),
    "grouped convolution": lambda: Net(
        _grouped, conv=conv(3, 12), grouped=conv(12, 8, groups=4), norm=nn.BatchNorm2d(8), head=head(8)
    ),
    "cat, split, cat": lambda: Net(
        _cascade, one=conv(3, 4), two=conv(3, 5), three=conv(3, 3), mid=conv(7, 4), left=conv(6, 6), head=head(13)
    ),
    "cat along the batch": lambda: Net(_cat_batch, left=conv(3, 6), right=conv(3, 6), next=conv(6, 8), head=head(8)),
    "cat along space": lambda: Net(_cat_space, left=conv(3, 6), right=conv(3, 6), next=conv(6, 8), head=head(8)),
    "GroupNorm after cat": lambda: Net(
        _group_norm, left=conv(3, 6), right=conv(3, 6), norm=nn.GroupNorm(3, 12), next=conv(12, 8), head=head(8)
    ),
    "conv at two resolutions": lambda: Net(_two_resolutions, stem=conv(3, 6), shared=conv(6, 8), head=head(8)),
    "gates": lambda: Net(
        _gate,
        conv=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        squeeze=conv(8, 4, 1),
        expand=conv(4, 8, 1),
        spatial=conv(8, 1),
        head=head(8),
    ),
    "channel mean": lambda: Net(_channel_mean, conv=conv(3, 8), next=conv(8, 6), head=head(6)),
    "layer scale": lambda: Net(
        _layer_scale,
        stem=conv(3, 8),
        first=conv(8, 6),
        second=conv(6, 8),
        gamma=nn.Parameter(torch.rand(8, 1, 1) + 0.5),
        head=head(8),
    ),
    "padded shortcut": lambda: Net(
        _padded_shortcut, stem=conv(3, 4), first=conv(4, 6, stride=2), second=conv(6, 8), head=head(8)
    ),
    "unknown operation": lambda: Net(_unknown, conv=conv(3, 8), next=conv(8, 6), head=head(6)),
    "sequential": lambda: Net(
        _in_sequence,
        body=nn.Sequential(
            conv(3, 8),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
            conv(8, 6),
            nn.InstanceNorm2d(6, affine=True),
            nn.ELU(),
        ),
        head=head(6),
    ),
    "image tokens": lambda: Net(
        _image_tokens,
        conv=nn.Conv2d(3, 8, 4, 4),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        position=nn.Parameter(torch.randn(1, 10, 8)),
        norm=nn.LayerNorm(8),
        first=nn.Linear(8, 12),
        second=nn.Linear(12, 8),
        head=head(8),
    ),
    "unbind": lambda: Net(_unbind, conv=conv(3, 12), next=conv(4, 6), head=head(6)),
    "roll": lambda: Net(_roll, conv=conv(3, 8), other=conv(8, 8), next=conv(8, 6), head=head(6)),
}
