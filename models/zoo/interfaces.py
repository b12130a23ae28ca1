"""Inputs and outputs other than one tensor, and every way to pass an argument."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .case import ZooCase, normal


class TwoLayers(nn.Module):
    """The layers that all the networks of this file share: 8 features in, 4 features, 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.head = nn.Linear(4, 3)


class DictIO(TwoLayers):
    """A dict in, walked by its items, and a nested dict out."""

    def forward(self, batch: dict[str, Tensor]) -> dict:
        total = sum(torch.relu(self.fc(image)) for _, image in batch.items())
        return {"logits": self.head(total), "features": {"total": total, "first": batch["first"]}}


class TupleIO(TwoLayers):
    """A nested tuple in, unpacked, and a nested tuple out."""

    def forward(self, inputs: tuple) -> tuple:
        image, (scale, shift) = inputs
        features = torch.relu(self.fc(image)) * scale + shift
        return self.head(features), (features, image)


class ListIO(TwoLayers):
    """A list of tensors of different sizes in, and a list of the same length out."""

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.head(torch.relu(self.fc(level))) for level in levels]


class NoneIO(TwoLayers):
    """None among the inputs and None among the outputs."""

    def forward(self, image: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
        features = torch.relu(self.fc(image))
        if extra is not None:
            features = features + extra
        return self.head(features), extra


class Sample(NamedTuple):
    """Input and output of NamedTupleIO."""

    image: Tensor
    weight: Tensor


class NamedTupleIO(TwoLayers):
    """A namedtuple in, read by field, and one out: callers use `out.image`."""

    def forward(self, sample: Sample) -> Sample:
        logits = self.head(torch.relu(self.fc(sample.image)))
        return Sample(image=logits, weight=sample.weight * logits.mean(1))


@dataclass
class Batch:
    """Input and output of DataclassIO."""

    image: Tensor
    scale: float = 1.0
    logits: Tensor | None = None


class DataclassIO(TwoLayers):
    """A dataclass in, with a number and a None beside its tensor, and one out."""

    def forward(self, batch: Batch) -> Batch:
        features = torch.relu(self.fc(batch.image)) * batch.scale
        if batch.logits is not None:
            return batch
        return Batch(image=batch.image, scale=batch.scale, logits=self.head(features))


class KeywordInput(TwoLayers):
    """Called by keyword alone, with a default that the call leaves out between two that it gives."""

    def forward(self, image: Tensor, gain: float = 2.0, shift: Tensor | None = None) -> Tensor:
        features = torch.relu(self.fc(image)) * gain
        return self.head(features if shift is None else features + shift)


class KeywordOnly(TwoLayers):
    """An argument that can only be given by keyword."""

    def forward(self, image: Tensor, *, shift: Tensor, double: bool = False) -> Tensor:
        features = torch.relu(self.fc(image)) + shift
        return self.head(2 * features if double else features)


class OptionalMask(TwoLayers):
    """`mask=None`: a proxy is not None, so a careless trace takes the branch that the call does not."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        features = torch.relu(self.fc(x))
        if mask is not None:
            features = features * mask.unsqueeze(-1)
        return self.head(features)


class Flag(TwoLayers):
    """A Python bool with a default chooses what comes back."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features = torch.relu(self.fc(x))
        if return_features:
            return self.head(features), features
        return self.head(features)


class PositionalVariadic(TwoLayers):
    """`forward(*images)`: as many arguments as the call gives."""

    def forward(self, *images: Tensor) -> Tensor:
        assert len(images) > 1
        return self.head(sum(torch.relu(self.fc(image)) for image in images))


class KeywordVariadic(TwoLayers):
    """`forward(image, **extras)`: keyword arguments of any name."""

    def forward(self, image: Tensor, **extras: Tensor) -> Tensor:
        features = torch.relu(self.fc(image))
        for name, extra in extras.items():
            features = features - extra if name.startswith("minus") else features + extra
        return self.head(features)


class PassThrough(TwoLayers):
    """The input is among the outputs as itself, and a constant and a size as plain numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int, int]:
        return x, self.head(torch.relu(self.fc(x))), 3, x.shape[1]


X = normal(4, 8)
SHIFT = normal(4, 4, seed=1)

CASES = {
    "dict_io": ZooCase(DictIO, lambda: ({"first": X(), "second": 2 * X()},), sites=2),
    "tuple_io": ZooCase(TupleIO, lambda: ((X(), (SHIFT(), SHIFT())),), sites=2),
    "list_io": ZooCase(ListIO, lambda: ([X(), normal(2, 8)(), normal(2, 5, 8)()],), sites=2),
    "none_input": ZooCase(NoneIO, lambda: (X(), None), sites=2),
    "namedtuple_io": ZooCase(NamedTupleIO, lambda: (Sample(X(), normal(4)()),), sites=2),
    "dataclass_io": ZooCase(DataclassIO, lambda: (Batch(X(), scale=0.5),), sites=2),
    "keyword_input": ZooCase(KeywordInput, lambda: {"shift": SHIFT(), "image": X()}, sites=2),
    "keyword_only": ZooCase(KeywordOnly, lambda: {"image": X(), "shift": SHIFT()}, sites=2),
    "optional_mask_absent": ZooCase(OptionalMask, X, sites=2),
    "optional_mask_given": ZooCase(OptionalMask, lambda: (X(), normal(4)().gt(0)), sites=2),
    "flag_default": ZooCase(Flag, X, sites=2),
    "flag_given": ZooCase(Flag, lambda: {"x": X(), "return_features": True}, sites=2),
    "positional_variadic": ZooCase(PositionalVariadic, lambda: (X(), 2 * X()), sites=2),
    "keyword_variadic": ZooCase(
        KeywordVariadic, lambda: {"image": X(), "plus": SHIFT(), "minus": 2 * SHIFT()}, sites=2
    ),
    "pass_through": ZooCase(PassThrough, X, sites=2),
}
