"""metrics.jsonl: one JSON object for each update, in order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.core import Step
from cabochon.core.errors import FolderError

__all__ = ["MetricsFile", "Record", "read_metrics"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One update and what it took."""

    step: Step
    seconds: float
    """From the end of the update before (or of its checkpoint) to the end of this one."""

    @property
    def units_per_second(self) -> float:
        """Tokens a second, where the units of the loss are tokens."""
        return self.step.weight / self.seconds if self.seconds > 0 else math.inf

    def as_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl; only `seconds` and `units_per_second` differ between runs."""
        fixed = {
            "step": self.step.index,
            "loss": self.step.loss,
            "grad_norm": self.step.grad_norm,
            "weight": self.step.weight,
            "learning_rate": self.step.learning_rate,
            "seconds": round(self.seconds, 6),
            "units_per_second": round(self.units_per_second, 3),
        }
        # A report that uses one of these names does not take its place.
        return {**fixed, **self.step.report, **fixed}


class MetricsFile:
    """Appends to metrics.jsonl, a line at a time, each handed to the operating system at once."""

    def __init__(self, path: Path, *, start: int) -> None:
        """Opens `path`, cut back to the updates before `start`; a torn last line goes too."""
        self._path = path
        with self._clear_errors():
            if path.exists():
                _cut(path, start)
            self._file = path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """One more line; NaN and infinity, which JSON does not know, become null."""
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.as_json().items()
        }
        with self._clear_errors():
            rest = (json.dumps(line, allow_nan=False) + "\n").encode()
            while rest:
                rest = rest[self._file.write(rest) :]

    def make_durable(self) -> None:
        """Returns when every line is on the disk."""
        with self._clear_errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FolderError(
                f"could not write {self._path}: {error}; the checkpoints are intact: "
                "make room or mend the disk, then resume"
            ) from error


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _cut(path: Path, start: int) -> None:
    length = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _step_of(path, line) >= start:
                break
            length += len(line)
    os.truncate(path, length)


def _step_of(path: Path, line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{path} holds the line {line[:80]!r}, which is not a record of an update; "
            "mend it, or move the file away to go on without the earlier metrics"
        ) from error
