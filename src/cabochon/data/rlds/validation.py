"""What is wrong with an episode or a dataset, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cabochon.core.errors import DataError
from cabochon.data.rlds.records import FLAGS, Episode, Ragged, flat

__all__ = ["check", "findings"]


def check(episode: Episode) -> None:
    """Raises the first finding.

    Raises:
        DataError: the episode breaks a rule of the format.
    """
    for finding in findings(episode, values=False):
        raise DataError(finding)


def findings(episode: Episode, *, values: bool = True) -> Iterator[str]:
    """Every rule of the format that the episode breaks.

    Args:
        episode: what to look at.
        values: also look for numbers that are not finite, and for a last step that is not zero
            where it should mean nothing.
    """
    leaves = flat(episode.steps)
    missing = [name for name in FLAGS[:2] if name not in leaves]
    if missing:
        yield f"the steps have no {' and no '.join(missing)}; RLDS requires them"
        return
    lengths = {name: len(column) for name, column in leaves.items()}
    if len(set(lengths.values())) > 1:
        yield f"the columns differ in length: {lengths}"
        return
    count = len(episode)
    if count == 0:
        yield "the episode has no step; even one that was cut at once has its first observation"
        return
    yield from _flags(leaves, count)
    if values:
        yield from _values(episode, leaves)


def _flags(leaves: dict[str, Any], count: int) -> Iterator[str]:
    for name in FLAGS:
        if name in leaves and np.asarray(leaves[name]).dtype != np.bool_:
            yield f"{name} is {np.asarray(leaves[name]).dtype}, expected bool"
            return
    first, last = np.flatnonzero(leaves["is_first"]), np.flatnonzero(leaves["is_last"])
    if first.tolist() != [0]:
        yield f"is_first is True at steps {first.tolist()[:5]}, expected at step 0 alone"
    if not len(last):
        yield f"is_last is True nowhere, expected at step {count - 1}: the episode has no end"
    elif int(last[0]) != count - 1:
        yield f"is_last is True at step {int(last[0])}; {count - 1 - int(last[0])} steps follow it"
    if "is_terminal" in leaves:
        terminal = np.flatnonzero(leaves["is_terminal"])
        if len(terminal) and terminal.tolist() != [count - 1]:
            yield f"is_terminal is True at steps {terminal.tolist()[:5]}; only the last can be"


def _values(episode: Episode, leaves: dict[str, Any]) -> Iterator[str]:
    for name, column in leaves.items():
        array = column.values if isinstance(column, Ragged) else column
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            wrong = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            if len(wrong):
                yield f"{name} is not finite in {len(wrong)} rows, first in {int(wrong[0])}"
    if episode.last_step_valid or episode.alignment != "SAR" or len(episode) < 2:
        return
    for name in ("reward", "action"):
        column = leaves.get(name)
        if isinstance(column, np.ndarray) and column.dtype.kind in "fiu" and column[-1].any():
            yield (
                f"the last step's {name} is not zero, though it should mean nothing: is this "
                "a dataset without final observations (last_step_valid)?"
            )
