"""Which tokens of a batch see which, asked once for all layers of one window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Tile", "Visibility"]

_QUERIES = 64
"""Queries of a tile: fewer skip more of the keys that are not seen, more make better products."""
_TILE_ELEMENTS = 2**18
"""Scores of a tile; a few such matrices fit in a CPU's cache."""
_KEPT_ELEMENTS = 2**22
"""Masks up to so many scores of one head are made once and kept."""


@dataclass(frozen=True)
class Tile:
    """Some rows, key heads and queries, and the keys that any of these queries sees."""

    rows: slice
    heads: slice
    queries: slice
    keys: slice

    @staticmethod
    def length(part: slice) -> int:
        """How many elements a slice has."""
        size: int = part.stop - part.start
        return size

    @property
    def batches(self) -> int:
        """Rows times key heads."""
        return self.length(self.rows) * self.length(self.heads)

    @property
    def pairs(self) -> int:
        """Scores of one query head a key head."""
        return self.batches * self.length(self.queries) * self.length(self.keys)

    def shape(self, group: int) -> tuple[int, int, int, int, int]:
        """B K T G S of the tile's scores."""
        length = self.length
        return (
            length(self.rows),
            length(self.heads),
            length(self.queries),
            group,
            length(self.keys),
        )


class Visibility:
    """What each query of a batch sees: its own document, not after it, within the window.

    A token sees those of equal document id at positions p with 0 <= own - p < window. Padding
    (document -1) sees padding, so every token sees at least itself.
    """

    def __init__(self, documents: Tensor, positions: Tensor, window: int | None) -> None:
        """Nothing is computed yet.

        Args:
            documents: B T int64; -1 is padding.
            positions: B T int64, within the document.
            window: tokens seen, the own one included; None: all.
        """
        self.documents = documents
        self.positions = positions
        self.window = window
        self.blocks: object = None
        """What a CUDA kernel prepared of the same, kept for the next layer."""
        self._kept: dict[tuple[int, torch.dtype, float], Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        rows, length = self.documents.shape
        return rows, length

    def visible(self, queries: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """B T S bool: for the chosen queries, which of all tokens of their row they see."""
        code, reach = self._code
        distance = code[rows, queries, None] - code[rows, None, :]
        return (distance >= 0) & (distance < reach)

    def tiles(self, kv_heads: int, group: int) -> list[Tile]:
        """Tiles that cover every pair of query and key that see each other, each query once."""
        rows, _ = self.shape
        tiles = []
        for queries, keys in self._ranges:
            scores = group * Tile.length(queries) * Tile.length(keys)
            row_step = max(1, _TILE_ELEMENTS // (scores * kv_heads))
            head_step = max(1, min(kv_heads, _TILE_ELEMENTS // scores))
            if row_step > 1 or head_step == kv_heads:
                head_step = kv_heads
            for row in range(0, rows, row_step):
                some_rows = slice(row, min(row + row_step, rows))
                for head in range(0, kv_heads, head_step):
                    some_heads = slice(head, min(head + head_step, kv_heads))
                    tiles.append(Tile(some_rows, some_heads, queries, keys))
        return tiles

    def bias(self, tile: Tile, dtype: torch.dtype, seen: float = 0.0) -> Tensor:
        """B 1 T 1 S: `seen` where a key is seen, -inf elsewhere."""
        if self.documents.numel() * self.shape[1] > _KEPT_ELEMENTS:
            return self._bias(tile.queries, tile.keys, tile.rows, dtype, seen)
        name = tile.queries.start, dtype, seen
        if name not in self._kept:
            self._kept[name] = self._bias(tile.queries, tile.keys, slice(None), dtype, seen)
        return self._kept[name][tile.rows]

    def _bias(
        self, queries: slice, keys: slice, rows: slice, dtype: torch.dtype, seen: float
    ) -> Tensor:
        visible = self.visible(queries, rows)[:, :, keys]
        bias = torch.full(visible.shape, seen, dtype=dtype, device=visible.device)
        return bias.masked_fill_(~visible, float("-inf"))[:, None, :, None, :]

    @cached_property
    def _code(self) -> tuple[Tensor, int]:
        """One number a token, B T, and the reach: seen means 0 <= difference < reach."""
        extent = int(self.positions.max()) + 1 if self.positions.numel() else 1
        reach = extent if self.window is None else min(self.window, extent)
        return self.documents * (extent + reach) + self.positions, reach

    @cached_property
    def _ranges(self) -> list[tuple[slice, slice]]:
        """Blocks of queries, each with the span of keys that any of them sees."""
        _, length = self.shape
        ranges = []
        for start in range(0, length, _QUERIES):
            queries = slice(start, min(start + _QUERIES, length))
            seen = self.visible(queries).any(0).any(0).nonzero()
            ranges.append((queries, slice(int(seen[0]), int(seen[-1]) + 1)))
        return ranges
