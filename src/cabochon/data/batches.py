"""The documents of a batch, one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cabochon.core.types import TokenBatch

__all__ = ["DIGEST_BYTES", "Placed", "digest", "documents"]

DIGEST_BYTES = 16
"""128 bits: among 10^12 documents two of the same digest are not to be expected."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A document, or a piece of one, and where it stands in its batch."""

    row: int
    flat: NDArray[np.int64]
    """n: the places of its tokens among the flattened (B T) positions."""
    tokens: NDArray[np.int64]
    """n: its inputs."""
    targets: NDArray[np.int64]
    """n: what follows each; any value where `counted` is False."""
    counted: NDArray[np.bool_]
    """n: the batch's mask."""

    @property
    def sequence(self) -> NDArray[np.int64]:
        """n or n + 1: its tokens, and the one behind them where that is to be predicted."""
        return np.append(self.tokens, self.targets[-1:]) if self.counted[-1] else self.tokens


def documents(batch: TokenBatch) -> Iterator[Placed]:
    """Every document of every row, in order; padding is none."""
    rows, length = batch.shape
    tokens, targets, mask, numbers = (
        each.cpu().numpy() for each in (batch.tokens, batch.targets, batch.mask, batch.documents)
    )
    for row in range(rows):
        found, first = np.unique(numbers[row], return_index=True)
        for number in found[np.argsort(first)]:
            if number < 0:
                continue
            places = np.flatnonzero(numbers[row] == number)
            yield Placed(
                row=row,
                flat=row * length + places,
                tokens=tokens[row, places],
                targets=targets[row, places],
                counted=mask[row, places],
            )


def digest(tokens: NDArray[np.int64]) -> bytes:
    """BLAKE2b over token ids, whatever batch they stand in."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=DIGEST_BYTES).digest()
