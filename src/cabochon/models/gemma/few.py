"""How a few new tokens a row attend to what a cache holds: plain functions of tensors.

A layer's memory is one tensor, keys before values: 2 (rows K) (slots + 1) H. The token at position
p lies in slot p modulo the number of slots; the last slot takes what must not be remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.numerics import LARGEST_LOGISTIC_CAP

__all__ = ["AttendFew", "attend_few", "attend_few_fused", "curve", "hidden", "places"]

AttendFew = Callable[[Tensor, Tensor], Tensor]
"""Rotated queries, `curve`'s gain inside ((B T) N H), and new keys and values ((B T) 2K H) ->
(B T) (N H), what attention mixes for them."""


def curve(scale: float, cap: float | None) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """(f, gain, unit): unit f(gain q.k) is, but for a constant, the soft-capped scaled score.

    cap tanh(z / cap) = 2 cap s(2 z / cap) - cap with the logistic function s, which is several
    times faster; a softmax does not see the constant.
    """
    if cap is None:
        return _unbent, scale, 1.0
    if cap > LARGEST_LOGISTIC_CAP:
        return torch.tanh_, scale / cap, cap
    return torch.sigmoid_, 2.0 * scale / cap, 2.0 * cap


def _unbent(scores: Tensor) -> Tensor:
    return scores


def hidden(positions: Tensor, slots: Tensor, window: int, size: int) -> Tensor:
    """... S bool: what tokens at `positions` (... 1) do not see of `slots` (S, from 0 on).

    Args:
        positions: of the new tokens, which are in their slots already.
        slots: the first S slots' numbers.
        window: how many positions a token sees, its own included.
        size: slots a row has; more than the window if tokens may be taken back.
    """
    if size == window:
        return slots > positions
    # How far back the newest token lies that may be in a slot; before position 0 lies none.
    distance = (positions - slots).remainder(size)
    return distance >= (positions + 1).clamp(max=window)


def places(lines: Tensor, slot: Tensor) -> Tensor:
    """(B T 2K): lines of a layer's memory, seen as (2 rows K slots+1, H), for new keys and values.

    Args:
        lines: B 2K: where slot 0 of each row's keys and values lies.
        slot: B T: in which the new tokens go.
    """
    return (lines[:, None] + slot.unsqueeze(-1)).flatten()


def attend_few_fused(config: GemmaConfig, memory: Tensor, index: Tensor, bias: Tensor) -> AttendFew:
    """`attend_few` through flex_attention, one kernel where it is compiled for CUDA.

    The soft-cap and the bias are its score function: no score leaves the processor. Not compiled it
    holds every score, and is here to be compared.
    """
    from torch.nn.attention.flex_attention import flex_attention

    rows, _, few, slots = bias.shape
    width, lines = config.head_width, memory.view(-1, config.head_width)
    used = memory[:, : rows * config.kv_heads, :slots].unflatten(1, (rows, -1))  # 2 B K S H
    _, _, unit = curve(config.scale, config.attention_cap)
    cap = config.attention_cap
    rounded = cap is not None and cap <= LARGEST_LOGISTIC_CAP

    def score(raw: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        bent = raw if cap is None else raw.sigmoid() if rounded else raw.tanh()
        return unit * bent + bias[row, 0, query, slot]

    def attend(queries: Tensor, new: Tensor) -> Tensor:
        lines.index_copy_(0, index, new.reshape(-1, width))
        by_head = queries.view(rows, few, -1, width).transpose(1, 2)  # B N T H
        mixed: Any = flex_attention(
            by_head, used[0], used[1], score_mod=score, scale=1.0, enable_gqa=True
        )
        out: Tensor = mixed.transpose(1, 2).reshape(rows * few, -1)
        return out

    return attend


def attend_few(config: GemmaConfig, memory: Tensor, index: Tensor, bias: Tensor) -> AttendFew:
    """Writes new keys and values into a layer's memory and mixes the values it holds.

    Args:
        config: of the model.
        memory: 2 (rows K) (slots + 1) H, of at least B rows.
        index: `places` of the new tokens.
        bias: B 1 T S float32: -inf where a slot is not seen, 0 where it is; S slots are read.
    """
    rows, _, few, slots = bias.shape
    used, width = rows * config.kv_heads, config.head_width
    keys, values = memory[0, :used, :slots].transpose(1, 2), memory[1, :used, :slots]
    lines, group = memory.view(-1, width), config.heads // config.kv_heads
    bend, _, unit = curve(config.scale, config.attention_cap)
    score_shape = (rows, -1, few, slots)

    def attend(queries: Tensor, new: Tensor) -> Tensor:
        lines.index_copy_(0, index, new.reshape(-1, width))
        if few == 1:
            scores = torch.bmm(queries.reshape(used, group, width), keys)
        else:
            by_head = queries.view(rows, few, -1, group, width).permute(0, 2, 3, 1, 4)
            scores = torch.bmm(by_head.reshape(used, -1, width), keys)
        scores = bend(scores.float().view(score_shape))
        probs = torch.add(bias, scores, alpha=unit).softmax(-1).to(new.dtype)
        mixed = torch.bmm(probs.view(used, -1, slots), values)
        if few > 1:
            mixed = mixed.view(rows, -1, few, width).transpose(1, 2)
        return mixed.reshape(rows * few, -1)

    return attend
