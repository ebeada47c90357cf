"""The pictures of an episode side by side, so that one sees what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError, MissingExtra
from cabochon.data.rlds.records import Episode, flat
from cabochon.files import whole

__all__ = ["filmstrip", "picture_columns", "save_filmstrip"]

_HEIGHT = 96
"""Pixels of the smallest frame: smaller pictures are magnified by a whole number."""
_GAP = 4


def picture_columns(episode: Episode) -> dict[str, NDArray[np.uint8]]:
    """The columns that are pictures: T H W C uint8 with 1, 3 or 4 channels."""
    return {
        name: column
        for name, column in flat(episode.steps).items()
        if isinstance(column, np.ndarray)
        and column.dtype == np.uint8
        and column.ndim == 4
        and column.shape[3] in (1, 3, 4)
    }


def filmstrip(episode: Episode, *, frames: int = 8) -> NDArray[np.uint8]:
    """H W 3: a row for each column of pictures, its frames evenly spaced from first to last.

    Raises:
        DataError: the episode has no pictures.
    """
    columns = picture_columns(episode)
    if not columns:
        found = ", ".join(flat(episode.steps))
        raise DataError(f"no column holds pictures (T H W C uint8); the steps have {found}")
    chosen = np.unique(np.linspace(0, len(episode) - 1, frames).round().astype(int))
    rows = [_row(column[chosen]) for column in columns.values()]
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0))) for row in rows]
    )[:-_GAP]


def save_filmstrip(episode: Episode, place: Path, *, frames: int = 8) -> None:
    """The strip as a PNG file."""
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtra("pillow", "rlds", "drawing a filmstrip") from error
    picture: Any = PIL.Image.fromarray(filmstrip(episode, frames=frames))
    with whole(place) as path:
        picture.save(path, "PNG")


def _row(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shown = pictures[..., :3]
    if shown.shape[3] == 1:
        shown = shown.repeat(3, axis=3)
    larger = -(-_HEIGHT // shown.shape[1])
    shown = shown.repeat(larger, axis=1).repeat(larger, axis=2)
    framed = [np.pad(picture, ((0, 0), (0, _GAP), (0, 0))) for picture in shown]
    return np.concatenate(framed, axis=1)[:, :-_GAP]
