"""Windows over steps, and transitions of several steps.

`batch` works on anything that can be iterated and holds one window's span in memory; `windows` and
`n_step` work on the columns of one episode, so they never cross from one to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.records import Episode, Ragged, mapped_leaves, zeros_like

__all__ = ["Transitions", "batch", "n_step", "window_count", "windows"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Transitions:
    """What happened over at most n steps, from every step of an episode that has an action."""

    observation: Any
    action: Any
    reward: NDArray[Any]
    """R = sum over k < m of gamma^k (d_0 ... d_{k-1}) r_k."""
    discount: NDArray[Any]
    """gamma^m d_0 ... d_{m-1}, of what the value of `next_observation` counts; 0 where the
    environment ended."""
    next_observation: Any
    steps: NDArray[np.int64]
    """m: n, and fewer near the end of the episode."""


def batch(
    items: Iterable[T],
    size: int,
    *,
    shift: int | None = None,
    stride: int = 1,
    drop_remainder: bool = False,
) -> Iterator[list[T]]:
    """Sliding windows over a stream: items k shift + j stride for j < size, in window k.

    Args:
        items: anything.
        size: items of a window.
        shift: from the beginning of one window to that of the next; `size` when absent.
        stride: between the items of one window.
        drop_remainder: leave out windows that the end cuts short.
    """
    shift = _checked(size, shift, stride)
    span = (size - 1) * stride + 1
    held: deque[T] = deque()
    skip = 0
    for item in items:
        if skip:
            skip -= 1
            continue
        held.append(item)
        if len(held) == span:
            yield list(held)[::stride]
            skip = max(0, shift - span)
            for _ in range(min(shift, span)):
                held.popleft()
    while held and not drop_remainder:
        yield list(held)[::stride]
        for _ in range(min(shift, len(held))):
            held.popleft()


def windows(
    episode: Episode,
    size: int,
    *,
    shift: int | None = None,
    stride: int = 1,
    drop_remainder: bool = False,
) -> Iterator[dict[str, Any]]:
    """The windows of `batch` over the steps of one episode, as columns; plain ones are views."""
    shift = _checked(size, shift, stride)
    count = len(episode)
    for start in range(0, count, shift):
        if drop_remainder and start + (size - 1) * stride >= count:
            return
        chosen = slice(start, min(start + (size - 1) * stride + 1, count), stride)
        yield mapped_leaves(episode.steps, lambda column, chosen=chosen: column[chosen])


def window_count(
    length: int, size: int, *, shift: int | None = None, stride: int = 1, drop_remainder: bool
) -> int:
    """How many windows `windows` gives for an episode of so many steps."""
    shift = _checked(size, shift, stride)
    room = length - (size - 1) * stride if drop_remainder else length
    return max(0, -(-room // shift))


def n_step(episode: Episode, n: int, *, gamma: float) -> Transitions:
    """From every step with an action, what the next n actions (fewer at the end) brought.

    Where the episode was cut short, the last windows are bootstrapped from its final observation;
    where the environment ended it, their discount is 0. Of an episode whose final observation was
    never stored (`last_step_valid`) and that was cut short, windows that reach its end are left
    out: nothing is there to bootstrap from; ended ones have zeros as `next_observation`.

    Raises:
        ConfigError: n is below 1, or gamma is outside of 0 to 1.
        DataError: the episode is not aligned SAR.
    """
    if n < 1 or not 0 <= gamma <= 1:
        raise ConfigError(f"n must be at least 1 and gamma in 0 to 1, got {n} and {gamma}")
    if episode.alignment != "SAR":
        raise DataError(f"the episode is aligned {episode.alignment}; realign it to SAR first")
    count = episode.transitions
    reward = np.asarray(episode.steps["reward"])[:count]
    discount = np.asarray(episode.steps.get("discount", np.ones(count)))[:count]
    dtype = reward.dtype if reward.dtype.kind == "f" else np.dtype(np.float64)
    place = np.arange(count)
    total, scale = np.zeros(count), np.ones(count)
    for step in range(n):
        inside = place + step < count
        at = place[inside] + step
        total[inside] += scale[inside] * reward[at]
        scale[inside] *= gamma * discount[at]
    after = np.minimum(place + n, count)
    kept = np.ones(count, bool)
    if episode.terminated:
        scale[after == count] = 0
    elif episode.last_step_valid:
        kept = after < count
    return Transitions(
        observation=_rows(episode.steps["observation"], place[kept]),
        action=_rows(episode.steps["action"], place[kept]),
        reward=total[kept].astype(dtype),
        discount=scale[kept].astype(dtype),
        next_observation=_rows(episode.steps["observation"], after[kept]),
        steps=(after - place)[kept],
    )


def _rows(tree: Any, rows: NDArray[np.int64]) -> Any:
    """The chosen rows of a column or of all columns of a mapping; zeros for one past the end."""

    def chosen(column: Any) -> Any:
        if isinstance(column, Ragged):
            empty = zeros_like(column, 1)[0]
            return Ragged.of([column[r] if r < len(column) else empty for r in rows.tolist()])
        beyond = rows >= len(column)
        if not beyond.any():
            return column[rows]
        return np.concatenate([column, zeros_like(column, 1)])[rows]

    return mapped_leaves(tree, chosen) if isinstance(tree, Mapping) else chosen(tree)


def _checked(size: int, shift: int | None, stride: int) -> int:
    shift = size if shift is None else shift
    if min(size, shift, stride) < 1:
        raise ConfigError(
            f"size, shift and stride must be at least 1, got {size}, {shift} and {stride}"
        )
    return shift
