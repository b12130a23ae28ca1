"""A text file as bytes, in three contiguous parts: `text:PATH`.

A character is a byte and the vocabulary is all 256 of them, as in the paper (Evci et al. 2020, section 4.2):
no byte is unknown in a later part, networks do not depend on the file, and bits per character are bits per
byte of the file, whatever its encoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxsparse.core.errors import ConfigError, DataError

PREFIX = "text:"
VOCABULARY = 256


@dataclass(frozen=True)
class TextSplits:
    """A text in its parts, each uint8 (characters,): the beginning trains, the end tests."""

    name: str
    train: Tensor
    validation: Tensor | None
    test: Tensor


def is_text(name: str) -> bool:
    """Whether a data set's name says that it is a text."""
    return name.partition(":")[0] == PREFIX[:-1]


def check_shares(shares: Sequence[float]) -> None:
    """ConfigError unless `shares` are those of a training, a validation and a test part."""
    fits = len(shares) == 3 and abs(sum(shares) - 1) < 1e-6
    if not (fits and shares[0] > 0 and shares[1] >= 0 and shares[2] > 0):
        raise ConfigError(
            f"split is {' '.join(str(share) for share in shares)}; it takes the shares of the training, validation "
            "and test part, 1 together, of which only the validation part may be 0"
        )


def load_text(name: str, shares: Sequence[float]) -> TextSplits:
    """The file behind `text:PATH`, cut at `shares` (training, validation, test) of its bytes, rounded.

    Raises ConfigError for shares that are none, DataError that names a file that is missing, empty, a folder,
    unreadable, or too short to give each part two characters.
    """
    check_shares(shares)
    if not name.removeprefix(PREFIX) or not name.startswith(PREFIX):
        raise ConfigError(f"data is {name!r}; give the file, as {PREFIX}PATH")
    path = Path(name.removeprefix(PREFIX)).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no text {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; {PREFIX}PATH takes one file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise DataError(f"{path} is empty")
    characters = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    first, second = round(shares[0] * len(content)), round((shares[0] + shares[1]) * len(content))
    parts = {"training": characters[:first], "validation": characters[first:second], "test": characters[second:]}
    if not shares[1]:
        del parts["validation"]
    for part, text in parts.items():
        if len(text) < 2:
            raise DataError(f"{path} is too short: {len(content)} bytes leave {len(text)} to the {part} part")
    return TextSplits(name, parts["training"], parts.get("validation"), parts["test"])
