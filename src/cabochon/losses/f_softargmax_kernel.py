"""The f-softargmax of alpha divergences as one Triton kernel, a row to a program.

The same search as in `f_softargmax`, with the numbers of a row read again in each pass: with
e = a - 1 and the largest ratio u, u_j / u = r_j = b_j ** (1 / e), b_j = max(0, 1 - e gap_j u ** -e)
(at e = 0 r_j = exp(-gap_j)), and d log total / d log u = sum(r_j / b_j) / sum(r_j).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["alpha_softargmax"]

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _ratios(place, at, width, highest, factor, scale, e, KL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """(r, r / b) of one block of a row."""
    columns = at + tl.arange(0, BLOCK)
    row = tl.load(place + columns, mask=columns < width, other=-float("inf"))
    gap = highest - row.to(tl.float32)
    if KL:
        ratio = tl.exp(-scale * gap)
        weight = ratio
    else:
        base = tl.maximum(1.0 - gap * factor, 0.0)
        ratio = tl.exp(tl.log(base) / e)
        weight = tl.where(ratio > 0.0, ratio / base, 0.0)
    return ratio, weight


@triton.jit  # type: ignore[untyped-decorator]
def _rows(logits, out, width, measure, low, high, scale, e, KL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """One row; `low` and `high` are bounds of log u."""
    start = tl.program_id(0).to(tl.int64) * width
    highest = -float("inf")
    for at in range(0, width, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        row = tl.load(logits + start + columns, mask=columns < width, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(row.to(tl.float32), 0))
    top, last = high, high - low
    passes, share = 0, 1.0
    while passes < 100:
        passes += 1
        factor = scale * e * tl.exp(-e * top)
        share, rate = 0.0, 0.0
        for at in range(0, width, BLOCK):
            ratio, weight = _ratios(logits + start, at, width, highest, factor, scale, e, KL, BLOCK)
            share += tl.sum(ratio, 0)
            rate += tl.sum(weight, 0)
        error = tl.log(measure * share) + top  # log total
        if tl.abs(error) <= 1e-6:
            passes = 1000
        else:
            if error < 0.0:
                low = top
            else:
                high = top
            step = -error * share / rate
            close = tl.abs(step) <= 0.5 * tl.abs(last)
            good = (top + step >= low) & (top + step <= high) & close
            step = tl.where(good, step, 0.5 * (low + high) - top)
            if top + step == top:
                passes = 1000
            else:
                last = step
                top += step
    factor = scale * e * tl.exp(-e * top)
    for at in range(0, width, BLOCK):
        ratio, _ = _ratios(logits + start, at, width, highest, factor, scale, e, KL, BLOCK)
        columns = at + tl.arange(0, BLOCK)
        tl.store(out + start + columns, ratio / share, mask=columns < width)


def alpha_softargmax(rows: Tensor, a: float, measure: float, scale: float) -> Tensor:
    """N V float32: the f-softargmax of scale x rows with an alpha divergence.

    Args:
        rows: n V on a CUDA device, contiguous; every row has a finite highest logit.
        a: 1, or in [-1, 0.8] or [1.2, 2], where float32 keeps enough digits of b ** (1 / e).
        measure: q, the same for every class.
        scale: what multiplies gaps: 1 / temperature for alpha itself.
    """
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if rows.numel():
        width = rows.shape[1]
        block = min(_BLOCK, triton.next_power_of_2(width))
        high = -math.log(measure)
        low = high - math.log(width)
        _rows[(len(rows),)](
            rows, out, width, measure, low, high, scale, a - 1.0, KL=a == 1.0, BLOCK=block
        )
    return out
