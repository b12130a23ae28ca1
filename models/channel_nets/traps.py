"""Networks on images in which channels meet in a way that is easily got wrong: they stay, or go exactly."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .net import Net, conv, head, pooled

TRAPS: dict[str, Callable[[], Net]] = {}
"""Name -> function that makes the network."""


def _net(**layers: Callable[[], nn.Module | nn.Parameter]) -> Callable:
    """Registers a forward under its name, with functions that make its layers."""

    def register(run: Callable[[Net, Tensor], Tensor]) -> Callable:
        TRAPS[run.__name__.strip("_").replace("_", " ")] = lambda: Net(
            run, **{key: make() for key, make in layers.items()}
        )
        return run

    return register


class NeighbouringChannels(nn.Module):
    """Efficient channel attention: a gate computed by a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        return x * self.conv(y).transpose(-1, -2).unsqueeze(-1).sigmoid()


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt v2): channels are divided by the mean over all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * g / (g.mean(1, keepdim=True) + 1e-6)) + self.beta + x


class FlippedInTraining(nn.Module):
    """Reads its training flag, so it stays one call of which nothing is known."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.training else x


@_net(conv=lambda: conv(3, 8), one=lambda: conv(1, 1), next=lambda: conv(8, 6), head=lambda: head(6))
def merge_batch(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    n, c, h, w = x.shape
    return m.head(pooled(m.next(m.one(x.view(n * c, 1, h, w)).view(n, c, h, w).relu())))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def merge_batch2(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    n, c, h, w = x.shape
    return m.head(pooled(m.next(F.max_pool2d(x.reshape(-1, 1, h, w), 3, 1, 1).view(n, c, h, w).relu())))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def einsum(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(pooled(m.next(torch.einsum("nchw,nc->nchw", x, pooled(x)))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def normalize(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(F.normalize(m.conv(x), 2, 1))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def norm2(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(pooled(m.next(x / torch.norm(x, 2, 1, True))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(4, 6), head=lambda: head(6))
def topk(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x).topk(4, 1)[0])))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def sortdefault(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x).permute(0, 2, 3, 1).sort()[0].permute(0, 3, 1, 2))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def inplace_chunk(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    a, b = x[:, :4], x[:, 4:]
    a.relu_()
    b.mul_(2.0)
    return m.head(pooled(m.next(x)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def inplace_slice(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    x[:, ::2].sigmoid_()
    return m.head(pooled(m.next(x)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def setitem(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).clone()
    y = x.relu()
    x[:, 1:3] = y[:, 5:7]
    return m.head(pooled(m.next(x + y)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def iaddslice(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).clone()
    x[:, :4] += x[:, 4:] * 2
    return m.head(pooled(m.next(x)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def copyslice(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).clone()
    x[:, :4].copy_(x[:, 4:])
    return m.head(pooled(m.next(x)))


@_net(conv=lambda: conv(3, 8), bn=lambda: nn.BatchNorm2d(8), next=lambda: conv(8, 6), head=lambda: head(6))
def fbn(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(
        pooled(m.next(F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, m.training).relu()))
    )


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def sized_scale(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(pooled(m.next(x * x.shape[1] ** -0.5 + x.numel() / x.shape[0])))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def listindex(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x)[:, [0, 2, 1, 3, 5, 4, 7, 6]])))


@_net(conv=lambda: conv(3, 8), other=lambda: conv(3, 8), head=lambda: head(8))
def gram(m: Net, x: Tensor) -> Tensor:
    a = m.conv(x).flatten(2)
    b = m.other(x).flatten(2)
    return m.head((a @ b.transpose(1, 2)).mean(1))


@_net(conv=lambda: conv(3, 8), other=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def nonlocal_(m: Net, x: Tensor) -> Tensor:
    q = m.conv(x).flatten(2)
    k = m.other(x).flatten(2)
    a = (q.transpose(1, 2) @ k).softmax(-1)
    y = (k @ a.transpose(1, 2)).view_as(m.conv(x))
    return m.head(pooled(m.next(y)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def catinput(m: Net, x: Tensor) -> Tensor:
    y = torch.cat((x, m.conv(x)), 1)
    return m.head(pooled(m.next(y[:, 3:]))) + x.mean()


@_net(conv=lambda: conv(3, 8), gn=lambda: nn.GroupNorm(8, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def gn_c(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.gn(m.conv(x)))))


@_net(conv=lambda: conv(3, 8), lrn=lambda: nn.LocalResponseNorm(3), next=lambda: conv(8, 6), head=lambda: head(6))
def lrn(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.lrn(m.conv(x)))))


@_net(conv=lambda: conv(3, 8), emb=lambda: nn.Embedding(8, 6), head=lambda: head(6))
def argmax(m: Net, x: Tensor) -> Tensor:
    return m.head(m.emb(m.conv(x).mean((2, 3)).argmax(1)))


@_net(conv=lambda: conv(3, 8), emb=lambda: nn.Embedding(12, 6), head=lambda: head(6))
def argmax2(m: Net, x: Tensor) -> Tensor:
    return m.head(m.emb(m.conv(x).mean(2).argmax(2)).mean(1))


@_net(conv=lambda: conv(3, 8), eca=NeighbouringChannels, next=lambda: conv(8, 6), head=lambda: head(6))
def eca(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.eca(m.conv(x)))))


@_net(conv=lambda: conv(3, 8), grn=lambda: ResponseNorm(8), next=lambda: conv(8, 6), head=lambda: head(6))
def grn(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.grn(m.conv(x)))))


@_net(conv=lambda: conv(3, 8), s=FlippedInTraining, next=lambda: conv(8, 6), head=lambda: head(6))
def mode(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.s(m.conv(x)))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(4, 6), head=lambda: head(6))
def maxout(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    n, c, h, w = x.shape
    return m.head(pooled(m.next(x.view(n, c // 2, 2, h, w).max(2)[0])))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(4, 6), head=lambda: head(6))
def maxout2(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(pooled(m.next(torch.maximum(x[:, :4], x[:, 4:]))))


@_net(
    conv=lambda: conv(3, 8),
    up=lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
    up2=lambda: nn.ConvTranspose2d(8, 16, 3, groups=8),
    next=lambda: conv(16, 6),
    head=lambda: head(6),
)
def dwt(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.up2(m.up(m.conv(x)).relu()))))


@_net(conv=lambda: conv(3, 8), other=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def where(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x), m.other(x)
    return m.head(pooled(m.next(torch.where(a > b.mean(), a, b.clamp(min=0.1)))))


@_net(
    mix=lambda: nn.Linear(144, 144),
    conv=lambda: conv(3, 8),
    fc=lambda: nn.Linear(8, 12),
    fc2=lambda: nn.Linear(12, 8),
    head=lambda: head(8),
)
def mixer(m: Net, x: Tensor) -> Tensor:
    x = m.conv(x).flatten(2)
    x = x + m.mix(x)
    x = x.transpose(1, 2)
    x = x + m.fc2(m.fc(x).relu())
    return m.head(x.mean(1))


@_net(w=lambda: nn.Parameter(torch.randn(8, 8)), conv=lambda: conv(3, 8), head=lambda: head(8))
def reg_weight(m: Net, x: Tensor) -> Tensor:
    x = pooled(m.conv(x))
    return m.head(F.linear(x, m.w)) + m.w.square().sum()


@_net(conv=lambda: conv(3, 8), loc=lambda: nn.Linear(8, 6), next=lambda: conv(8, 6), head=lambda: head(6))
def stn(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    th = m.loc(pooled(y)).view(-1, 2, 3)
    g = F.affine_grid(th, y.shape, align_corners=False)
    return m.head(pooled(m.next(F.grid_sample(y, g, align_corners=False))))


@_net(
    conv=lambda: conv(3, 16),
    g=lambda: conv(16, 8, groups=2),
    dw=lambda: conv(8, 8, groups=8),
    g2=lambda: conv(8, 12, groups=4),
    head=lambda: head(12),
)
def groups_mixed(m: Net, x: Tensor) -> Tensor:
    y = m.g(m.conv(x)).relu()
    y = m.dw(y)
    y = torch.cat((y[:, 4:], y[:, :4]), 1)
    return m.head(pooled(m.g2(y)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def select_chan(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.head(pooled(m.next(y * y.select(1, 3).unsqueeze(1)))) + y[:, 5].mean()


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def dyn_pad(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    h = y.shape[2]
    return m.head(pooled(m.next(F.pad(y, (0, -h % 5, 1, 0)))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def split_sizes_computed(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    a, b = y.split([y.size(1) // 4, y.size(1) - y.size(1) // 4], 1)
    return m.head(pooled(m.next(torch.cat((b, a.relu()), 1))))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(8, 6), head=lambda: head(6))
def zeros_made(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = torch.zeros(y.shape[0], y.shape[1], 1, 1)
    o = torch.ones_like(y)
    return m.head(pooled(m.next(y + z + o)))


@_net(conv=lambda: conv(3, 8), next=lambda: conv(10, 6), head=lambda: head(6))
def made_cat(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y.new_ones(y.shape[0], 2, y.shape[2], y.shape[3])
    return m.head(pooled(m.next(torch.cat((z, y), 1))))


@_net(conv=lambda: conv(3, 12), next=lambda: conv(3, 6), head=lambda: head(6))
def nested_unflat(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x).unflatten(1, (2, 2, -1))
    return m.head(pooled(m.next(y[:, 0, 1] + y[:, 1, 0].relu())))


@_net(conv=lambda: conv(3, 12), sh=lambda: nn.ChannelShuffle(4), next=lambda: conv(12, 6), head=lambda: head(6))
def shuffle4(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.sh(m.conv(x)).relu_())))


@_net(conv=lambda: conv(3, 12), next=lambda: conv(12, 6), head=lambda: head(6))
def shuffle_then_inplace(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    n, c, h, w = y.shape
    z = y.view(n, 3, 4, h, w).transpose(1, 2)
    z.relu_()
    return m.head(pooled(m.next(y) + m.next(z.reshape(n, c, h, w))))


@_net(
    conv=lambda: conv(3, 8),
    a=lambda: nn.Parameter(torch.rand(1)),
    b=lambda: nn.Parameter(torch.rand(12)),
    next=lambda: conv(8, 6),
    head=lambda: head(6),
)
def params(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x) * m.a + m.b)))


@_net(
    conv=lambda: conv(3, 8),
    a=lambda: nn.Parameter(torch.rand(2, 4, 1, 1)),
    next=lambda: conv(8, 6),
    head=lambda: head(6),
)
def param_view(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x) * m.a.view(1, 8, 1, 1))))


@_net(conv=lambda: conv(3, 8), a=lambda: nn.Parameter(torch.rand(16)), next=lambda: conv(8, 6), head=lambda: head(6))
def film(m: Net, x: Tensor) -> Tensor:
    s, b = m.a.chunk(2)
    return m.head(pooled(m.next(m.conv(x) * s[:, None, None] + b[:, None, None])))


@_net(conv=lambda: nn.utils.parametrizations.spectral_norm(conv(3, 8)), next=lambda: conv(8, 6), head=lambda: head(6))
def spectral(m: Net, x: Tensor) -> Tensor:
    return m.head(pooled(m.next(m.conv(x))))


@_net(conv=lambda: conv(3, 8), c3=lambda: nn.Conv3d(1, 2, 3, padding=1), head=lambda: head(16))
def conv3(m: Net, x: Tensor) -> Tensor:
    y = m.c3(m.conv(x)[:, None])
    return m.head(y.mean((3, 4)).flatten(1))


@_net(conv=lambda: conv(3, 8), head=lambda: head(8))
def batchmix(m: Net, x: Tensor) -> Tensor:
    y = pooled(m.conv(x))
    a = (y @ y.t()).softmax(-1)
    return m.head(a @ y)


@_net(conv=lambda: conv(3, 8), head=lambda: head(8))
def flatten_all(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.head(pooled(y)) * y.flatten().sum() + y.view(y.size(0), -1).amax(1, keepdim=True)
