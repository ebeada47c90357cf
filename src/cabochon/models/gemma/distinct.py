"""What the rows of a batch have in common is computed once: a prompt of several samples, padding.

A token's activations depend on what it sees, the tokens before it. Where rows begin alike (samples
of one prompt, a chosen and a rejected answer) they are the same numbers, and those of padding are
nobody's. So all that is done token by token, which is nearly everything, is done for the distinct
tokens alone, one long row of them; they are spread over the batch for attention and at the end.
On the way back the gradients of tokens that share their activations are added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cabochon.core.types import TokenBatch
from cabochon.models.gemma.numerics import refuse_second_derivative, wide_dtype

__all__ = ["Distinct", "distinct_tokens"]

SHORTEST = 16
"""Tokens that two rows must begin with alike to be looked at: a BOS alone is not worth it."""
LEAST = 64
"""Tokens that must be spared, since finding and copying them costs something;"""
LEAST_SHARE = 8
"""and at least one of so many."""


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """Which tokens of a batch are computed, and which of these each token of the batch is."""

    shape: tuple[int, int]
    """B, T."""
    places: Tensor
    """N int64: where the distinct tokens stand among the flat positions of (B T), in order."""
    index: Tensor
    """(B T) int64: for each token, its place among the distinct ones."""
    repeated: tuple[tuple[slice, slice], ...]
    """All tokens but those at `places`, as parts of the flat positions, each with the part of the
    distinct ones that it repeats."""

    def gather(self, x: Tensor) -> Tensor:
        """1 N ...: the distinct tokens'.

        Args:
            x: B T ..., the same for tokens that see the same.
        """
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def spread(self, x: Tensor) -> Tensor:
        """B T ...: for each token of the batch what the distinct one has that it is.

        Args:
            x: 1 N ....
        """
        spread: Tensor = _Spread.apply(x, self)
        return spread


def distinct_tokens(batch: TokenBatch) -> Distinct | None:
    """The distinct tokens of a batch; None where too few are alike for it to pay."""
    if batch.tokens.is_meta:
        return None  # a rehearsal, which knows no tokens and counts all as distinct
    rows, length = batch.shape
    padding = batch.documents < 0
    begun = {tuple(row) for row in batch.tokens[:, :SHORTEST].tolist()}
    alike = len(begun) < rows and length >= SHORTEST
    if not alike and not _pays(int(padding.sum()), rows * length):
        return None
    source = torch.arange(rows * length).view(rows, length)
    if alike:
        _share_beginnings(source, batch.to("cpu"))
    _share_padding(source, padding.cpu())
    flat = source.flatten()
    kept = flat == torch.arange(len(flat))
    places = kept.nonzero().flatten()
    if not _pays(len(flat) - len(places), len(flat)):
        return None
    index = (kept.cumsum(0) - 1)[flat]
    device = batch.tokens.device
    return Distinct(
        shape=batch.shape,
        places=places.to(device),
        index=index.to(device),
        repeated=_repeated(kept, index),
    )


def _pays(spared: int, tokens: int) -> bool:
    return spared >= max(LEAST, tokens // LEAST_SHARE)


def _share_beginnings(source: Tensor, batch: TokenBatch) -> None:
    """Let what a row begins with like another come from there.

    Args:
        source: B T int64: for each token the flat position that it is taken from; written to.
        batch: on the CPU.
    """
    own = batch.documents == batch.documents[:, :1]
    # A first document at positions 0, 1, 2, ... sees nothing that stands after it in its row.
    plain = (~own | (batch.positions == torch.arange(own.shape[1]))).all(1)
    own &= (plain & (batch.documents[:, 0] >= 0))[:, None]
    listed = batch.tokens.tolist()
    # In the order of a dictionary, no row has more in common with a row than with the one before.
    order = sorted(range(len(listed)), key=listed.__getitem__)
    one, two = batch.tokens[order[:-1]], batch.tokens[order[1:]]
    alike = (one == two) & own[order[:-1]] & own[order[1:]]
    common = alike.int().cumprod(1).sum(1).tolist()
    for (before, row), size in zip(pairwise(order), common, strict=True):
        if size >= SHORTEST:
            source[row, :size] = source[before, :size]


def _share_padding(source: Tensor, padding: Tensor) -> None:
    """Let the padding of each row come from the row that has most of it.

    Args:
        source: as above.
        padding: B T bool.
    """
    row = int(padding.sum(1).argmax())
    places = source[row, padding[row]]
    source[padding] = places[(padding.cumsum(1) - 1)[padding]]


def _repeated(kept: Tensor, index: Tensor) -> tuple[tuple[slice, slice], ...]:
    """The runs of tokens that are not kept."""
    breaks = (kept[1:] != kept[:-1]) | (index[1:] != index[:-1] + 1)
    bounds = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(kept)]
    runs = []
    for start, stop in pairwise(bounds):
        if not kept[start]:
            first = int(index[start])
            runs.append((slice(start, stop), slice(first, first + stop - start)))
    return tuple(runs)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, distinct: Distinct) -> Tensor:
        ctx.distinct = distinct
        return x.flatten(0, 1).index_select(0, distinct.places).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        distinct: Distinct = ctx.distinct
        by_x = grad.squeeze(0).index_select(0, distinct.index)
        for part, _ in distinct.repeated:
            by_x[part] = 0.0
        whole: Tensor = by_x.unflatten(0, distinct.shape)
        return whole, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, distinct: Distinct) -> Tensor:
        ctx.distinct = distinct
        spread: Tensor = x.squeeze(0).index_select(0, distinct.index).unflatten(0, distinct.shape)
        return spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        distinct: Distinct = ctx.distinct
        flat = grad.flatten(0, 1)
        # A sum of many samples' gradients would stand still in bfloat16.
        by_x = flat.index_select(0, distinct.places).to(wide_dtype(grad.dtype))
        # Part by part and not by `index_add_`: in the same order on every device.
        for part, whole in distinct.repeated:
            by_x[whole] += flat[part]
        return by_x.to(grad.dtype).unsqueeze(0), None
