"""The sparse file: safetensors with the values and the pattern of every sparse weight, and all other tensors as is.

A weight of shape (out, ...) is a matrix of `out` rows. Its tensors are

    NAME            (count): its values, row by row
    NAME:bits       its pattern, a bit a position (a row of blocks), 8 in a byte, the first in the highest bit; or
    NAME:counts     (rows): number of positions in each row, and
    NAME:columns    (positions): where in its row each is, ascending

whichever is smaller. Counts and columns are uint16 where a row has at most 65,536 positions (65,535 for counts), else
uint32. With blocks, rows of the pattern are rows of blocks. The file's metadata has `fxsparse` (the format's version),
`kind` (`module` or `inference`), `name` (the model's class), and as JSON `sites` (NAME -> shape, block, pattern) and
`aliases` (name -> the name under which the same tensor is kept).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import CheckpointError, InputError
from ..kernels.stored_pattern import check_rows

VERSION = "1"
_CHUNK = 1 << 20  # positions whose bits are packed at a time


@dataclass(frozen=True)
class StoredSite:
    """Of a weight in a file: its dense shape, output channels in a block, and the form of its pattern."""

    shape: tuple[int, ...]
    block: int
    pattern: str


# -- writing ----------------------------------------------------------------------------------------------


class SparseFileWriter:
    """Collects what goes into a file."""

    def __init__(self, kind: str, name: str) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._sites: dict[str, StoredSite] = {}
        self._aliases: dict[str, str] = {}
        self._kind, self._name = kind, name

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor as it is."""
        self._tensors[name] = tensor.detach().cpu().contiguous().clone()

    def add_alias(self, alias: str, name: str) -> None:
        """Another name of a tensor."""
        self._aliases[alias] = name

    def add_site(
        self, name: str, values: Tensor, shape: tuple[int, ...], starts: Tensor, columns: Tensor, block: int = 1
    ) -> None:
        """A sparse weight; `values` row by row, the pattern as of `check_rows`."""
        rows, length = shape[0] // block, math.prod(shape[1:])
        narrow = torch.uint16 if length <= 1 << 16 else torch.uint32
        counts = torch.uint16 if length < 1 << 16 else torch.uint32
        self.add(name, values)
        if columns.numel() * narrow.itemsize + rows * counts.itemsize < math.ceil(rows * length / 8):
            self._tensors[f"{name}:counts"] = starts.diff().to(counts)
            self._tensors[f"{name}:columns"] = columns.to(narrow)
            pattern = "columns"
        else:
            self._tensors[f"{name}:bits"] = _packed(starts, columns, length)
            pattern = "bits"
        self._sites[name] = StoredSite(tuple(shape), block, pattern)

    def write(self, path: str | Path) -> None:
        """Writes the file, all of it or nothing.

        Raises:
            CheckpointError: the disk or the folder refuses; what was at `path` is then still there.
        """
        metadata = {
            "fxsparse": VERSION,
            "kind": self._kind,
            "name": self._name,
            "sites": json.dumps({name: asdict(site) for name, site in self._sites.items()}),
            "aliases": json.dumps(self._aliases),
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(self._tensors, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(f"could not write {path}: {reason}") from error


def _chunks(rows: int, length: int) -> Iterable[tuple[int, int]]:
    """Ranges of rows whose bits fill whole bytes."""
    step = max(_CHUNK // max(length, 1) // 8, 1) * 8
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _packed(starts: Tensor, columns: Tensor, length: int) -> Tensor:
    parts = []
    for first, last in _chunks(len(starts) - 1, length):
        own = columns[int(starts[first]) : int(starts[last])].long()
        row = torch.repeat_interleave(torch.arange(last - first), starts[first : last + 1].diff().long())
        bits = np.zeros((last - first) * length, dtype=bool)
        bits[(row * length + own).numpy()] = True
        parts.append(np.packbits(bits))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.uint8)


def _unpacked(bits: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    counts, columns, packed, at = [], [], bits.numpy(), 0
    for first, last in _chunks(rows, length):
        size = (last - first) * length
        chunk = np.unpackbits(packed[at : at + math.ceil(size / 8)], count=size).reshape(last - first, length)
        counts.append(chunk.sum(1, dtype=np.int64))
        columns.append(chunk.nonzero()[1].astype(np.int32))
        at += math.ceil(size / 8)
    joined = [torch.from_numpy(np.concatenate(parts)) for parts in (counts, columns) if parts]
    if not joined:
        return torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    return torch.cat([torch.zeros(1, dtype=torch.int64), joined[0].cumsum(0)]), joined[1]


# -- reading ----------------------------------------------------------------------------------------------


class SparseFile:
    """A file opened for reading: its header, and tensors one at a time.

    Attributes:
        kind, name: as the module's docstring says.
        sites: name of a sparse weight -> how it is stored.
        dense: names of all other tensors.
        aliases: name -> the name under which the same tensor is kept.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a file.

        Raises:
            CheckpointError: it is missing, damaged, foreign, or of another version.
        """
        self.path = Path(path)
        try:
            self._file: Any = safe_open(str(path), framework="pt").__enter__()
            metadata = self._file.metadata() or {}
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {path}") from None
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is not a complete safetensors file: {reason}") from None
        if "fxsparse" not in metadata:
            raise CheckpointError(f"{path} was not written by save_sparse; of a dense file, use load_state_dict")
        if metadata["fxsparse"] != VERSION:
            raise CheckpointError(f"{path} has format {metadata['fxsparse']}; this version reads {VERSION}")
        try:
            self.kind, self.name = metadata["kind"], metadata["name"]
            stored = json.loads(metadata["sites"])
            self.sites = {
                name: StoredSite(tuple(map(int, s["shape"])), int(s["block"]), s["pattern"])
                for name, s in stored.items()
            }
            self.aliases: dict[str, str] = dict(json.loads(metadata["aliases"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} has a header that cannot be read: {error!r}"[:300]) from None
        names = set(self._file.keys())
        patterns = {f"{name}:{part}" for name, site in self.sites.items() for part in _parts(site)}
        lacking = sorted((patterns | set(self.sites) | set(self.aliases.values())) - names)
        if lacking:
            raise CheckpointError(f"{path} lacks {lacking[0]}")
        self.dense = names - patterns - set(self.sites)

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor; of a sparse weight, the dense shape. Reads nothing else."""
        part = self._file.get_slice(name)
        shape = self.sites[name].shape if name in self.sites else tuple(part.get_shape())
        first = part.get_shape()[:1]
        return shape, part[:0].dtype if first and first[0] else self._file.get_tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own memory; of a sparse weight, its values."""
        return self._file.get_tensor(name).clone()

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """`(starts, columns)` of a sparse weight, as of `check_rows`, which they have passed.

        Raises:
            CheckpointError: they are not a pattern of the weight, or not one of its values.
        """
        site, get = self.sites[name], self._file.get_tensor
        try:
            rows, length = site.shape[0] // site.block, math.prod(site.shape[1:])
            if site.pattern == "bits":
                bits = get(f"{name}:bits")
                if bits.dtype != torch.uint8 or bits.shape != (_bytes(rows, length),):
                    raise InputError(f"its bits are {tuple(bits.shape)}, not {_bytes(rows, length)}")
                starts, columns = _unpacked(bits, rows, length)
            else:
                counts, columns = get(f"{name}:counts").long(), get(f"{name}:columns").int()
                starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            check_rows(site.shape, site.block, starts, columns)
            values = self._file.get_slice(name).get_shape()
            if values != [columns.numel() * site.block]:
                raise InputError(f"it has {values} values for {columns.numel() * site.block} positions")
        except (InputError, ZeroDivisionError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: {name} has a damaged pattern: {error}") from None
        return starts, columns


def _bytes(rows: int, length: int) -> int:
    return sum(math.ceil((last - first) * length / 8) for first, last in _chunks(rows, length))


def _parts(site: StoredSite) -> tuple[str, ...]:
    known: Mapping[str, tuple[str, ...]] = {"bits": ("bits",), "columns": ("counts", "columns")}
    if site.pattern not in known:
        raise CheckpointError(f"a pattern is stored as {site.pattern!r}; this version reads {', '.join(known)}")
    return known[site.pattern]
