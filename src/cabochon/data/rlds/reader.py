"""Episodes from the disk: by their number, in order, or part of a split."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.alignment import realigned
from cabochon.data.rlds.coding import decode_episode, is_invalid_record
from cabochon.data.rlds.layout import (
    DatasetInfo,
    SplitInfo,
    folder_of,
    read_info,
    read_notes,
    read_spec,
    shard_path,
)
from cabochon.data.rlds.records import Alignment, Episode
from cabochon.data.rlds.shards import RecordFile, open_shard
from cabochon.data.rlds.validation import findings
from cabochon.data.rlds.writer import Unfinished, unfinished

__all__ = ["Episodes", "validate"]

_PART = re.compile(r"\s*(?P<name>[\w.-]+?)\s*(?:\[(?P<from>-?\d*%?):(?P<to>-?\d*%?)\])?\s*")


class Episodes(Sequence[Episode]):
    """The episodes of a split, or of parts of splits, by their number. Opening reads no episode.

    Args:
        path: the dataset's folder, or one above it that holds no other dataset.
        split: `train`, `train[10:20]`, `train[:50%]`, `train[-5:]`, `train+test`; percentages are
            rounded to the nearest episode, as TensorFlow Datasets does.
        images: decode pictures; otherwise they stay the bytes of their files.
        verify: compare the checksums of tfrecord files (array_record always does).
        alignment: what the files hold; other than SAR is converted. None: what `cabochon.json`
            says, or SAR.
        last_step_valid: the last step holds a real action and reward. None: what `cabochon.json`
            says, or False. It is never guessed.
        keep_invalid: keep episodes whose metadata says `invalid`. Otherwise, where there is such
            a field, every record is read once when a length or an episode is first asked for; to
            see what is whole in a damaged dataset, keep them.

    Raises:
        FolderError: there is no dataset.
        DataError: it is damaged, or has no such split.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        images: bool = True,
        verify: bool = True,
        alignment: Alignment | None = None,
        last_step_valid: bool | None = None,
        keep_invalid: bool = False,
    ) -> None:
        self.folder = folder_of(path)
        self.info, self.spec = read_info(self.folder), read_spec(self.folder)
        self.notes = read_notes(self.folder)
        self.images, self.verify, self.keep_invalid = images, verify, keep_invalid
        self.alignment: Alignment = alignment or self.notes.get("alignment", "SAR")
        said = self.notes.get("last_step_valid", False)
        self.last_step_valid = bool(said if last_step_valid is None else last_step_valid)
        self._chosen = _chosen(self.info, split, self.folder)
        self._shards: dict[tuple[str, int], RecordFile] = {}
        self._owner = os.getpid()
        self._inherited: list[object] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        """An episode, or the list of those of a slice."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Episode]:
        """Several episodes, in the order asked for; each shard is asked once."""
        return [self._episode(record) for record in self._records(self._rows[list(indices)])]

    def __iter__(self) -> Iterator[Episode]:
        """All of them, a few records in memory at a time."""
        for start in range(0, len(self), 16):
            yield from self.__getitems__(range(start, min(start + 16, len(self))))

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind: another process opens its own."""
        return {**self.__dict__, "_shards": {}, "_inherited": []}

    def episode_lengths(self) -> NDArray[np.int64]:
        """Steps of every episode; their records are read, their columns not decoded."""
        from cabochon.data.rlds.example import decode_example

        flag = "steps/is_first"
        lengths = [
            len(decode_example(record, {flag})[flag])
            for start in range(0, len(self), 64)
            for record in self._records(self._rows[start : start + 64])
        ]
        return np.array(lengths, np.int64)

    @property
    def unfinished(self) -> tuple[Unfinished, ...]:
        """What a writer that is at work, or was killed, left outside of closed shards."""
        return tuple(unfinished(self.folder, self.info))

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """Which of the chosen records are asked for; only here invalid ones are looked for."""
        rows = np.arange(len(self._chosen))
        if self.keep_invalid or "invalid" not in self.spec.metadata:
            return rows
        valid = [
            not is_invalid_record(record)
            for start in range(0, len(rows), 64)
            for record in self._records(rows[start : start + 64])
        ]
        return rows[np.array(valid, bool)] if valid else rows

    def _records(self, rows: NDArray[np.int64]) -> list[bytes]:
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for place, row in enumerate(rows.tolist()):
            split, number = self._chosen[row]
            ends = np.cumsum(self.info.splits[split].shard_lengths)
            shard = bisect_right(ends.tolist(), number)
            within = number - (int(ends[shard - 1]) if shard else 0)
            wanted.setdefault((split, shard), []).append((place, within))
        found: dict[int, bytes] = {}
        for (split, shard), pairs in wanted.items():
            records = self._shard(split, shard).read([within for _, within in pairs])
            found |= dict(zip((place for place, _ in pairs), records, strict=True))
        return [found[place] for place in range(len(rows))]

    def _shard(self, name: str, index: int) -> RecordFile:
        if self._owner != os.getpid():
            # A forked worker shares its parent's place in a file, and has none of its threads: it
            # neither uses nor closes what the parent opened.
            self._inherited.append(self._shards)
            self._shards, self._owner = {}, os.getpid()
        if (name, index) not in self._shards:
            split = self.info.splits[name]
            path = shard_path(self.folder, self.info, split, index)
            shard = open_shard(path, self.info.format, verify=self.verify)
            if len(shard) != split.shard_lengths[index]:
                raise DataError(
                    f"{path} holds {len(shard)} episodes, dataset_info.json says "
                    f"{split.shard_lengths[index]}: it is cut short or of another dataset"
                )
            self._shards[name, index] = shard
        return self._shards[name, index]

    def _episode(self, record: bytes) -> Episode:
        episode = decode_episode(self.spec, record, images=self.images)
        marked = replace(episode, alignment=self.alignment, last_step_valid=self.last_step_valid)
        return realigned(marked, "SAR")


def validate(path: str | Path, *, last_step_valid: bool | None = None) -> Iterator[str]:
    """Everything that is wrong with a dataset, in words, each naming split and episode.

    Every record of every split is read; a shard that cannot be read is one finding and the others
    are still looked at.
    """
    folder = folder_of(path)
    for left in unfinished(folder, read_info(folder)):
        yield f"{left.split}: {left.text()}"
    for name, split in read_info(folder).splits.items():
        yield from _of_split(folder, name, split, last_step_valid)


def _of_split(
    folder: Path, name: str, split: SplitInfo, last_step_valid: bool | None
) -> Iterator[str]:
    start = 0
    for shard, length in enumerate(split.shard_lengths):
        part = f"{name}[{start}:{start + length}]"
        try:
            episodes = Episodes(folder, part, keep_invalid=True, last_step_valid=last_step_valid)
            for number in range(len(episodes)):
                try:
                    for finding in findings(episodes[number]):
                        yield f"{name}, episode {start + number}: {finding}"
                except DataError as error:
                    if number == 0 and not episodes._shards:
                        raise
                    yield f"{name}, episode {start + number}: {error}"
        except DataError as error:
            yield f"{name}, shard {shard}: {error}"
        start += length


def _chosen(info: DatasetInfo, expression: str, folder: Path) -> list[tuple[str, int]]:
    """Split and number of every record that the expression names."""
    chosen: list[tuple[str, int]] = []
    for part in expression.split("+"):
        found = _PART.fullmatch(part)
        if found is None:
            raise ConfigError(
                f"split {expression!r} cannot be read; write train, train[10:20], train[:50%] or "
                "train+test"
            )
        if found["name"] not in info.splits:
            known = ", ".join(info.splits) or "none"
            raise DataError(f"{folder} has no split {found['name']!r}; it has {known}")
        count = info.splits[found["name"]].episodes
        begin = _border(found["from"], count, 0)
        end = _border(found["to"], count, count)
        chosen += [(found["name"], number) for number in range(begin, end)]
    return chosen


def _border(text: str | None, count: int, absent: int) -> int:
    if not text:
        return absent
    number = int(text.rstrip("%"))
    if text.endswith("%"):
        if abs(number) > 100:
            raise ConfigError(f"{text} lies outside of -100% to 100%")
        number = round(number * count / 100)
    if abs(number) > count:
        raise DataError(f"a split of {count} episodes has no place {text}")
    return number + count if number < 0 or (number == 0 and text.startswith("-")) else number
