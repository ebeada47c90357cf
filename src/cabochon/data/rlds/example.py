"""`tf.train.Example` as bytes and back: a map from names to lists, in protocol-buffer wire form.

    Example{1: Features}  Features{1: map<string, Feature>}
    Feature{1: BytesList | 2: FloatList | 3: Int64List}, each with the one field 1, repeated

Numbers are packed, and packed lists are read and written as whole arrays: a library of protocol
buffers would make a Python object of every number. Lists that are not packed are read too. The
tests compare with such a library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError

__all__ = ["Values", "decode_example", "encode_example"]

Values = list[bytes] | NDArray[np.float32] | NDArray[np.int64]

_BYTES, _FLOATS, _INTEGERS = 1, 2, 3
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def encode_example(
    features: Mapping[str, Sequence[bytes] | NDArray[np.float32] | NDArray[np.int64]],
) -> bytes:
    """The example's bytes. Float32 arrays become float lists, int64 arrays integer lists."""
    entries = []
    for name, values in features.items():
        if not isinstance(values, np.ndarray):
            kind, inner = _BYTES, b"".join(_field(1, item) for item in values)
        elif values.dtype == np.float32:
            kind, inner = _FLOATS, _field(1, values.astype("<f4", copy=False).tobytes())
        else:
            kind, inner = _INTEGERS, _field(1, _packed(values.astype(np.int64, copy=False)))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, _field(kind, inner))))
    return _field(1, b"".join(entries))


def decode_example(record: bytes, only: set[str] | None = None) -> dict[str, Values]:
    """Name -> its list: bytes, float32 or int64.

    Args:
        record: the example's bytes.
        only: names that are wanted; None is all.

    Raises:
        DataError: the bytes are no example.
    """
    view = memoryview(record)
    found: dict[str, Values] = {}
    try:
        for number, features in _fields(view):
            if number != 1:
                continue
            for inner, entry in _fields(features):
                if inner != 1:
                    continue
                parts = dict(_fields(entry))
                name = bytes(parts.get(1, b"")).decode()
                if only is None or name in only:
                    found[name] = _values(parts.get(2, memoryview(b"")))
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise DataError(f"the record is no tf.train.Example: {error}") from None
    return found


def _values(feature: memoryview) -> Values:
    values: Values = []
    for kind, content in _fields(feature):
        if kind == _BYTES:
            values = [bytes(item) for number, item in _fields(content) if number == 1]
        elif kind == _FLOATS:
            parts = [np.frombuffer(item, "<f4") for number, item in _fields(content) if number == 1]
            values = np.concatenate([np.zeros(0, "<f4"), *parts]) if len(parts) != 1 else parts[0]
        elif kind == _INTEGERS:
            lists = [_unpacked(item) for number, item in _fields(content) if number == 1]
            values = np.concatenate([_unpacked(b""), *lists]) if len(lists) != 1 else lists[0]
    return values


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of every field; of one that is not length-delimited, its own bytes."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint_at(view, at)
        form = tag & 7
        if form == _LENGTH:
            size, at = _varint_at(view, at)
        elif form == _VARINT:
            size = _varint_at(view, at)[1] - at
        elif form in {_FIXED32, _FIXED64}:
            size = 4 if form == _FIXED32 else 8
        else:
            raise ValueError(f"a field of unknown wire type {form}")
        if at + size > end:
            raise ValueError("it ends within a field")
        yield tag >> 3, view[at : at + size]
        at += size


def _varint_at(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _packed(values: NDArray[np.int64]) -> bytes:
    rest = np.ascontiguousarray(values, np.int64).view(np.uint64).ravel()
    if not len(rest) or rest.max() < 0x80:
        return rest.astype(np.uint8).tobytes()
    lengths = np.ones(len(rest), np.int64)
    for place in range(1, 10):
        lengths += rest >= np.uint64(1 << 7 * place)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    out = np.empty(int(ends[-1]), np.uint8)
    for place in range(int(lengths.max())):
        long = lengths > place
        digit = (rest[long] >> np.uint64(7 * place)) & np.uint64(0x7F)
        more = (lengths[long] > place + 1).astype(np.uint8) << 7
        out[starts[long] + place] = digit.astype(np.uint8) | more
    return out.tobytes()


def _unpacked(content: memoryview | bytes) -> NDArray[np.int64]:
    raw = np.frombuffer(content, np.uint8)
    last = raw < 0x80
    if last.all():
        return raw.astype(np.int64)
    if not last[-1]:
        raise ValueError("a list of integers ends within a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a number is longer than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max())):
        long = lengths > place
        digit = (raw[starts[long] + place] & 0x7F).astype(np.uint64)
        values[long] |= digit << np.uint64(7 * place)
    return values.view(np.int64)
