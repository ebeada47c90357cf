"""Viewers of metrics by name; metrics.jsonl stays the truth, these are copies of it."""

from __future__ import annotations

import atexit
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cabochon.core.errors import MissingExtra
from cabochon.training.meters import Meter, tensorboard, trackio

__all__ = ["refuse_missing", "trackers"]

PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio"}


def refuse_missing(names: Sequence[str]) -> None:
    """Makes sure that the viewers' packages are there, before anything is spent.

    Raises:
        MissingExtra: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise MissingExtra(PACKAGES[name], "track", f"--track {name}")


@contextmanager
def trackers(
    names: Sequence[str], run: Path, settings: Mapping[str, Any], *, start: int
) -> Iterator[list[Meter]]:
    """Observers that copy each update's metrics to the viewers called `names`."""
    with ExitStack() as stack:
        meters = []
        if "tensorboard" in names:
            meters.append(stack.enter_context(tensorboard(run / "tensorboard", start=start)))
        if "trackio" in names:
            meters.append(stack.enter_context(trackio("cabochon", run.name, settings)))
            atexit.register(_speak_to_standard_error)  # before what trackio registered
        yield meters


def _speak_to_standard_error() -> None:
    """trackio still has something to say at exit; standard output holds answers alone."""
    sys.stdout = sys.stderr
