"""Where results go, looked at before any work is done for them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cabochon.core.errors import FolderError

__all__ = ["free", "writable"]


def free(place: Path) -> Path:
    """`place`, once it is sure that nothing is there and that something can be put there.

    Raises:
        FolderError: a file or a folder with something in it is there, or it cannot be written.
    """
    if place.is_dir() and any(place.iterdir()):
        raise FolderError(f"{place} exists already and is not empty; remove it or choose another")
    return writable(place)


def writable(place: Path) -> Path:
    """`place`, once it is sure that a folder can be made or written there.

    Raises:
        FolderError: a file is in the way, or the disk or its owner do not allow it.
    """
    nearest = next(each for each in (place, *place.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise FolderError(f"{nearest} is a file, no folder; remove it or choose another")
    try:
        with TemporaryDirectory(prefix=".partial-", dir=nearest):
            return place
    except OSError as error:
        raise FolderError(
            f"{place} cannot be written: {error.strerror or error}; choose another place"
        ) from error
