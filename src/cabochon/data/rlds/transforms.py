"""Steps made into other steps: per step, joined, cut, and shifted against each other.

A `Steps` is what `Episode.steps` is: a tree of columns. These functions know nothing of flags:
what comes out obeys the rules of the format only if the caller sees to it, except `truncated`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cabochon.core.errors import DataError
from cabochon.data.rlds.records import (
    Episode,
    Ragged,
    flat,
    mapped_leaves,
    nested,
    step_columns,
    zeros_like,
)

__all__ = [
    "Steps",
    "concat_if_terminal",
    "concatenate",
    "length",
    "map_steps",
    "shift_keys",
    "truncate_after",
    "truncated",
]

Steps = Mapping[str, Any]


def length(steps: Steps) -> int:
    """How many there are."""
    return len(next(iter(flat(steps).values())))


def map_steps(
    steps: Steps, function: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> dict[str, Any]:
    """The function of every step; it may add, drop and change keys, alike in all steps."""
    rows = range(length(steps))
    return step_columns(
        [function(mapped_leaves(steps, lambda column, row=row: column[row])) for row in rows]
    )


def concatenate(first: Steps, second: Steps) -> dict[str, Any]:
    """One behind the other; what one of them does not have is zero there.

    Raises:
        DataError: a column that both have differs in shape or dtype.
    """
    left, right = flat(first), flat(second)
    counts = length(first), length(second)
    joined = {}
    for name in left | right:
        one = left[name] if name in left else zeros_like(right[name], counts[0])
        other = right[name] if name in right else zeros_like(left[name], counts[1])
        try:
            joined[name] = _joined(one, other)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
    return nested(joined)


def concat_if_terminal(
    episode: Episode, make_extra: Callable[[dict[str, Any]], Steps]
) -> dict[str, Any]:
    """The steps, and behind a terminal one those that are made from it: absorbing states."""
    if not episode.terminated:
        return dict(episode.steps)
    return concatenate(episode.steps, make_extra(episode[len(episode) - 1]))


def truncate_after(steps: Steps, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Everything up to the first step for which the condition holds, which is still included."""
    count = length(steps)
    for row in range(count):
        if condition(mapped_leaves(steps, lambda column, row=row: column[row])):
            count = row + 1
            break
    return mapped_leaves(steps, lambda column: column[:count])


def truncated(episode: Episode, transitions: int) -> Episode:
    """The episode as if it had been cut short after so many transitions.

    What follows is gone; the last step kept is a final observation, with zeros beside it, so that
    the rules of the format hold. An episode that is not longer comes back as it is.

    Raises:
        DataError: the episode is not aligned SAR, has no final observations, or the number is
            negative.
    """
    if episode.alignment != "SAR" or episode.last_step_valid:
        raise DataError("only episodes aligned SAR with a final observation can be cut short")
    if transitions < 0:
        raise DataError(f"cannot keep {transitions} transitions")
    if transitions >= episode.transitions:
        return episode
    steps = mapped_leaves(episode.steps, lambda column: column[: transitions + 1])
    kept = {
        name: value
        for name, value in steps.items()
        if name in ("observation", "is_first", "is_terminal")
    }
    ending = {
        name: mapped_leaves({"c": value}, _without_last)["c"]
        for name, value in steps.items()
        if name not in (*kept, "is_last")
    }
    marks = {"is_last": np.arange(transitions + 1) == transitions}
    return replace(episode, steps={**kept, **ending, **marks})


def shift_keys(steps: Steps, keys: tuple[str, ...], by: int) -> dict[str, Any]:
    """Step i gets the values of step i + by for these keys; there are |by| steps fewer.

    A key is a name, or the path of one (`observation/image`).

    Raises:
        DataError: a key is not there, or the steps are fewer than |by|.
    """
    leaves, count = flat(steps), length(steps)
    if abs(by) > count:
        raise DataError(f"cannot shift {count} steps by {by}")
    for key in keys:
        if not any(name == key or name.startswith(f"{key}/") for name in leaves):
            raise DataError(f"the steps have no {key}; they have {', '.join(leaves)}")
    early, late = slice(0, count - abs(by)), slice(abs(by), count)
    moved, still = (late, early) if by >= 0 else (early, late)
    return nested(
        {
            name: column[
                moved if any(name == key or name.startswith(f"{key}/") for key in keys) else still
            ]
            for name, column in leaves.items()
        }
    )


def _without_last(column: Any) -> Any:
    return _joined(column[:-1], zeros_like(column, 1))


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, Ragged) != isinstance(other, Ragged):
        raise ValueError("one of them is ragged, the other is not")
    if isinstance(one, Ragged):
        lengths = np.concatenate([one.lengths, other.lengths])
        return Ragged(values=_joined(one.values, other.values), lengths=lengths)
    if one.dtype != other.dtype:
        raise ValueError(f"dtype {one.dtype} and {other.dtype}")
    return np.concatenate([one, other])
