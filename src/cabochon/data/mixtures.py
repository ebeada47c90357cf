"""Several packed corpora as one, each row drawn from one of them by weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.core.keys import Key
from cabochon.core.types import TokenBatch
from cabochon.data.order import Order
from cabochon.data.packed import Packed, shard

__all__ = ["Mixture"]

_BLOCK = 4096
"""Draws that share one stream: seeking counts the draws before, a block at a time."""


class Mixture:
    """Rows of several packed corpora in given proportions.

    Which corpus a row comes from is an independent keyed draw; each corpus is read in its own
    keyed order, epoch after epoch, at its own pace.
    """

    def __init__(self, sources: Mapping[str, Packed], weights: Mapping[str, float]) -> None:
        """A mixture of packed corpora by name.

        Args:
            sources: corpora of equal context and tokenizer.
            weights: of each corpus, relative to one another; 0 leaves it out.

        Raises:
            ConfigError: names differ, a weight is negative or not finite, all are 0, or the
                contexts differ.
            TokenizerMismatch: the corpora were packed with different tokenizers.
        """
        if set(sources) != set(weights):
            raise ConfigError(
                f"the corpora are {sorted(sources)}, the weights are for {sorted(weights)}; give "
                "each corpus one weight"
            )
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ConfigError(f"the weight of {name} is {weight}; weights are finite and >= 0")
        if not any(weights.values()):
            raise ConfigError("all weights are 0; give at least one corpus a weight above 0")
        _refuse_unlike(sources)
        self._names = [name for name in sorted(sources) if weights[name] > 0.0]
        self._sources = [sources[name] for name in self._names]
        self._bounds = np.cumsum([weights[name] for name in self._names])

    @property
    def sources(self) -> Mapping[str, Packed]:
        """The corpora that are drawn from, by name."""
        return dict(zip(self._names, self._sources, strict=True))

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """Endless batches; the arguments and their meaning are those of `Packed.batches`.

        Raises:
            ConfigError: the batch cannot be shared equally, or a number is out of range.
        """
        own = shard(batch_size, start, rank, ranks)
        taken = self._drawn_before(key, start * batch_size)
        orders = [
            Order(key.fold("source", name), source.rows, int(before))
            for name, source, before in zip(self._names, self._sources, taken, strict=True)
        ]
        return self._batches(key, batch_size, start, own, orders)

    def _batches(
        self, key: Key, batch_size: int, start: int, own: slice, orders: list[Order]
    ) -> Iterator[TokenBatch]:
        first = start * batch_size
        while True:
            drawn = self._draws(key, first, batch_size)
            rows = np.empty(batch_size, dtype=np.int64)
            for number, order in enumerate(orders):
                rows[drawn == number] = order.take(int((drawn == number).sum()))
            yield self._gathered(drawn[own], rows[own])
            first += batch_size

    def _gathered(self, drawn: NDArray[np.int64], rows: NDArray[np.int64]) -> TokenBatch:
        present = [int(number) for number in np.unique(drawn)]
        parts = [self._sources[number].batch(rows[drawn == number]) for number in present]
        places = np.concatenate([np.flatnonzero(drawn == number) for number in present])
        back = torch.from_numpy(np.argsort(places))
        return TokenBatch(
            **{
                name: torch.cat([vars(part)[name] for part in parts])[back]
                for name in vars(parts[0])
            }
        )

    def _draws(self, key: Key, first: int, count: int) -> NDArray[np.int64]:
        """Which corpus each of the rows `first` to `first + count` comes from: count int64."""
        blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
        drawn = np.concatenate([self._block(key, block) for block in blocks])
        begin = first - blocks.start * _BLOCK
        return np.asarray(drawn[begin : begin + count])

    def _drawn_before(self, key: Key, first: int) -> NDArray[np.int64]:
        """How many of the rows before `first` came from each corpus."""
        counts = np.zeros(len(self._names), dtype=np.int64)
        for block in range(first // _BLOCK + 1):
            drawn = self._block(key, block)[: first - block * _BLOCK]
            counts += np.bincount(drawn, minlength=len(counts))
        return counts

    def _block(self, key: Key, block: int) -> NDArray[np.int64]:
        # Raw bits, as in Order: the same in every numpy.
        bits = key.fold("mixture", block).numpy().bit_generator.random_raw(_BLOCK)
        uniform = (bits >> np.uint64(11)) * 2.0**-53
        drawn = np.searchsorted(self._bounds, uniform * self._bounds[-1], side="right")
        drawn = np.minimum(drawn, len(self._names) - 1)
        return np.asarray(drawn, dtype=np.int64)


def _refuse_unlike(sources: Mapping[str, Packed]) -> None:
    contexts = {name: source.context for name, source in sources.items()}
    if len(set(contexts.values())) > 1:
        raise ConfigError(
            f"the corpora have rows of different lengths: {contexts}; pack them alike"
        )
    made = {name: source.manifest.tokenizer[:12] for name, source in sources.items()}
    if len({source.manifest.tokenizer for source in sources.values()}) > 1:
        raise TokenizerMismatch(
            f"the corpora were packed with different tokenizers: {made}; pack them with one"
        )
