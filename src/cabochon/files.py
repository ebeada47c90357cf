"""Bytes on the disk: how they come there whole or not at all, and their hashes.

Whatever must not be half there is written aside, flushed, and renamed into its place: a crash, a
full disk or an exception at any moment leaves what was there before.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

__all__ = ["flush", "flush_tree", "hashes_below", "sha256_of", "whole", "write_whole"]

_PRIVATE = 0o600


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A path at which to write the file or folder that shall be at `place`, and then appears there.

    It has the name of `place` and lies in a folder of its own beside it, so that two processes that
    write the same place do not meet: the last one to end is there in full. When the block has ended
    well and this returns, the bytes and the name are on the disk, for those to read whom the umask
    lets. When it has not, `place` is as it was. What a killed process left behind is removed by
    the next that writes the same place.

    Args:
        place: a file, replaced if it exists, or a folder, which must then be absent or empty.

    Raises:
        OSError: it cannot be written, or `place` is a folder that is not empty.
    """
    place = place.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".partial-{place.name}-"
    with ExitStack() as stack:
        with _locked(place.parent):  # so that nobody sweeps a folder before it is held
            for left in place.parent.glob(glob.escape(prefix) + "*"):
                _remove_if_abandoned(left)
            room = Path(mkdtemp(prefix=prefix, dir=place.parent))
            stack.enter_context(_locked(room))
            stack.callback(shutil.rmtree, room, ignore_errors=True)
        path = room / place.name
        yield path
        _share(path, room)
        flush_tree(path)
        path.replace(place)
    flush(place.parent)


def write_whole(place: Path, text: str) -> None:
    """The file `place` with this text as UTF-8, in the way of `whole`."""
    with whole(place) as path:
        path.write_text(text, encoding="utf-8", newline="\n")


def flush_tree(path: Path) -> None:
    """Returns when a file, or a folder with everything below it, is on the disk."""
    for below in path.rglob("*") if path.is_dir() else ():
        flush(below)
    flush(path)


def flush(path: Path) -> None:
    """Returns when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_below(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by name relative to it, in the order of names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _share(path: Path, room: Path) -> None:
    """Let those read it whom the umask lets: some libraries write files for their owner alone."""
    probe = room / f"{path.name}.umask"  # no name that the caller can have chosen
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    usual = probe.stat().st_mode & 0o666
    for file in (path, *path.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == _PRIVATE:
            file.chmod(usual)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other process holds `folder`; a killed process holds nothing.

    On a disk that knows no locks it is as if all were held: nothing is taken for abandoned there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
