"""What goes where: answers to standard output, everything else to standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

__all__ = ["answer", "bytes_text", "console", "duration_text", "say"]


def answer(value: Any) -> None:
    """One JSON object on one line of standard output."""
    print(json.dumps(value, default=_plain, ensure_ascii=False, allow_nan=False), flush=True)


class _Audience:
    """Standard error whose reader may leave (head, a closed terminal): the work goes on unseen."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def say(text: str) -> None:
    """A line for a person, on standard error."""
    print(text, file=_Audience(), flush=True)


def console(*, stderr: bool = True) -> Console:
    """A rich console; plain text where there is no terminal."""
    if not stderr:
        return Console(highlight=False, soft_wrap=True)
    return Console(file=cast("IO[str]", _Audience()), highlight=False, soft_wrap=True)


def bytes_text(count: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration_text(seconds: float) -> str:
    """3700 -> 1 h 02 min."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
