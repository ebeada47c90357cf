"""Episodes onto the disk, so that a killed process loses none that was written.

Records go to a journal, framed and checksummed, and reach the system at once. A full journal
becomes a shard: written aside, flushed, renamed; then `dataset_info.json` lists it; then the
journal is emptied. Whatever moment a process dies at, the closed shards are whole and listed, and
the next writer that appends finds the journal, keeps every record in it that is whole, and says
so. The first frame of a journal says which shard it will be, so that none is stored twice. An empty
frame ends what belongs together: of half a group, nothing is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.coding import encode_episode
from cabochon.data.rlds.frames import FRAME_BYTES, framed, read_frame, whole_frames
from cabochon.data.rlds.layout import (
    DatasetInfo,
    SplitInfo,
    is_dataset,
    journal_path,
    read_info,
    read_notes,
    read_spec,
    shard_path,
    write_info,
)
from cabochon.data.rlds.records import Episode
from cabochon.data.rlds.shards import FORMATS, ShardFormat, write_shard
from cabochon.data.rlds.spec import Spec
from cabochon.data.rlds.validation import check
from cabochon.files import whole

__all__ = ["EpisodeWriter", "Unfinished", "unfinished"]

_TOGETHER = b""
"""The frame that ends a group in the journal; no episode is encoded as nothing."""


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What a writer that is at work, or was killed, has not yet put into a closed shard."""

    split: str
    episodes: int
    """Whole ones; the next writer that appends to the split keeps them."""
    complaint: str
    """What is wrong behind them; empty if nothing."""

    def text(self) -> str:
        """In a sentence."""
        behind = f"; behind them: {self.complaint}" if self.complaint else ""
        return (
            f"a writer is at work or was killed; {self.episodes} whole episodes are outside of "
            f"closed shards (EpisodeWriter with append=True keeps them){behind}"
        )


class EpisodeWriter:
    """Writes one split of a dataset. Close it, or use it in a `with` block.

    Args:
        folder: the dataset's. Made if it is absent.
        spec: what episodes consist of; inferred from the first one when absent.
        name: of the dataset; part of the file names.
        version: of the dataset.
        split: which one to write.
        format: of the shards; that of the dataset where one is there.
        append: go on where a dataset is; otherwise the split must not be there.
        episodes_per_shard: the most episodes of a shard.
        shard_bytes: about the most bytes of a shard.
        notes: for `cabochon.json`; only plain JSON.

    Raises:
        DataError: the split is there and `append` is not set, it is of another specification, or
            another process is writing it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        spec: Spec | None = None,
        name: str = "episodes",
        version: str = "1.0.0",
        split: str = "train",
        format: ShardFormat | None = None,
        append: bool = False,
        episodes_per_shard: int = 1000,
        shard_bytes: int = 2**28,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        if episodes_per_shard < 1 or shard_bytes < 1:
            raise ConfigError("episodes_per_shard and shard_bytes must be at least 1")
        if format is not None and format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        self.folder, self.split = Path(folder), split
        self.spec = spec
        self.notes = dict(notes or {})
        self.limits = (episodes_per_shard, shard_bytes)
        self.recovered = 0
        """Episodes of a killed writer that were found and kept."""
        self._journal: IO[bytes] | None = None
        self._count = self._bytes = 0
        self._closed = False
        self.info = DatasetInfo(name=name, version=version, format=format or FORMATS[0], splits={})
        if is_dataset(self.folder):
            self._join(format, append, notes)
        if self.spec is not None:
            self._begin()

    def write(self, episode: Episode) -> None:
        """Adds an episode; when this returns, no death of this process can lose it.

        Raises:
            DataError: the episode breaks a rule of the format, or is not of the specification.
        """
        self.write_all([episode])

    def write_all(self, episodes: Iterable[Episode]) -> None:
        """Adds episodes that belong together: one shard has all of them, or a death none."""
        if self._closed:
            raise DataError("the writer is closed")
        self._append([self._record(episode) for episode in episodes])
        if self._count >= self.limits[0] or self._bytes >= self.limits[1]:
            self.close_shard()

    def _record(self, episode: Episode) -> bytes:
        check(episode)
        if episode.alignment != "SAR":
            raise DataError(
                f"the steps are aligned {episode.alignment}; files hold SAR: use "
                "rlds.alignment.realigned first"
            )
        declared = bool(self.notes.get("last_step_valid", False))
        if episode.last_step_valid != declared:
            raise DataError(
                f"the episode says last_step_valid={episode.last_step_valid}, the dataset's notes "
                f"{declared}; a dataset is one or the other: "
                'EpisodeWriter(notes={"last_step_valid": ...})'
            )
        if self.spec is None:
            self.spec = Spec.of(episode)
            self._begin()
        return encode_episode(self.spec, episode)

    def close_shard(self) -> None:
        """Makes a closed shard of what has been written since the last one, if anything was."""
        if self._count:
            assert self._journal is not None
            records = _journal_records(self._journal_path())
            self.info = _pour(self.folder, self.info, self.split, records)
        self._empty()

    def close(self) -> None:
        """Closes the last shard. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._journal is not None:
            self.close_shard()
            self._journal_path().unlink()
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _join(
        self, format: ShardFormat | None, append: bool, notes: Mapping[str, Any] | None
    ) -> None:
        self.info, there = read_info(self.folder), read_spec(self.folder)
        if self.split in self.info.splits and not append:
            raise DataError(
                f"{self.folder} already has a split {self.split!r}; append=True goes on with it"
            )
        if self.spec is not None and self.spec != there:
            raise DataError(f"{self.folder} holds episodes of other features; write elsewhere")
        if format is not None and format != self.info.format:
            raise DataError(f"{self.folder} holds files of format {self.info.format}, not {format}")
        found = read_notes(self.folder)
        if notes is not None and found != dict(notes):
            raise DataError(f"{self.folder} is noted as {found}, got {dict(notes)}")
        self.spec, self.notes = there, found

    def _begin(self) -> None:
        """The dataset's files, and this process's hold on the split's journal."""
        assert self.spec is not None
        with _alone(self.folder):
            if is_dataset(self.folder):
                self.info = read_info(self.folder)
                spec = notes = None
            else:
                spec, notes = self.spec, self.notes
            if self.split not in self.info.splits:
                self.info = self.info.with_split(SplitInfo(name=self.split))
            write_info(self.folder, self.info, spec=spec, notes=notes)
        if "{SHARD_INDEX}" not in self.info.splits[self.split].template:
            raise DataError(
                f"the files of split {self.split!r} are named by how many there are, so none can "
                "be added; write the new episodes as another split"
            )
        self._journal = self._journal_path().open("ab")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            self._closed = True
            raise DataError(f"another process is writing {self._journal_path()}") from None
        self.info = read_info(self.folder)
        self._recover()
        self._empty()

    def _recover(self) -> None:
        left = {each.split: each for each in unfinished(self.folder, self.info)}.get(self.split)
        if left is not None and left.episodes:
            records = _journal_records(self._journal_path())
            self.info = _pour(self.folder, self.info, self.split, records)
            self.recovered = left.episodes

    def _empty(self) -> None:
        """A journal with nothing but its head."""
        if self._journal is None:
            return
        self._journal.seek(0)
        self._journal.truncate()
        shard = len(self.info.splits[self.split].shard_lengths)
        self._journal.write(framed(json.dumps({"shard": shard}).encode()))
        self._journal.flush()
        self._count = self._bytes = 0

    def _append(self, records: list[bytes]) -> None:
        if not records:
            return
        assert self._journal is not None
        self._journal.write(b"".join(map(framed, (*records, _TOGETHER))))
        self._journal.flush()
        self._count += len(records)
        self._bytes += sum(len(record) for record in records)

    def _journal_path(self) -> Path:
        return journal_path(self.folder, self.info, self.split)


def unfinished(folder: Path, info: DatasetInfo) -> Iterator[Unfinished]:
    """Of every split, what is not in a closed shard, if anything is."""
    for name, split in info.splits.items():
        path = journal_path(folder, info, name)
        if not path.is_file():
            continue
        whole, half, complaint = _journal_frames(path)
        listed = _journal_shard(path) < len(split.shard_lengths)
        count = 0 if listed else len(whole)
        if half and not complaint:
            complaint = f"{half} episodes of a group that is not whole"
        if count or complaint:
            yield Unfinished(split=name, episodes=count, complaint=complaint)


def _journal_shard(path: Path) -> int:
    """The shard that a journal will be; -1 if it was never begun."""
    offsets, _ = whole_frames(path)
    if len(offsets) < 2:
        return -1
    with path.open("rb") as file:
        return int(json.loads(read_frame(file, 0, path))["shard"])


def _journal_records(path: Path) -> Iterator[bytes]:
    whole, _, _ = _journal_frames(path)
    with path.open("rb") as file:
        for offset in whole:
            yield read_frame(file, offset, path)


def _journal_frames(path: Path) -> tuple[list[int], int, str]:
    """Where the records of whole groups are, how many are behind them, and what is wrong there."""
    offsets, complaint = whole_frames(path)
    starts, lengths = offsets[1:-1].tolist(), np.diff(offsets[1:]) - FRAME_BYTES
    ends = np.flatnonzero(lengths == len(_TOGETHER))
    behind = int(ends[-1]) + 1 if len(ends) else 0
    whole = [starts[place] for place in np.flatnonzero(lengths[:behind])]
    return whole, len(starts) - behind, complaint


def _pour(folder: Path, info: DatasetInfo, name: str, records: Iterator[bytes]) -> DatasetInfo:
    """A closed shard of these records, listed."""
    split = info.splits[name]
    counted = _Counted(records)
    place = shard_path(folder, info, split, len(split.shard_lengths))
    with whole(place) as path:
        write_shard(path, info.format, counted)  # type: ignore[arg-type]
    split = replace(
        split,
        shard_lengths=(*split.shard_lengths, counted.count),
        bytes=split.bytes + counted.bytes,
    )
    with _alone(folder):
        info = read_info(folder).with_split(split)
        write_info(folder, info)
    return info


class _Counted:
    """Records, and how many and how long those were that have passed."""

    def __init__(self, records: Iterator[bytes]) -> None:
        self.records, self.count, self.bytes = records, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        for record in self.records:
            self.count += 1
            self.bytes += len(record)
            yield record


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other writer changes the folder's `dataset_info.json`.

    The folder above is held: `files.whole` holds the folder itself while it works.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder.absolute().parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk that knows no locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
