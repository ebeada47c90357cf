"""Weights in shared memory: one writer that never waits, any number of readers that see no mixture.

There are several places for a whole set of weights. The writer fills the one that was written
longest ago and then says which is the newest. Each place has a count that is odd while it is being
written (a sequence lock, Lameter 2005): a reader who finds it odd, or changed after the copying,
copies again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cabochon.core.errors import DataError
from cabochon.runtime.memory import Memory
from cabochon.runtime.publishing import NOTHING, check_publication
from cabochon.runtime.records import ALIGNMENT, Bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SharedReader", "SharedWriter"]

HEAD = 4096
"""Bytes before the first place, of which eight integers are used."""

ROOMY = 256 * 2**20
"""Bytes of weights up to which there are three places: a reader then has the time of two
publications to copy one. Bigger ones have two."""

Layout = Mapping[str, tuple[str, list[int], int, int]]
"""Name -> type, shape, where it begins in a place, and how many bytes it takes."""

_COUNT = 0
"""Of publications: the newest is in place count % places."""
_VERSION = 1
_PLACE = 2
"""From here on, for each place, its sequence count and the version in it."""


class SharedWriter:
    """A `Publisher` for processes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._expected = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        layout: dict[str, tuple[str, list[int], int, int]] = {}
        size = 0
        for name, tensor in tensors.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            length = tensor.numel() * tensor.element_size()
            layout[name] = (kind, list(tensor.shape), size, length)
            size += -(-length // ALIGNMENT) * ALIGNMENT
        places = 3 if size <= ROOMY else 2
        self._memory = Memory(HEAD + places * size)
        self._reader = SharedReader(self._memory, layout, places)
        self._head = self._memory.bytes[:HEAD].view(np.int64)
        self._head[_VERSION] = NOTHING

    @property
    def version(self) -> int:
        """As the protocol says."""
        return self._reader.version

    def publish(self, weights: Mapping[str, Tensor], /, version: int) -> None:
        """As the protocol says."""
        check_publication(self._expected, weights, version, self.version)
        head = self._head
        count = int(head[_COUNT]) + 1
        place = _PLACE + 2 * (count % self._reader.places)
        head[place] += 1  # odd: do not read
        _fence()
        room = _views(self._reader.place(count), self._reader.layout)
        for name, tensor in weights.items():
            room[name].copy_(tensor.detach())
        head[place + 1] = version
        _fence()
        head[place] += 1
        _fence()
        head[_COUNT] = count
        head[_VERSION] = version

    def subscriber(self) -> SharedReader:
        """As the protocol says."""
        return SharedReader(self._memory, self._reader.layout, self._reader.places)


class SharedReader:
    """A `Subscriber` for processes; it keeps a copy of what it read last."""

    def __init__(self, memory: Memory, layout: Layout, places: int) -> None:
        self.memory = memory
        self.layout = layout
        self.places = places
        self.retries = 0
        """How often a copy was thrown away because the writer had come by."""
        self._head = memory.bytes[:HEAD].view(np.int64)
        self._read: tuple[int, Mapping[str, Tensor]] = (NOTHING, {})

    @property
    def version(self) -> int:
        """As the protocol says."""
        return int(self._head[_VERSION])

    def newest(self) -> tuple[int, Mapping[str, Tensor]]:
        """As the protocol says."""
        if self.version == NOTHING:
            raise DataError("no weights have been published yet")
        while self._read[0] != self.version:
            count = int(self._head[_COUNT])
            place = _PLACE + 2 * (count % self.places)
            before = int(self._head[place])
            _fence()
            copy = self.place(count).copy()
            version = int(self._head[place + 1])
            _fence()
            if before % 2 == 0 and int(self._head[place]) == before:
                self._read = (version, _views(copy, self.layout))
                break
            self.retries += 1
        return self._read

    def place(self, count: int) -> Bytes:
        """The bytes in which publication `count` lies."""
        size = (self.memory.bytes.size - HEAD) // self.places
        start = HEAD + (count % self.places) * size
        return self.memory.bytes[start : start + size]


def _views(room: Bytes, layout: Layout) -> dict[str, Tensor]:
    """The tensors that lie in a place."""
    import torch

    views: dict[str, Tensor] = {}
    for name, (kind, shape, start, length) in layout.items():
        dtype: Any = getattr(torch, kind)
        part = torch.from_numpy(room[start : start + length]) if length else torch.empty(0)
        views[name] = part.view(dtype).reshape(shape) if length else torch.empty(shape, dtype=dtype)
    return views


_barrier = threading.Lock()


def _fence() -> None:
    """Nothing that was written or read before is written or read after: what a lock implies."""
    with _barrier:
        pass
