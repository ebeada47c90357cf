"""The endless, seekable order in which rows are read: one keyed permutation after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cabochon.core.keys import Key

__all__ = ["Order"]


class Order:
    """Row numbers, epoch after epoch, each epoch in an order of its own.

    Every row comes once in an epoch; nothing is dropped where epochs meet. An `Order` that begins
    at `start` goes on exactly like one that has given out `start` rows.
    """

    def __init__(self, key: Key, rows: int, start: int = 0) -> None:
        """An order over `rows` (at least 1) rows, from its `start`-th number on."""
        self._key = key
        self._rows = rows
        self._epoch, self._place = divmod(start, rows)
        self._permutation = self._shuffled()

    def take(self, count: int) -> NDArray[np.int64]:
        """The next `count` row numbers: count int64."""
        parts = [self._permutation[:0]]
        while count > 0:
            if self._place == self._rows:
                self._epoch, self._place = self._epoch + 1, 0
                self._permutation = self._shuffled()
            part = self._permutation[self._place : self._place + count]
            self._place += len(part)
            count -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def _shuffled(self) -> NDArray[np.int64]:
        # Sorting raw bits: unlike Generator.permutation, they are the same in every numpy.
        bits = self._key.fold("epoch", self._epoch).numpy().bit_generator.random_raw(self._rows)
        return np.argsort(bits, kind="stable").astype(np.int64)
