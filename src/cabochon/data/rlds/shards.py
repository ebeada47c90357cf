"""The files that hold a split's records: array_record (random access by itself) or tfrecord.

`array_record` is the library by that name; of a tfrecord the headers are scanned once, when its
first record is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from cabochon.core.errors import DataError, MissingExtra
from cabochon.data.rlds.frames import framed, offsets_of, read_frame

__all__ = ["FORMATS", "RecordFile", "ShardFormat", "open_shard", "write_shard"]

ShardFormat = Literal["array_record", "tfrecord"]
FORMATS: tuple[ShardFormat, ...] = ("array_record", "tfrecord")


class RecordFile(Protocol):
    """Records by their number."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int], /) -> list[bytes]:
        """The records with these numbers, in their order."""
        ...


def open_shard(path: Path, format: str, *, verify: bool = True) -> RecordFile:
    """The records of a closed shard.

    Raises:
        DataError: the file is missing, cut short or damaged, or the format is not known.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing, but dataset_info.json lists it; copy it again")
    if format == "array_record":
        return _ArrayRecords(path)
    if format == "tfrecord":
        return _Frames(path, verify)
    raise DataError(f"files of format {format!r} cannot be read; known are {', '.join(FORMATS)}")


def write_shard(path: Path, format: ShardFormat, records: Iterable[bytes]) -> None:
    """A new file with these records.

    Raises:
        OSError: it cannot be written: the disk is full, or the folder is for reading alone.
    """
    if format == "tfrecord":
        with path.open("wb") as file:
            for record in records:
                file.write(framed(record))
        return
    library = _library()
    try:
        writer = library.ArrayRecordWriter(str(path), "group_size:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    except RuntimeError as error:  # of any failure of the system, which a caller tells from a fault
        raise OSError(f"{path} could not be written: {error}") from error


class _Frames:
    def __init__(self, path: Path, verify: bool) -> None:
        self.path, self.verify = path, verify
        self.offsets = offsets_of(path)
        self.file = path.open("rb")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def read(self, rows: Sequence[int], /) -> list[bytes]:
        return [
            read_frame(self.file, int(self.offsets[row]), self.path, verify=self.verify)
            for row in rows
        ]


class _ArrayRecords:
    def __init__(self, path: Path) -> None:
        self.path = path
        with _told(path):
            self.reader: Any = _library().ArrayRecordReader(str(path))
            self.count = int(self.reader.num_records())

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int], /) -> list[bytes]:
        with _told(self.path):
            records: list[bytes] = list(self.reader.read(list(rows)))
        if len(records) != len(rows):
            raise DataError(f"{self.path} gave {len(records)} of {len(rows)} records; damaged?")
        return records


@contextmanager
def _told(path: Path) -> Any:
    """The library's errors name no file."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise DataError(f"{path} is cut short or damaged: {error}") from None


def _library() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise MissingExtra("array-record", "rlds", "reading or writing array_record") from error
    return array_record_module
