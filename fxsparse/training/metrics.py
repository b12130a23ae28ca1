"""The record of a run: JSON lines, a TensorBoard copy, and wall-clock times in a file of their own.

A record is a function of the configuration alone, so that two runs can be compared byte by byte; seconds
go to `timing.jsonl`. Kinds of record: `train` (means since the last one), `eval`, `rewire`, and `telemetry` (per layer,
at every evaluation).
"""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxsparse.core.errors import CheckpointError
from fxsparse.training.checkpoint import write_atomically


class MetricLog:
    """Appends records to `path` and keeps them in memory.

    `packed` is what `pack()` gave to a checkpoint: the file then begins with exactly those records, whatever
    a killed run had written after them.
    """

    def __init__(self, path: Path, packed: Tensor | None = None):
        self.path = path
        self._timing_path = path.with_name("timing.jsonl")
        text = zlib.decompress(packed.numpy().tobytes()).decode() if packed is not None else ""
        self._lines = text.splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
        write_atomically(path, text.encode())
        self._writer: Any = None

    def open_tensorboard(self, folder: Path, step: int) -> str | None:
        """Copy the records after `step` to TensorBoard events in `folder`; a line that says why if it cannot."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            return "no TensorBoard events: pip install tensorboard"
        except OSError as error:
            return f"no TensorBoard events: could not write {folder}: {error.strerror or error}"
        return None

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Append one record. Raises `CheckpointError` if the file cannot be written."""
        record = {"kind": kind, "step": step, **values}
        line = json.dumps(record)
        self._append(self.path, line)
        self._lines.append(line)
        self.records.append(record)
        if self._writer is not None:
            self._copy_to_tensorboard(kind, step, values)

    def add_timing(self, step: int, seconds: float) -> None:
        """Append how many seconds of training `step` steps took."""
        self._append(self._timing_path, json.dumps({"step": step, "seconds": round(seconds, 3)}))

    def last(self, kind: str, **values: Any) -> dict[str, Any] | None:
        """The newest record of a kind with these values."""
        wanted = {"kind": kind, **values}.items()
        return next((record for record in reversed(self.records) if wanted <= record.items()), None)

    def pack(self) -> Tensor:
        """All records so far, compressed, as a uint8 tensor for a checkpoint."""
        text = "".join(line + "\n" for line in self._lines)
        return torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)

    def close(self) -> None:
        """Flush and close the TensorBoard events."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _copy_to_tensorboard(self, kind: str, step: int, values: dict[str, Any]) -> None:
        prefix = f"{kind}/{values['split']}_" if "split" in values else f"{kind}/"
        try:
            for name, value in values.items():
                layers = value.items() if isinstance(value, dict) else [("", value)]
                for layer, number in layers:
                    if isinstance(number, (int, float)):
                        self._writer.add_scalar("/".join(filter(None, (prefix + name, layer))), number, step)
        except OSError:  # a copy is not worth a run; a full disk will show in the metrics themselves
            self._writer = None

    @staticmethod
    def _append(path: Path, line: str) -> None:
        try:
            with open(path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records in a `metrics.jsonl`; a half-written last line, of a run that was killed, is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
