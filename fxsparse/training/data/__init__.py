"""Image sets and texts on disk -> deterministic batches on the training device.

    splits = load("cifar10", "data", validation=5000)
    batches = Batches(splits.train, 128, mean=splits.mean, std=splits.std, flip=True, crop=4)
    for images, labels in batches.epoch(0): ...

`sources` knows where each set comes from, `image_set` and `image_folder` hold the pixels (in memory, on
disk), `batches` draws, augments and normalises; `text` reads a text, `text_batches` cuts it into sequences.
A batch is a pure function of (seed, epoch, batch), which makes an interrupted run resume bit for bit.
"""

from fxsparse.training.data.batches import Batches
from fxsparse.training.data.cifar10_npm import build_cifar10
from fxsparse.training.data.image_set import ImageSet
from fxsparse.training.data.moby_dick import build_moby_dick
from fxsparse.training.data.placement import place
from fxsparse.training.data.sources import Splits, load, names
from fxsparse.training.data.text import VOCABULARY, TextSplits, check_shares, is_text, load_text
from fxsparse.training.data.text_batches import TextBatches, in_order

__all__ = [
    "VOCABULARY",
    "Batches",
    "ImageSet",
    "Splits",
    "TextBatches",
    "TextSplits",
    "build_cifar10",
    "build_moby_dick",
    "check_shares",
    "in_order",
    "is_text",
    "load",
    "load_text",
    "names",
    "place",
]
