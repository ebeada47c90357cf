"""State, action and reward in one step, in the order of another alignment.

    SAR  (o_i, a_i taken in o_i, r_i and d_i which a_i brought): the standard
    ARS  (a_{i-1}, r_{i-1}, d_{i-1} that led to o_i, o_i): what dm_env and EnvLogger hold
    RSA  (r_{i-1}, d_{i-1} that came with o_i, o_i, a_i taken in it)

What has no place is dropped only where it means nothing: of SAR the last step's, of the others the
first step's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.records import Alignment, Episode, Ragged, flat, nested, zeros_like

__all__ = ["realigned", "shifted"]

_LATE = {"SAR": (), "ARS": ("action", "reward", "discount"), "RSA": ("reward", "discount")}
"""What stands one step later than in SAR."""


def realigned(episode: Episode, alignment: Alignment) -> Episode:
    """The same episode in another alignment. Columns of no standard name stay where they are.

    Raises:
        ConfigError: the alignment is not known.
        DataError: the last step holds a real action, which other alignments have no place for.
    """
    if alignment not in get_args(Alignment):
        raise ConfigError(f"alignment must be one of {get_args(Alignment)}, got {alignment!r}")
    if alignment == episode.alignment:
        return episode
    if episode.last_step_valid:
        raise DataError("an episode without final observation exists in SAR alone")
    steps = dict(episode.steps)
    before, after = _LATE[episode.alignment], _LATE[alignment]
    for name in ("action", "reward", "discount"):
        move = (name in before) - (name in after)
        if move and name in steps:
            column: dict[str, Any] = {name: steps[name]}
            steps |= nested({key: shifted(each, move) for key, each in flat(column).items()})
    return replace(episode, steps=steps, alignment=alignment)


def shifted(column: Any, by: int) -> Any:
    """Row i is what row i + by was; rows from beyond are zero."""
    rows = len(column)
    count = max(0, rows - abs(by))
    kept = column[by : by + count] if by >= 0 else column[:count]
    filling = zeros_like(column, rows - count)
    parts = [kept, filling] if by >= 0 else [filling, kept]
    if isinstance(column, Ragged):
        return Ragged.of([row for part in parts for row in part])
    return np.concatenate(parts)
