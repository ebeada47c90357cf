"""Bytes on the disk: their hashes, and when they are really there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["flush", "flush_tree", "hashes_below", "sha256_of"]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_below(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by name relative to it, in the order of names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def flush_tree(folder: Path) -> None:
    """Returns when every file and folder below `folder`, and it itself, are on the disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Returns when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
