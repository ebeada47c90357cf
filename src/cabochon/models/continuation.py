"""How the rows of a cache go on: each from its own last token, or again from the beginning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cabochon.core.errors import DataError
from cabochon.core.types import TokenBatch

__all__ = ["continued"]


def continued(lengths: Sequence[int], batch: TokenBatch, capacity: int) -> list[range]:
    """The positions of each row's new tokens; an empty range where a row has padding alone.

    Args:
        lengths: how many tokens of each row the cache holds.
        batch: the new tokens.
        capacity: how many a row can hold.

    Raises:
        DataError: the batch has other rows than the cache; a row's positions follow neither its
            last one nor one another; it begins anywhere but there or at 0; it holds several
            documents; or it would outgrow the capacity.
    """
    rows, length = batch.shape
    if rows != len(lengths):
        raise DataError(f"the cache holds {len(lengths)} rows, the batch {rows}; they must agree")
    if length == 1:
        starts = batch.positions[:, 0].tolist()
        counts = [int(document >= 0) for document in batch.documents[:, 0].tolist()]
    else:
        starts, counts = _runs(batch)
    spans = []
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count and start not in (0, lengths[row]):
            raise DataError(
                f"row {row} goes on at position {start}, the cache holds {lengths[row]} tokens of "
                "it; go on there, or begin again at 0"
            )
        if count and start + count > capacity:
            raise DataError(
                f"row {row} would grow to {start + count} tokens, the cache was made for {capacity}"
            )
        spans.append(range(start, start + count) if count else range(0))
    return spans


def _runs(batch: TokenBatch) -> tuple[list[int], list[int]]:
    """Each row's first position and number of tokens."""
    held = batch.documents >= 0
    counts = held.sum(1)
    starts = batch.positions.masked_fill(~held, torch.iinfo(torch.int64).max).amin(1)
    expected = starts.unsqueeze(1) + held.cumsum(1) - 1
    astray = held & (batch.positions != expected)
    if astray.any():
        row = int(astray.any(1).nonzero()[0])
        raise DataError(
            f"row {row} has positions {batch.positions[row].tolist()}; with a cache a row holds "
            "one document whose positions follow one another"
        )
    return starts.tolist(), counts.tolist()
