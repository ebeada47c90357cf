"""Content hashes of everything a run reads, so that resuming notices a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cabochon import folders
from cabochon.cli.settings import RunSettings
from cabochon.core.errors import DataError
from cabochon.data.corpus import standard_library
from cabochon.data.documents import content_hash
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import hashes_below, sha256_of

__all__ = ["fingerprints", "unchanged"]


def fingerprints(
    run: RunSettings, tokenizer: Tokenizer, models: Mapping[str, Path]
) -> dict[str, Any]:
    """Seed, tokenizer, data files and weight files, as a run's manifest keeps them.

    Raises:
        DataError: a data file does not exist, or is none that can be read again.
        FolderError: a model folder is incomplete.
    """
    return {
        "seed": run.seed,
        "tokenizer": tokenizer.fingerprint(),
        "data": {source: _content(source) for source in run.data},
        "weights": {name: folders.fingerprint(folder) for name, folder in models.items()},
    }


@contextmanager
def unchanged(names: Iterable[str]) -> Iterator[None]:
    """Hashes taken and files read within the block are of the same bytes.

    Args:
        names: files and folders; others, such as `stdlib`, are passed over.

    Raises:
        DataError: a file was written, or came or went, during the block; it is named.
    """
    paths = [Path(name) for name in names]
    before = _states(paths)
    yield
    after = _states(paths)
    if before != after:
        changed = next(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        raise DataError(
            f"{changed} was changed while it was being read; begin again when nothing writes there"
        )


def _states(paths: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """What a write to any of the files changes: inode, size and time of modification."""
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    states = {path: path.stat() for path in files}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states.items()}


def _content(source: str) -> str | dict[str, str]:
    if source == "stdlib":
        return content_hash(standard_library().train)
    path = Path(source)
    if path.is_dir():
        return hashes_below(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if not path.is_file():
        raise DataError(
            f"{path} is a pipe or a device, which can be read once; a run reads its data again "
            "when it is resumed: write it into a file first"
        )
    return sha256_of(path)
