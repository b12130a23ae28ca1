"""A network of layers by name, for the small networks of this package."""

from collections.abc import Callable

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


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def head(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 5)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))
