"""Soft-capped, windowed, causal attention within documents, with its gradient.

On a CPU the forward pass goes through tiles of queries and only the keys that some of them see;
it keeps the output and one number a query (the logarithm of the softmax's denominator), from which
the backward pass makes the probabilities again. Matrix products are in the type of the inputs,
everything between them in float32. The soft-cap is computed through the logistic function,
cap tanh(z / cap) = cap (2 s(2 z / cap) - 1), and exponentials in base 2: both vectorise several
times better than tanh and exp. The logistic function errs by 2^-24 of the cap where tanh errs by
as much of its value, so a cap that is meant to do nothing goes through tanh. On CUDA the same is
said to flex_attention, and without a cap to scaled_dot_product_attention.

Query head n uses key head n // (N / K). Between B T N H and the products lies one copy, B K (T G) H
with G = N / K: the queries that share a key head are rows of one matrix.

Source: Gemma 2 report (arXiv:2408.00118) section 2; Su et al. 2021 (rotary positions);
Dao et al. 2022 (arXiv:2205.14135) for what is kept and what is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.core.types import soft_cap
from cabochon.models.gemma.cuda_attention import cuda_attention
from cabochon.models.gemma.numerics import (
    LARGEST_LOGISTIC_CAP,
    refuse_second_derivative,
    wide_dtype,
)
from cabochon.models.gemma.rotation import rope, rotate
from cabochon.models.gemma.visibility import Tile, Visibility

__all__ = ["attention", "attention_cached", "rotated_attention"]

_TAME_OCTAVES = 100.0
"""Sums of 2 ** exponent over any length stay inside float32 for exponents of this size."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor,
    positions: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Tensor:
    """B T N H: causal attention within documents, over a full sequence.

    A token sees those of equal document id at positions p with 0 <= own - p < window. Padding
    (document -1) sees padding, so that nothing becomes NaN.

    Args:
        q: B T N H.
        k: B T K H; query head n uses key head n // (N / K).
        v: B T K H.
        documents: B T int64.
        positions: B T int64.
        scale: multiplies the scores, before the cap.
        cap: soft-cap of the scores, before the mask.
        window: tokens seen, the own one included; None: all.
    """
    visibility = Visibility(documents, positions, window)
    if q.is_cuda:
        return cuda_attention(q, k, v, visibility, scale=scale, cap=cap)
    mixed: Tensor = _Attention.apply(q, k, v, visibility, _Curve.of(scale, cap))
    return mixed


def rotated_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    visibility: Visibility,
    *,
    heads: int,
    scale: float,
    cap: float | None,
) -> Tensor:
    """B T N H: `attention` of rotated queries and keys, kept but once for the backward pass.

    Args:
        qkv: B T (N + 2K) H: the heads of q, of k, of v, not yet rotated.
        cos: B T H/2, of the positions' angles, in the type of `qkv`.
        sin: B T H/2, likewise.
        visibility: what each query sees.
        heads: N.
        scale: multiplies the scores, before the cap.
        cap: soft-cap of the scores, before the mask.
    """
    if qkv.is_cuda:
        kv_heads = (qkv.shape[2] - heads) // 2
        qk = rope(qkv[:, :, : heads + kv_heads], cos, sin)
        q, k, v = qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, heads + kv_heads :]
        return cuda_attention(q, k, v, visibility, scale=scale, cap=cap)
    curve = _Curve.of(scale, cap)
    mixed: Tensor = _RotatedAttention.apply(qkv, cos, sin, heads, visibility, curve)
    return mixed


def attention_cached(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, cap: float | None
) -> Tensor:
    """B T N H: attention over given keys and values.

    Args:
        q: B T N H.
        keys: B S K H; fastest where they are views of contiguous B K S H.
        values: B S K H, likewise.
        visible: B T S bool; each query sees at least one slot.
        scale: multiplies the scores, before the cap.
        cap: soft-cap of the scores, before the mask.
    """
    rows, length, heads, width = q.shape
    slots, kv_heads = keys.shape[1:3]
    grouped = q.view(rows, length, kv_heads, -1, width).permute(0, 2, 3, 1, 4)  # B K G T H
    grouped = grouped.reshape(rows, kv_heads, -1, width)
    scores = (grouped * scale) @ keys.permute(0, 2, 3, 1)
    scores = soft_cap(scores.to(wide_dtype(q.dtype)), cap)
    scores = scores.view(rows, kv_heads, -1, length, slots)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    probs = scores.softmax(-1).to(q.dtype).view(rows, kv_heads, -1, slots)
    mixed = probs @ values.transpose(1, 2)  # B K (G T) H
    mixed = mixed.view(rows, kv_heads, -1, length, width).permute(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads, width)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """From a product q . k to the exponent of its probability, in base 2."""

    bend: Callable[[Tensor], Tensor] | None
    """The soft-cap's function, in place: logistic or tanh; None without a cap."""
    unbend: Callable[..., Tensor] | None
    """Its backward pass: (gradient, value of the function, where to write)."""
    gain: float
    """Product times gain: the argument of `bend`, or (no cap) the exponent."""
    octaves: float
    """The exponent per unit of `bend`'s value."""
    slope: float
    """What is left of d capped / d product once `bend`'s own slope is taken out."""
    middle: float
    """Added to the exponents, so that those of capped scores lie around 0."""
    tame: bool
    """Exponents are so small that their sums cannot overflow: no need to find the highest."""

    @staticmethod
    def of(scale: float, cap: float | None) -> _Curve:
        ops = torch.ops.aten
        if cap is None:
            gain = scale / math.log(2.0)
            return _Curve(
                bend=None, unbend=None, gain=gain, octaves=1.0, slope=scale, middle=0.0, tame=False
            )
        if cap > LARGEST_LOGISTIC_CAP:
            return _Curve(
                bend=torch.tanh_,
                unbend=ops.tanh_backward.grad_input,
                gain=scale / cap,
                octaves=cap / math.log(2.0),
                slope=scale,
                middle=0.0,
                tame=False,
            )
        return _Curve(
            bend=torch.sigmoid_,
            unbend=ops.sigmoid_backward.grad_input,
            gain=2.0 * scale / cap,
            octaves=2.0 * cap / math.log(2.0),
            slope=4.0 * scale,
            middle=-cap / math.log(2.0),
            tame=cap / math.log(2.0) < _TAME_OCTAVES,
        )


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values where one matrix product serves all queries of a key head."""

    q: Tensor
    """B K (T G) H."""
    k: Tensor
    """B K T H."""
    v: Tensor
    """B K T H."""

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def tiled(self, tensor: Tensor, tile: Tile) -> Tensor:
        """The tile's queries of a tensor B K (T G) ..., as (B K) (T G) ...."""
        queries = slice(tile.queries.start * self.group, tile.queries.stop * self.group)
        part = tensor[tile.rows, tile.heads, queries]
        return part.view(-1, *part.shape[2:])

    def keyed(self, tensor: Tensor, tile: Tile) -> Tensor:
        """The tile's keys of a tensor B K T H, as (B K) T H."""
        part = tensor[tile.rows, tile.heads, tile.keys]
        return part.view(-1, *part.shape[2:])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, curve: _Curve
    ) -> Tensor:
        heads = _Heads(_grouped(q, k.shape[2]), _by_head(k), _by_head(v))
        mixed, log_total = _mix(heads, visibility, curve)
        ctx.save_for_backward(q, k, v, mixed, log_total)
        ctx.rest = visibility, curve
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        q, k, v, mixed, log_total = ctx.saved_tensors
        heads = _Heads(_grouped(q, k.shape[2]), _by_head(k), _by_head(v))
        by = _mix_gradients(grad, heads, mixed, log_total, *ctx.rest)
        by_q = _ungrouped(by.q, q.shape[2]).flatten(2, 3)
        by_k, by_v = by.k.transpose(1, 2).to(k.dtype), by.v.transpose(1, 2).to(v.dtype)
        return by_q, by_k, by_v, None, None


class _RotatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        visibility: Visibility,
        curve: _Curve,
    ) -> Tensor:
        kv_heads = (qkv.shape[2] - heads) // 2
        qk = qkv.new_empty(*qkv.shape[:2], heads + kv_heads, qkv.shape[3])
        rotate(qkv[:, :, : heads + kv_heads], cos.unsqueeze(-2), sin.unsqueeze(-2), qk)
        apart = _Heads(
            _grouped(qk[:, :, :heads], kv_heads),
            _by_head(qk[:, :, heads:]),
            _by_head(qkv[:, :, heads + kv_heads :]),
        )
        mixed, log_total = _mix(apart, visibility, curve)
        ctx.save_for_backward(apart.q, apart.k, apart.v, cos, sin, mixed, log_total)
        ctx.rest = visibility, curve
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        q, k, v, cos, sin, mixed, log_total = ctx.saved_tensors
        by = _mix_gradients(grad, _Heads(q, k, v), mixed, log_total, *ctx.rest)
        heads, kv_heads = grad.shape[2], k.shape[1]
        by_qk = grad.new_empty(*grad.shape[:2], heads + kv_heads, grad.shape[3])
        by_qk[:, :, :heads].unflatten(2, (kv_heads, -1)).copy_(_ungrouped(by.q, heads))
        by_qk[:, :, heads:] = by.k.transpose(1, 2)
        by_qkv = grad.new_empty(*grad.shape[:2], heads + 2 * kv_heads, grad.shape[3])
        # The inverse of a rotation turns the other way.
        turned = by_qkv[:, :, : heads + kv_heads]
        rotate(by_qk, cos.unsqueeze(-2), -sin.unsqueeze(-2), turned)
        by_qkv[:, :, heads + kv_heads :] = by.v.transpose(1, 2)
        return by_qkv, None, None, None, None, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """B K (T G) H, contiguous, from B T N H."""
    grouped: Tensor = x.unflatten(2, (kv_heads, x.shape[2] // kv_heads))
    return grouped.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """B T K G H, a view, from B K (T G) H."""
    rows, kv_heads, _, width = x.shape
    return x.view(rows, kv_heads, -1, heads // kv_heads, width).permute(0, 2, 1, 3, 4)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


class _Buffers:
    """Memory for one tile at a time: one matrix in the type of the products, three wide ones."""

    def __init__(self, heads: _Heads, tiles: list[Tile]) -> None:
        q, group = heads.q, heads.group
        size = max((tile.pairs * group for tile in tiles), default=0)
        self._narrow = q.new_empty(size)
        self._wide = q.new_empty(3, size, dtype=wide_dtype(q.dtype))

    def of(self, tile: Tile, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(narrow, three wide), each (B K) (T G) S."""
        shape = tile.batches, tile.length(tile.queries) * group, tile.length(tile.keys)
        size = math.prod(shape)
        one, two, three = self._wide[:, :size].view(3, *shape)
        return self._narrow[:size].view(shape), one, two, three


def _exponents(
    heads: _Heads,
    tile: Tile,
    visibility: Visibility,
    curve: _Curve,
    narrow: Tensor,
    inner: Tensor,
    out: Tensor,
) -> None:
    """Exponents of the unnormalised probabilities into `out`, values of `bend` into `inner`."""
    torch.bmm(heads.tiled(heads.q, tile), heads.keyed(heads.k, tile).mT, out=narrow)
    if inner.dtype == narrow.dtype:
        torch.mul(narrow, curve.gain, out=inner)
    else:
        inner.copy_(narrow).mul_(curve.gain)
    if curve.bend is not None:
        curve.bend(inner)
    shape = tile.shape(heads.group)
    bias = visibility.bias(tile, inner.dtype, curve.middle)
    torch.add(bias, inner.view(shape), alpha=curve.octaves, out=out.view(shape))


def _mix(heads: _Heads, visibility: Visibility, curve: _Curve) -> tuple[Tensor, Tensor]:
    """(mixed values B T N H, log2 of each query's denominator B K (T G) 1)."""
    rows, kv_heads, length, width = heads.k.shape
    group = heads.group
    mixed = heads.q.new_empty(rows, length, kv_heads, group, width)
    log_total = heads.q.new_empty(
        rows, kv_heads, length * group, 1, dtype=wide_dtype(heads.q.dtype)
    )
    tiles = visibility.tiles(kv_heads, group)
    buffers = _Buffers(heads, tiles)
    for tile in tiles:
        narrow, inner, power, _ = buffers.of(tile, group)
        _exponents(heads, tile, visibility, curve, narrow, inner, power)
        highest = None if curve.tame else power.amax(-1, keepdim=True)
        if highest is not None:
            power.sub_(highest)
        total = power.exp2_().sum(-1, keepdim=True)
        prob = _narrowed(power.div_(total), narrow)
        total.log2_()
        heads.tiled(log_total, tile).copy_(total if highest is None else total.add_(highest))
        part = torch.bmm(prob, heads.keyed(heads.v, tile))
        part = part.view(*tile.shape(group)[:4], width).permute(0, 2, 1, 3, 4)
        mixed[tile.rows, tile.queries, tile.heads] = part
    return mixed.flatten(2, 3), log_total


def _mix_gradients(
    grad: Tensor,
    heads: _Heads,
    mixed: Tensor,
    log_total: Tensor,
    visibility: Visibility,
    curve: _Curve,
) -> _Heads:
    """Gradients by queries (in their type), keys and values (in the wide type)."""
    kv_heads, group = heads.k.shape[1], heads.group
    wide = log_total.dtype
    along = _grouped((grad.to(wide) * mixed).sum(-1, keepdim=True), kv_heads)
    grad = _grouped(grad, kv_heads)
    by = _Heads(
        torch.empty_like(heads.q),
        torch.zeros_like(heads.k, dtype=wide),
        torch.zeros_like(heads.v, dtype=wide),
    )
    tiles = visibility.tiles(kv_heads, group)
    buffers = _Buffers(heads, tiles)
    for tile in tiles:
        narrow, inner, prob, by_score = buffers.of(tile, group)
        q, k, v = heads.tiled(heads.q, tile), heads.keyed(heads.k, tile), heads.keyed(heads.v, tile)
        _exponents(heads, tile, visibility, curve, narrow, inner, prob)
        prob.sub_(heads.tiled(log_total, tile)).exp2_()
        by_mixed = heads.tiled(grad, tile)
        heads.keyed(by.v, tile).add_(torch.bmm(_narrowed(prob, narrow).mT, by_mixed))
        by_score.copy_(torch.bmm(by_mixed, v.mT, out=narrow))
        by_score.sub_(heads.tiled(along, tile)).mul_(prob)
        if curve.unbend is not None:
            curve.unbend(by_score, inner, grad_input=by_score)
        by_score = _narrowed(by_score, narrow)
        torch.mul(torch.bmm(by_score, k), curve.slope, out=heads.tiled(by.q, tile))
        heads.keyed(by.k, tile).add_(torch.bmm(by_score.mT, q), alpha=curve.slope)
    return by


def _narrowed(wide: Tensor, narrow: Tensor) -> Tensor:
    """`wide` in the type of the products: itself, or copied into `narrow`."""
    if wide.dtype == narrow.dtype:
        return wide
    return narrow.copy_(wide)
