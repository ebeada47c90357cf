"""Mean and standard deviation of the steps' numbers, over any number of episodes in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError
from cabochon.data.rlds.records import Episode, Ragged, flat

__all__ = ["Moments", "mean_and_std", "standard_fields"]

Fields = Mapping[str, tuple[NDArray[Any], NDArray[np.bool_]]]
"""Name -> a column and, for every step, whether it counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Of one field, in the shape of one step, float64."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    """Of the sample: divided by count - 1; 0 where only one step counted."""
    count: int
    """Steps that counted."""


def standard_fields(episode: Episode) -> Fields:
    """Observation, action and reward; of the last step only what means something.

    Ragged columns and texts have no mean and are left out.
    """
    count = len(episode)
    real = np.ones(count, bool)
    if not episode.last_step_valid:
        real[-1 if episode.alignment == "SAR" else 0] = False
    every = np.ones(count, bool)
    fields = {}
    for name in ("observation", "action", "reward"):
        if name not in episode.steps:
            continue
        late = name != "observation" and not (name == "action" and episode.alignment == "RSA")
        mask = real if late else every
        if name == "action" and episode.alignment == "RSA":
            mask = np.append(every[:-1], False)
        for path, column in flat({name: episode.steps[name]}).items():
            if not isinstance(column, Ragged) and column.dtype.kind in "biuf":
                fields[path] = (column, mask)
    return fields


def mean_and_std(
    episodes: Iterable[Episode], fields: Callable[[Episode], Fields] = standard_fields
) -> dict[str, Moments]:
    """Mean and standard deviation of every field over all steps that count.

    Sums of squares are joined episode by episode around their own means (Chan, Golub and LeVeque
    1979), so large offsets cost no digits.

    Raises:
        DataError: there is no step that counts.
    """
    counts: dict[str, int] = {}
    means: dict[str, NDArray[np.float64]] = {}
    squares: dict[str, NDArray[np.float64]] = {}
    for episode in episodes:
        for name, (column, mask) in fields(episode).items():
            chosen = np.asarray(column, np.float64)[mask]
            if not len(chosen):
                continue
            mean = chosen.mean(axis=0)
            square = np.square(chosen - mean).sum(axis=0)
            before = counts.get(name, 0)
            total = before + len(chosen)
            if before:
                apart = mean - means[name]
                square = square + squares[name] + apart**2 * (before * len(chosen) / total)
                mean = means[name] + apart * (len(chosen) / total)
            counts[name], means[name], squares[name] = total, mean, square
    if not counts:
        raise DataError("there is no step to take a mean of")
    return {
        name: Moments(mean=means[name], std=np.sqrt(squares[name] / max(1, count - 1)), count=count)
        for name, count in counts.items()
    }
