"""The keys and values a Gemma remembers of the rows it is decoding.

Everything is allocated once. Layers that see the whole past keep `capacity` slots a row, sliding
layers a ring of `window` slots; the token at position p lies in slot p modulo their number. Each
row has its own positions, so rows of unequal length share a cache, and a row that begins again at
position 0 needs no clearing: what it held before lies in slots that it writes before it sees them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.core.types import TokenBatch
from cabochon.models.continuation import continued
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.kernels import attention, attention_cached
from cabochon.models.gemma.step import AttendOne, Step, curve

__all__ = ["Attend", "GemmaCache"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B T N H), k and v (B T K H) of the new tokens -> B T N H, what attention mixes for them."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where one call's tokens go and what they see, shared by all layers of one window."""

    index: Tensor
    """(B T 2K): line of the layer's buffer for each new key and value."""
    visible: Tensor | None
    """B T S: what is seen of the slots read (and, if `apart`, of the new tokens after them)."""
    slots: int
    """How many leading slots are read."""
    apart: bool
    """The new tokens would overwrite slots that some of them still see: read first, then write."""


class GemmaCache:
    """The past of `rows` sequences, each of at most `capacity` tokens."""

    def __init__(
        self,
        config: GemmaConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate, once, all that decoding will need.

        Raises:
            DataError: rows or capacity is below 1.
        """
        if rows < 1 or capacity < 1:
            raise DataError(
                f"a cache needs rows and capacity of at least 1, got {rows}, {capacity}"
            )
        self._config = config
        self._capacity = capacity
        self._sizes = [min(window or capacity, capacity) for window in config.layer_windows]
        # Keys, then values: 2 (B K) slots H. The slot beyond those that are read takes what must
        # not be remembered: padding.
        self._buffers = [
            torch.zeros(
                2, rows * config.kv_heads, size + 1, config.head_width, device=device, dtype=dtype
            )
            for size in self._sizes
        ]
        self._lengths = [0] * rows
        self._extent = 0
        self._slots = torch.arange(capacity, device=device)
        self._lines = self._first_lines()
        self.step: Step | None = None
        """The weights laid out for single tokens, once one has been read."""

    @property
    def config(self) -> GemmaConfig:
        """Of the model it was made for."""
        return self._config

    @property
    def rows(self) -> int:
        """How many sequences it holds."""
        return len(self._lengths)

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def attends(self, batch: TokenBatch) -> list[Attend]:
        """For each layer, what attends from the new tokens to the past and remembers them.

        Raises:
            DataError: a row does not go on from what the cache holds of it (`continued`). On CUDA
                nothing is checked: looking at positions would stall the device.
        """
        fresh = self._extent == 0
        extent = self._advance(batch)
        plans = {size: self._plan(batch, size, extent, fresh=fresh) for size in set(self._sizes)}
        return [self._attend(layer, plans[size], batch) for layer, size in enumerate(self._sizes)]

    def attends_one(self, batch: TokenBatch) -> list[AttendOne]:
        """`attends` for one new token a row, on what `Step` has rotated already.

        Raises:
            DataError: as `attends`.
        """
        extent = self._advance(batch)
        plans = {}
        for size in set(self._sizes):
            slots = min(extent, size)
            hidden = self._slots[:slots] > batch.positions
            bias = torch.zeros(hidden.shape, device=hidden.device)
            bias = bias.masked_fill_(hidden, float("-inf")).unsqueeze(1)
            plans[size] = (self._index(batch, size), bias, slots)
        return [self._attend_one(layer, *plans[size]) for layer, size in enumerate(self._sizes)]

    def select(self, rows: Tensor) -> GemmaCache:
        """A cache with the past of the chosen rows, in that order; a row may be chosen twice.

        This one is spent: without more rows than before, its memory goes on in the new one, and
        only the rows that change places are copied.

        Args:
            rows: n int64, at least one.
        """
        chosen = rows.tolist()
        other = copy.copy(self)
        other._lengths = [self._lengths[row] for row in chosen]
        kv_heads = self._config.kv_heads
        if len(chosen) * kv_heads > self._buffers[0].shape[1]:
            lines = rows[:, None] * kv_heads + torch.arange(kv_heads, device=rows.device)
            other._buffers = [b.index_select(1, lines.flatten()) for b in self._buffers]
            other._lines = other._first_lines()
            return other
        targets = [place for place, row in enumerate(chosen) if place != row]
        sources = [chosen[place] for place in targets]
        for buffer in self._buffers if targets else ():
            by_row = buffer.unflatten(1, (-1, kv_heads))
            by_row[:, targets] = by_row[:, sources]
        return other

    def _first_lines(self) -> dict[int, Tensor]:
        """B 2K for each size: the line of slot 0 in the buffer seen as (2 B K slots, H)."""
        heads = self._buffers[0].shape[1]
        device, kv_heads = self._slots.device, self._config.kv_heads
        keys = torch.arange(heads, device=device).view(-1, kv_heads)
        lines = torch.cat([keys, keys + heads], dim=1)
        return {size: lines * (size + 1) for size in set(self._sizes)}

    def _advance(self, batch: TokenBatch) -> int:
        """Check that the tokens go on from the past; the positions any of them sees (at most)."""
        if batch.tokens.is_cuda:
            self._extent = min(self._extent + batch.shape[1], self._capacity)
            return self._extent
        spans = continued(self._lengths, batch, self._capacity)
        for row, span in enumerate(spans):
            if span:
                self._lengths[row] = span.stop
        extent = max(1, *(span.stop for span in spans))
        self._extent = max(self._extent, extent)
        return extent

    def _index(self, batch: TokenBatch, size: int) -> Tensor:
        positions, kept = batch.positions, batch.documents >= 0
        slot = positions
        if size < self._capacity:
            slot = positions % size
            if positions.shape[1] > 1:
                last = positions.masked_fill(~kept, -1).amax(1, keepdim=True)
                kept = kept & (positions > last - size)
        slot = slot.masked_fill(~kept, size)
        return (self._lines[size][: self.rows, None] + slot.unsqueeze(-1)).flatten()

    def _plan(self, batch: TokenBatch, size: int, extent: int, *, fresh: bool) -> _Plan:
        index = self._index(batch, size)
        if fresh:
            return _Plan(index=index, visible=None, slots=0, apart=True)
        if size < self._capacity and batch.shape[1] > 1:
            return _Plan(
                index=index, visible=self._ring_and_new(batch, size), slots=size, apart=True
            )
        slots = min(extent, size)
        visible = self._slots[:slots] <= batch.positions.unsqueeze(-1)
        return _Plan(index=index, visible=visible, slots=slots, apart=False)

    def _ring_and_new(self, batch: TokenBatch, size: int) -> Tensor:
        """B T (size + T): what new tokens see of the ring before them, and of each other."""
        positions, held = batch.positions, batch.documents >= 0
        start = positions.masked_fill(~held, self._capacity).amin(1, keepdim=True)  # B 1
        # The newest position before `start` that lies in each slot; negative where there is none.
        past = start - 1 - (start - 1 - self._slots[:size]) % size  # B size
        seen = (past[:, None] >= 0) & (positions.unsqueeze(-1) - past[:, None] < size)
        distance = positions[:, :, None] - positions[:, None, :]
        among = (held[:, :, None] == held[:, None, :]) & (distance >= 0) & (distance < size)
        return torch.cat([seen & held[:, :, None], among], dim=-1)

    def _attend(self, layer: int, plan: _Plan, batch: TokenBatch) -> Attend:
        buffer = self._buffers[layer]
        kv_heads, width = self._config.kv_heads, self._config.head_width
        scale, cap = self._config.scale, self._config.attention_cap
        window = self._config.layer_windows[layer]

        def remember(k: Tensor, v: Tensor) -> None:
            new = torch.cat([k, v], dim=2).view(-1, width)
            buffer.view(-1, width).index_copy_(0, plan.index, new)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if plan.visible is None:
                mixed = attention(
                    q, k, v, documents=batch.documents, positions=batch.positions,
                    scale=scale, cap=cap, window=window,
                )  # fmt: skip
                remember(k, v)
                return mixed
            if not plan.apart:
                remember(k, v)
            past = buffer[:, : self.rows * kv_heads, : plan.slots].unflatten(1, (-1, kv_heads))
            keys, values = past.transpose(2, 3)  # each B S K H
            if plan.apart:
                keys, values = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
            mixed = attention_cached(q, keys, values, plan.visible, scale=scale, cap=cap)
            if plan.apart:
                remember(k, v)
            return mixed

        return attend

    def _attend_one(self, layer: int, index: Tensor, bias: Tensor, slots: int) -> AttendOne:
        config, buffer = self._config, self._buffers[layer]
        used = self.rows * config.kv_heads
        keys, values = buffer[0, :used, :slots].transpose(1, 2), buffer[1, :used, :slots]
        lines = buffer.view(-1, config.head_width)
        group = config.heads // config.kv_heads
        bend, gain, unit = curve(config.scale, config.attention_cap)

        def attend(qkv: Tensor) -> Tensor:
            lines.index_copy_(0, index, qkv[:, config.heads :].reshape(-1, config.head_width))
            queries = qkv[:, : config.heads].reshape(used, group, -1)
            scores = bend(torch.bmm(queries, keys).float().mul_(gain)).view(self.rows, -1, slots)
            probs = torch.add(bias, scores, alpha=unit).softmax(-1).to(qkv.dtype)
            return torch.bmm(probs.view(used, group, slots), values).view(self.rows, -1)

        return attend
