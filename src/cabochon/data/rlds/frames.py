"""TFRecord files: records one behind the other, each with checksums of its length and its bytes.

    u64 length | u32 masked crc32c(length) | the bytes | u32 masked crc32c(bytes)

All numbers are little-endian. The checksum is google-crc32c's, which is what the format is
defined by; the framing itself is these few lines.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError, MissingExtra

__all__ = ["FRAME_BYTES", "framed", "offsets_of", "read_frame", "whole_frames"]

FRAME_BYTES = 16
"""What a frame adds to its record."""

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_LARGEST = 2**40


def framed(record: bytes) -> bytes:
    """The record with its frame."""
    length = len(record).to_bytes(8, "little")
    return b"".join((length, _FOOTER.pack(_masked(length)), record, _FOOTER.pack(_masked(record))))


def offsets_of(path: Path) -> NDArray[np.int64]:
    """Where each record's frame begins, and where the last one ends; only headers are read.

    Raises:
        DataError: the file is cut short, or a length's checksum is wrong; it says at which record.
    """
    offsets, complaint = _scanned(path)
    if complaint:
        raise DataError(f"{path}: {complaint}; the file is damaged")
    return offsets


def whole_frames(path: Path) -> tuple[NDArray[np.int64], str]:
    """The offsets of the frames that are whole, as of `offsets_of`, and what is wrong behind them.

    Of a file whose writer was killed: everything up to the last whole record.
    """
    offsets, complaint = _scanned(path)
    with path.open("rb") as file:
        while len(offsets) > 1:  # the last one may be of the right length and yet not written out
            try:
                read_frame(file, int(offsets[-2]), path)
                break
            except DataError as error:
                complaint, offsets = str(error), offsets[:-1]
    return offsets, complaint


def read_frame(file: IO[bytes], offset: int, path: Path, *, verify: bool = True) -> bytes:
    """The record whose frame begins at `offset`.

    Raises:
        DataError: it is cut short, or its checksum is wrong.
    """
    file.seek(offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{path}: no record begins at byte {offset}; the file is cut short")
    length, check = _HEADER.unpack(header)
    if check != _masked(header[:8]):
        raise DataError(f"{path}: wrong checksum of a length at byte {offset}; it is damaged")
    rest = file.read(length + _FOOTER.size)
    if len(rest) < length + _FOOTER.size:
        raise DataError(f"{path}: the record at byte {offset} is cut short")
    record = rest[:length]
    if verify and _FOOTER.unpack(rest[length:])[0] != _masked(record):
        raise DataError(f"{path}: wrong checksum of the record at byte {offset}; it is damaged")
    return record


def _scanned(path: Path) -> tuple[NDArray[np.int64], str]:
    size = path.stat().st_size
    offsets, complaint, at = [0], "", 0
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                complaint = f"record {len(offsets) - 1} is cut short"
                break
            length, check = _HEADER.unpack(header)
            if check != _masked(header[:8]) or length > _LARGEST:
                complaint = f"wrong checksum of the length of record {len(offsets) - 1}"
                break
            if at + length + FRAME_BYTES > size:
                complaint = f"record {len(offsets) - 1} is cut short"
                break
            at += length + FRAME_BYTES
            offsets.append(at)
    return np.array(offsets, np.int64), complaint


def _masked(data: bytes) -> int:
    try:
        from google_crc32c import value
    except ImportError as error:
        raise MissingExtra("google-crc32c", "rlds", "keeping episodes on the disk") from error
    check: int = value(data)
    return ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF
