"""The keys and values a Gemma remembers of the rows it is decoding.

Everything is allocated once. Layers that see the whole past keep `capacity` slots a row, sliding
layers a ring of `window` slots (and as many more as tokens may be taken back); the token at
position p lies in slot p modulo their number. Each row has its own positions, so rows of unequal
length share a cache, and a row that begins again at position 0 needs no clearing: what it held
before lies in slots that it writes before it sees them. Nor do tokens that were taken back: by
where they lie they pass for tokens one turn of the ring older, which no token sees any more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.core.types import TokenBatch
from cabochon.models.continuation import continued
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.few import AttendFew, attend_few, hidden, places
from cabochon.models.gemma.kernels import attention, attention_cached
from cabochon.models.gemma.step import Step

__all__ = ["Attend", "GemmaCache", "Sight"]

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


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one new token a row may see of a layer's memory, and where it goes."""

    slots: Tensor
    """S: numbers of the first slots, those that are read."""
    lines: Tensor
    """B 2K: where slot 0 of each row's keys and values lies."""
    ring: bool
    """Positions go round: the slot is the position modulo the number of slots."""
    window: int | None
    """How many positions a token sees; None if as many as there are slots."""


class GemmaCache:
    """The past of `rows` sequences, each of at most `capacity` tokens."""

    def __init__(
        self,
        config: GemmaConfig,
        rows: int,
        capacity: int,
        ahead: int = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate, once, all that decoding will need.

        Args:
            config: of the model.
            rows: B, sequences side by side.
            capacity: tokens of the longest.
            ahead: how many of a row's newest tokens `rewind` may take back.
            device: of the model.
            dtype: of the keys and values.

        Raises:
            DataError: rows or capacity is below 1, or `ahead` below 0.
        """
        if rows < 1 or capacity < 1 or ahead < 0:
            raise DataError(
                "a cache needs rows and capacity of at least 1 and ahead of at least 0, got "
                f"{rows}, {capacity}, {ahead}"
            )
        self._config = config
        self._capacity = capacity
        self._ahead = ahead
        self._windows = [min(window or capacity, capacity) for window in config.layer_windows]
        # How many slots a window's layers have: a window that covers the capacity needs no ring.
        self._slots_of = {w: min(w + ahead, capacity) for w in self._windows}
        # Keys, then values: 2 (B K) slots H. The slot beyond those that are read takes what must
        # not be remembered: padding.
        self._buffers = [
            torch.zeros(
                2,
                rows * config.kv_heads,
                self._slots_of[window] + 1,
                config.head_width,
                device=device,
                dtype=dtype,
            )
            for window in self._windows
        ]
        self._lengths = [0] * rows
        """Tokens that each row holds; on CUDA, where looking would stall, at most that many."""
        self._whole = False
        """Every row of the present batch is known to have new tokens."""
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
    def room(self) -> int:
        """How many sequences it has memory for."""
        return self._buffers[0].shape[1] // self._config.kv_heads

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self._capacity

    @property
    def ahead(self) -> int:
        """How many of a row's newest tokens `rewind` may take back."""
        return self._ahead

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
        fresh = not any(self._lengths)
        extent = self._advance(batch)
        plans = {
            window: self._plan(batch, window, extent, fresh=fresh) for window in self._slots_of
        }
        return [
            self._attend(layer, plans[window], batch) for layer, window in enumerate(self._windows)
        ]

    def attends_few(self, batch: TokenBatch) -> list[AttendFew]:
        """`attends` for at most 1 + `ahead` new tokens a row, on what `Step` has rotated already.

        Raises:
            DataError: as `attends`.
        """
        extent = self._advance(batch)
        plans = {}
        for window, size in self._slots_of.items():
            seen = self._slots[: min(extent, size)]
            unseen = hidden(batch.positions[:, None, :, None], seen, window, size)
            bias = torch.where(unseen, -torch.inf, 0.0)  # B 1 T S float32
            plans[window] = (self._index(batch, window), bias)
        return [
            attend_few(self._config, buffer, *plans[window])
            for buffer, window in zip(self._buffers, self._windows, strict=True)
        ]

    @property
    def memories(self) -> list[Tensor]:
        """For each layer, keys before values: 2 (room K) (slots + 1) H; always the same tensors."""
        return self._buffers

    def sights(self, batch: TokenBatch, multiple: int, *, whole: bool = False) -> list[Sight]:
        """For each layer, what one new token a row sees; the tokens then count as remembered.

        Args:
            batch: B 1.
            multiple: slots are read by it.
            whole: of all rows there is memory for, instead of the batch's.

        Raises:
            DataError: as `attends`.
        """
        extent, rows = self._advance(batch), self.room if whole else self.rows
        found = {}
        for window, size in self._slots_of.items():
            read = min(-(-extent // multiple) * multiple, size)
            found[window] = Sight(
                slots=self._slots[:read],
                lines=self._lines[size][:rows],
                ring=size < self._capacity,
                window=None if size == window else window,
            )
        return [found[window] for window in self._windows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Take each row's newest tokens back, so that it holds as many as `lengths` says.

        Raises:
            DataError: a row would grow, or lose more tokens than `ahead`.
        """
        for row, (length, held) in enumerate(zip(lengths, self._lengths, strict=True)):
            if not 0 <= held - length <= self._ahead and not self._slots.is_cuda:
                raise DataError(
                    f"row {row} holds {held} tokens and cannot go back to {length}: the cache was "
                    f"made to take back {self._ahead}"
                )
        self._lengths = list(lengths)

    def put(self, rows: Tensor, other: GemmaCache, sources: Tensor) -> None:
        """Let `rows` hold what `sources` of another cache hold; what they held is forgotten.

        Args:
            rows: n int64, of this cache, each at most once; those that follow its last row in
                order are new ones, for which it must have been made.
            other: of the same model, with no greater capacity; it stays as it is. May be this one.
            sources: n int64, rows of `other`; one may be chosen several times.

        Raises:
            DataError: the caches do not fit, or there is no place for so many rows.
        """
        kv_heads = self._config.kv_heads
        rows, sources = rows.to(self._slots.device), sources.to(self._slots.device)
        places, taken = rows.tolist(), sources.tolist()
        if max(places) >= self.room:
            raise DataError(
                f"row {max(places)} is asked for, the cache was made for {self.room} rows"
            )
        if other._config != self._config or other._capacity > self._capacity:
            raise DataError(
                f"a cache of capacity {other._capacity} cannot go into one of {self._capacity}, "
                "nor one of another configuration into this one"
            )
        self._lengths += [0] * (max(places) + 1 - len(self._lengths))
        longest = max(other._lengths[row] for row in taken)
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            slots = min(longest, mine.shape[2] - 1, theirs.shape[2] - 1)
            if slots < longest and mine.shape[2] != theirs.shape[2]:
                raise DataError("the rings of the caches differ: make both with the same `ahead`")
            target = mine.unflatten(1, (-1, kv_heads))[:, :, :, :slots]
            target[:, rows] = theirs.unflatten(1, (-1, kv_heads))[:, :, :, :slots][:, sources]
        for place, row in zip(places, taken, strict=True):
            self._lengths[place] = other._lengths[row]

    def select(self, rows: Tensor) -> GemmaCache:
        """A cache with the past of the chosen rows, in that order; a row may be chosen twice.

        This one is spent: without more rows than before, its memory goes on in the new one, and
        only the rows that change places are copied.

        Args:
            rows: n int64; with none the memory is kept for what `put` brings.
        """
        rows = rows.to(self._slots.device)
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
        return {size: lines * (size + 1) for size in self._slots_of.values()}

    def _advance(self, batch: TokenBatch) -> int:
        """Check that the tokens go on from the past; the positions any of them sees (at most)."""
        if batch.tokens.is_cuda:
            grown = [min(held + batch.shape[1], self._capacity) for held in self._lengths]
            self._lengths = grown
            return max(grown)
        spans = continued(self._lengths, batch, self._capacity)
        for row, span in enumerate(spans):
            if span:
                self._lengths[row] = span.stop
        self._whole = all(spans)
        return max(1, *(span.stop for span in spans))

    def _index(self, batch: TokenBatch, window: int) -> Tensor:
        size = self._slots_of[window]
        positions = batch.positions
        slot = positions if size == self._capacity else positions % size
        if positions.shape[1] == 1 and self._whole:
            return places(self._lines[size][: self.rows], slot)
        kept = batch.documents >= 0
        if size < self._capacity and positions.shape[1] > 1:
            last = positions.masked_fill(~kept, -1).amax(1, keepdim=True)
            kept = kept & (positions > last - size)
        slot = slot.masked_fill(~kept, size)
        return places(self._lines[size][: self.rows], slot)

    def _plan(self, batch: TokenBatch, window: int, extent: int, *, fresh: bool) -> _Plan:
        index, size = self._index(batch, window), self._slots_of[window]
        if fresh:
            return _Plan(index=index, visible=None, slots=0, apart=True)
        if size < self._capacity and batch.shape[1] > 1 + self._ahead:
            visible = self._ring_and_new(batch, window)
            return _Plan(index=index, visible=visible, slots=size, apart=True)
        slots = min(extent, size)
        visible = ~hidden(batch.positions.unsqueeze(-1), self._slots[:slots], window, size)
        return _Plan(index=index, visible=visible, slots=slots, apart=False)

    def _ring_and_new(self, batch: TokenBatch, window: int) -> Tensor:
        """B T (S + T): what new tokens see of the ring before them, and of each other."""
        size = self._slots_of[window]
        positions, held = batch.positions, batch.documents >= 0
        start = positions.masked_fill(~held, self._capacity).amin(1, keepdim=True)  # B 1
        # The newest position before `start` that lies in each slot; negative where there is none.
        past = start - 1 - (start - 1 - self._slots[:size]) % size  # B S
        seen = (past[:, None] >= 0) & (positions.unsqueeze(-1) - past[:, None] < window)
        distance = positions[:, :, None] - positions[:, None, :]
        among = (held[:, :, None] == held[:, None, :]) & (distance >= 0) & (distance < window)
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
