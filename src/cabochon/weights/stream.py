"""Sums and inner products of tensors that stay on the disk: read and written a slice at a time.

numpy alone: a merge should start at once and take no more memory than its slices. bfloat16, which
numpy lacks, is the upper half of a float32. All arithmetic is in float64 and rounded once, so that
the result is the same as that of `interpolate`, whatever the types and the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import FolderError, NonFinite
from cabochon.weight_files import INDEX, SINGLE, Stored, write_json

__all__ = [
    "FLOATS",
    "Piece",
    "Threads",
    "elements",
    "equal",
    "inner_products",
    "shards_of",
    "threads",
    "write_tensors",
]

Array: TypeAlias = NDArray[Any]

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The types that are added up, and the bytes of each."""

_STORAGE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST = {
    "F64": (2 - 2**-52) * 2.0**1023, "F32": (2 - 2**-23) * 2.0**127,
    "F16": (2 - 2**-10) * 2.0**15, "BF16": (2 - 2**-7) * 2.0**127,
}  # fmt: skip

SLICE = 1 << 16
"""Elements at a time: operands and result stay in a core's own cache."""
SPAN = 1 << 21
"""Elements that one thread takes on at a time."""
UNTHREADED = 8192
"""Elements of an inner product that the linear algebra library does not share among threads."""
READ = 1 << 20
"""Bytes at a time, where bytes are only looked at."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor that is to be written: a sum over stored ones."""

    name: str
    type: str
    """As safetensors names it."""
    terms: tuple[tuple[Stored, float], ...]
    """Stored tensors of one shape, and what each is multiplied by. One term of a type that is no
    floating-point type is copied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.terms[0][0].shape

    @property
    def elements(self) -> int:
        """How many."""
        return elements(self.terms[0][0])

    @property
    def nbytes(self) -> int:
        """Of the tensor as it will be written."""
        return self.elements * FLOATS[self.type] if self.type in FLOATS else self.terms[0][0].nbytes


def elements(stored: Stored) -> int:
    """How many numbers a tensor has."""
    return int(np.prod(stored.shape, dtype=np.int64))


class Threads:
    """Threads that work on spans of tensors, and the files that they have open."""

    def __init__(self, count: int) -> None:
        self._workers = ThreadPoolExecutor(count, thread_name_prefix="merge")
        self._readers = ThreadPoolExecutor(count, thread_name_prefix="hash")
        self._stop = Event()
        self._lock = Lock()
        self._open: dict[Path, int] = {}

    def close(self) -> None:
        """Gives up what has not begun, waits for what has, and closes the files."""
        self._stop.set()
        for pool in (self._workers, self._readers):
            pool.shutdown(wait=True, cancel_futures=True)
        for file in self._open.values():
            os.close(file)

    def open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """The descriptor of a file, the same one every time."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, flags, 0o666)
            return self._open[path]

    def spans(self, work: Callable[[int, int], Any], count: int) -> list[Future[Any]]:
        """The results of `work(first, last)` over the spans of `count` elements, in order."""
        return [
            self._workers.submit(self._unless_stopped, work, first, min(first + SPAN, count))
            for first in range(0, count, SPAN)
        ]

    def hashed(self, path: Path) -> Future[str]:
        """The hash of a file (BLAKE2b, what b2sum prints), taken beside the other work."""
        return self._readers.submit(self._digest, path)

    def flushed(self, file: int) -> Future[None]:
        """Done when a file's bytes are on the disk; beside the other work."""
        return self._readers.submit(os.fsync, file)

    def _unless_stopped(self, work: Callable[[int, int], Any], first: int, last: int) -> Any:
        if self._stop.is_set():
            return None
        with np.errstate(all="ignore"):  # NaN and infinities are looked for in the results
            return work(first, last)

    def _digest(self, path: Path) -> str:
        digest = hashlib.blake2b()
        with path.open("rb", buffering=0) as file:
            block = bytearray(READ)
            while not self._stop.is_set() and (size := file.readinto(block)):
                digest.update(memoryview(block)[:size])
        return digest.hexdigest()


@contextmanager
def threads(count: int) -> Iterator[Threads]:
    """`count` threads for arithmetic, and as many that hash, until the block ends."""
    held = Threads(count)
    try:
        yield held
    finally:
        held.close()


def inner_products(
    name: str, base: Stored, models: Sequence[Stored], held: Threads
) -> Callable[[], Array]:
    """M M float64: <theta_i - base, theta_j - base>, once the call that is returned is made.

    That call raises NonFinite where a tensor holds NaN or an infinity.
    """
    files = [held.open(stored.file) for stored in (base, *models)]
    # Differences of two short numbers are exact in float32, unless one is thousands of times the
    # other, and three times as quick there.
    short = all(FLOATS[stored.type] == 2 for stored in (base, *models))

    def work(first: int, last: int) -> Array:
        wide = [np.empty(SLICE, np.uint32) for _ in files]
        raw = [np.empty(SLICE, "<f8") for _ in files]
        deltas = [np.empty(SLICE) for _ in models]
        moved = np.empty(SLICE, np.float32 if short else np.float64)
        products = np.zeros((len(models), len(models)))
        for at in range(first, last, SLICE):
            count = min(SLICE, last - at)
            origin, *values = (
                _numbers(file, stored, at, count, room, into)
                for file, stored, room, into in zip(files, (base, *models), raw, wide, strict=True)
            )
            for delta, value in zip(deltas, values, strict=True):
                np.subtract(value, origin, out=moved[:count], dtype=moved.dtype)
                np.copyto(delta[:count], moved[:count])
            for i, a in enumerate(deltas):
                for j, b in enumerate(deltas[: i + 1]):
                    products[i, j] += _dot(a[:count], b[:count])
        return products

    spans = held.spans(work, elements(base))

    def result() -> Array:
        lower = np.zeros((len(models), len(models)))
        for span in spans:
            lower += span.result()
        if not np.isfinite(lower).all():
            raise NonFinite(_not_finite(name, (base, *models)))
        return np.asarray(lower + np.tril(lower, -1).T)

    return result


def equal(stored: Sequence[Stored], held: Threads) -> bool:
    """Whether these tensors are the same, byte for byte."""
    if len({each.nbytes for each in stored}) > 1:
        return False
    rooms = [np.empty(READ, np.uint8) for _ in stored]
    for at in range(0, stored[0].nbytes, READ):
        count = min(READ, stored[0].nbytes - at)
        first, *others = (
            _bytes(held.open(each.file), each, at, room[:count])
            for each, room in zip(stored, rooms, strict=True)
        )
        if any(not np.array_equal(first, other) for other in others):
            return False
    return True


def shards_of(pieces: Iterable[Piece], shard_bytes: int) -> dict[str, list[Piece]]:
    """Which file takes which tensors: files of at most `shard_bytes`, larger tensors alone.

    Within a file the types with the longest numbers come first, which keeps every tensor aligned.
    """
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    ordered = [sorted(shard, key=lambda piece: -FLOATS.get(piece.type, 0)) for shard in shards]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    total = len(ordered)
    return {f"model-{i + 1:05d}-of-{total:05d}.safetensors": s for i, s in enumerate(ordered)}


def write_tensors(
    folder: Path, shards: Mapping[str, Sequence[Piece]], held: Threads
) -> dict[str, str]:
    """Write the files, flush them, read them again, and compare.

    Returns:
        The hash of each file (BLAKE2b), of the bytes that were read again.

    Raises:
        OSError: a file cannot be written.
        FolderError: what was read is not what was written.
        NonFinite: a sum is NaN or infinite.
    """
    hashes = {}
    for file, pieces in shards.items():
        hashes[file] = _write_file(folder / file, pieces, held)
    if len(shards) > 1:
        where = {piece.name: file for file, pieces in shards.items() for piece in pieces}
        size = sum(piece.nbytes for pieces in shards.values() for piece in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index)
    return hashes


def _write_file(path: Path, pieces: Sequence[Piece], held: Threads) -> str:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        offsets = [at, at + piece.nbytes]
        entries[piece.name] = {"dtype": piece.type, "shape": piece.shape, "data_offsets": offsets}
        at += piece.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    head = len(text).to_bytes(8, "little") + text
    target = held.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    _write_all(target, head, 0)
    written = []
    at = len(head)
    for piece in pieces:
        work = _adder if piece.type in FLOATS else _copier
        count = piece.elements if piece.type in FLOATS else piece.nbytes
        written += held.spans(partial(work, piece, held, target, at), count)
        at += piece.nbytes
    sums = [(len(head), zlib.crc32(head)), *(span.result() for span in written)]
    flushed = held.flushed(target)  # the disk works while the file is read again
    digest = _read_again(target, path, sums)
    flushed.result()
    return digest


def _adder(
    piece: Piece, held: Threads, target: int, start: int, first: int, last: int
) -> tuple[int, int]:
    """Write elements `first` to `last` of a sum; how many bytes they are, and their CRC-32."""
    wide, raw = np.empty(SLICE, np.uint32), np.empty(SLICE, "<f8")
    total, term = np.empty(SLICE), np.empty(SLICE)
    rounded, carry = np.empty(SLICE, "<f8"), np.empty(SLICE, np.uint32)
    width, crc = FLOATS[piece.type], 0
    for at in range(first, last, SLICE):
        count = min(SLICE, last - at)
        for place, (stored, coefficient) in enumerate(piece.terms):
            into = term if place else total
            value = _numbers(held.open(stored.file), stored, at, count, raw, wide)
            np.multiply(value, coefficient, out=into[:count], dtype=np.float64)
            if place:
                np.add(total[:count], term[:count], out=total[:count])
        _check_finite(piece, total[:count])
        data = _rounded(total[:count], piece.type, rounded, wide, carry)
        _write_all(target, data, start + at * width)
        crc = zlib.crc32(data, crc)
    return (last - first) * width, crc


def _copier(
    piece: Piece, held: Threads, target: int, start: int, first: int, last: int
) -> tuple[int, int]:
    """Write bytes `first` to `last` of a stored tensor; how many they are, and their CRC-32."""
    stored = piece.terms[0][0]
    data = _bytes(held.open(stored.file), stored, first, np.empty(last - first, np.uint8))
    _write_all(target, data.data, start + first)
    return last - first, zlib.crc32(data.data)


def _numbers(file: int, stored: Stored, first: int, count: int, raw: Array, wide: Array) -> Array:
    """Elements of a stored tensor as floating-point numbers: a view of `raw` or of `wide`."""
    kind = np.dtype(_STORAGE[stored.type])
    values = raw.view(kind)[:count]
    _bytes(file, stored, first * kind.itemsize, values.view(np.uint8))
    if stored.type != "BF16":
        return values
    np.left_shift(values, 16, out=wide[:count], dtype=np.uint32, casting="unsafe")
    return wide.view(np.float32)[:count]


def _bytes(file: int, stored: Stored, first: int, into: Array) -> Array:
    at, view = stored.start + first, into.data
    while view:
        count = os.preadv(file, [view], at)
        if not count:
            raise FolderError(f"{stored.file} became shorter while it was read; merge again")
        at, view = at + count, view[count:]
    return into


def _rounded(total: Array, kind: str, raw: Array, wide: Array, carry: Array) -> memoryview:
    """The bytes of float64 numbers in another type, rounded to nearest, ties to even.

    Types shorter than float32 are rounded by way of it, as torch does.
    """
    count = len(total)
    result = raw.view(_STORAGE[kind])[:count]
    bits, odd = wide[:count], carry[:count]
    if FLOATS[kind] > 2:
        np.copyto(result, total, casting="unsafe")
        return result.view(np.uint8).data
    np.copyto(bits.view(np.float32), total, casting="unsafe")
    if kind == "F16":
        np.copyto(result, bits.view(np.float32), casting="unsafe")
        return result.view(np.uint8).data
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, 16, out=result, casting="unsafe")
    return result.view(np.uint8).data


def _check_finite(piece: Piece, total: Array) -> None:
    if -_LARGEST[piece.type] <= total.min() and total.max() <= _LARGEST[piece.type]:
        return  # false of NaN too
    if np.isfinite(total).all():
        raise NonFinite(
            f"{piece.name} holds numbers too large for {piece.type}; choose a wider type"
        )
    raise NonFinite(_not_finite(piece.name, [stored for stored, _ in piece.terms]))


def _not_finite(name: str, stored: Sequence[Stored]) -> str:
    files = ", ".join(str(each.file) for each in stored)
    return f"{name} holds NaN or an infinity in one of {files}; a diverged model cannot be merged"


def _dot(a: Array, b: Array) -> float:
    """The inner product, in blocks that stay on this thread."""
    return sum(
        float(np.dot(a[i : i + UNTHREADED], b[i : i + UNTHREADED]))
        for i in range(0, len(a), UNTHREADED)
    )


def _write_all(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        at, view = at + count, view[count:]


def _read_again(file: int, path: Path, sums: Sequence[tuple[int, int]]) -> str:
    """The hash of a file whose parts have these lengths and CRC-32s."""
    digest, at, room = hashlib.blake2b(), 0, bytearray(READ)
    for size, expected in sums:
        found, end = 0, at + size
        while at < end:
            part = memoryview(room)[: min(READ, end - at)]
            count = os.preadv(file, [part], at)
            if not count:
                raise FolderError(f"{path.name} is cut short on the disk; is it full?")
            digest.update(part[:count])
            found = zlib.crc32(part[:count], found)
            at += count
        if found != expected:
            raise FolderError(
                f"{path.name}, read again, is not what was written (byte {at - size} to {at}); "
                "the disk or the memory is faulty"
            )
    return digest.hexdigest()
