"""Products of rows with a head (V D), in the type in which the machine is quick.

A processor without bfloat16 arithmetic of its own emulates it, several times slower than float32.
There a bfloat16 head is taken to float32 a block at a time, which also spares the logits their
rounding; its rows are float32 beforehand.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_outer", "embed", "product_dtype", "unembed"]

_HEAD_BLOCK = 4096
"""Rows of the head whose gradient is added to the float32 sum at once."""
_WIDENED_BLOCK = 16384
"""Rows of the head that are taken to float32 at once."""


def product_dtype(head: Tensor) -> torch.dtype:
    """The type in which rows are to be multiplied with `head`."""
    if head.dtype != torch.bfloat16 or head.device.type != "cpu":
        return head.dtype
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return head.dtype
    quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return head.dtype if quick else torch.float32


def unembed(rows: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """rows @ head.T into `out` (n V); rows (n D) and `out` are of `product_dtype`."""
    if rows.dtype == head.dtype:
        return torch.mm(rows, head.T, out=out)
    for part in _parts(head, _WIDENED_BLOCK):
        torch.mm(rows, head[part].to(rows.dtype).T, out=out[:, part])
    return out


def embed(by_logit: Tensor, head: Tensor) -> Tensor:
    """by_logit @ head, n D in the type of `by_logit` (n V)."""
    if by_logit.dtype == head.dtype:
        return by_logit @ head
    total = by_logit.new_zeros(len(by_logit), head.shape[1])
    for part in _parts(head, _WIDENED_BLOCK):
        total.addmm_(by_logit[:, part], head[part].to(by_logit.dtype))
    return total


def add_outer(total: Tensor, by_logit: Tensor, rows: Tensor, *, first: bool) -> None:
    """total += by_logit.T @ rows (at first =), through a small buffer where the types differ."""
    if total.dtype == by_logit.dtype:
        torch.addmm(total, by_logit.T, rows, beta=0 if first else 1, out=total)
        return
    for part in _parts(total, _HEAD_BLOCK):
        product = by_logit[:, part].T @ rows
        if first:
            total[part].copy_(product)
        else:
            total[part].add_(product)


def _parts(head: Tensor, size: int) -> Iterator[slice]:
    for start in range(0, len(head), size):
        yield slice(start, start + size)
