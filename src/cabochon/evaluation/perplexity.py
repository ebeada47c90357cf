"""How many nats a token of real text costs a model, with its uncertainty.

Conventions, so that two figures can be compared:

- A document stands behind its BOS, which is never counted itself; its other tokens are each counted
  exactly once. Its EOS is added, and counted, only where one is given.
- A document with more tokens than the context is read through windows. The first counts all it
  holds; each later one begins `stride` tokens further on, behind a BOS of its own, and counts the
  tokens that no window before it reached. So every counted token but the document's first ones has
  at least context - stride tokens before it.
- The figure is the sum over all documents divided by the count of all their tokens (long documents
  weigh more), in nats; perplexity is its exponential.
- Uncertainty is that of drawing other documents from the same source: the 95% percentile interval
  of a bootstrap over documents. Few documents (below about twenty) make it too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cabochon.core import Backbone, Key, Policy, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.evaluation.intervals import bootstrap
from cabochon.generation.modes import evaluating
from cabochon.losses import cross_entropy

__all__ = ["Comparison", "Perplexity", "compare", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What the documents cost."""

    document_nats: tuple[float, ...]
    """P: the sum of -log p over each document's counted tokens."""
    document_tokens: tuple[int, ...]
    """P: how many were counted."""
    interval: tuple[float, float] | None
    """95% interval of `nats_per_token`; None with a single document, which tells of no other."""

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return sum(self.document_tokens)

    @property
    def nats_per_token(self) -> float:
        """Mean of -log p over all counted tokens."""
        return math.fsum(self.document_nats) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token)."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same documents."""

    difference: float
    """The second's nats per token minus the first's: below 0 the second is better."""
    interval: tuple[float, float] | None
    """95% interval of `difference`, both models scored on the same resampled documents; None with
    a single document."""
    wins: int
    """Documents that cost the second less than the first."""
    documents: int
    """Documents compared."""

    @property
    def decided(self) -> bool:
        """True if the interval holds no zero."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


def perplexity(
    model: Backbone,
    documents: Sequence[Sequence[int]],
    *,
    bos_id: int | None,
    eos_id: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    key: Key | None = None,
) -> Perplexity:
    """Nats per token of `documents` under `model`, by the conventions of this module.

    The model is used in evaluation mode and without gradients, and left as it was.

    Args:
        model: what predicts; its context bounds a window.
        documents: token ids of each, without BOS and EOS.
        bos_id: stands before each window; None for a model that has none, where the first token of
            a document is not counted, as nothing predicts it.
        eos_id: ends each document and is counted; None: no end is added.
        stride: how many tokens further on each later window begins; half the context when absent.
        batch_size: windows at a time; it changes no result beyond rounding.
        key: names the resampling of the interval; ``Key(0, ("bootstrap",))`` when absent.

    Raises:
        DataError: no document, no token to count, or a document that brings its own BOS.
        ConfigError: a stride outside [1, context), or a batch size below 1.
        NonFinite: a document whose sum is NaN or infinite; names it.
    """
    room = model.context - (bos_id is not None)
    stride = max(1, room // 2) if stride is None else stride
    if not 1 <= stride <= room or batch_size < 1:
        raise ConfigError(
            f"stride must lie in [1, {room}] (the model's context) and batch_size be at least 1, "
            f"got {stride} and {batch_size}"
        )
    windows = list(_windows(documents, bos_id, eos_id, room, stride))
    # Windows of like length waste the least padding.
    windows.sort(key=lambda window: len(window.tokens))
    nats = [0.0] * len(documents)
    counts = [0] * len(documents)
    device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(windows), batch_size):
            some = windows[start : start + batch_size]
            for window, total in zip(some, _score(model, some, device), strict=True):
                nats[window.document] += total
                counts[window.document] += window.counted
    _check(nats, counts)
    return Perplexity(
        document_nats=tuple(nats),
        document_tokens=tuple(counts),
        interval=bootstrap(nats, counts, key),
    )


def compare(first: Perplexity, second: Perplexity, *, key: Key | None = None) -> Comparison:
    """The second model's nats per token minus the first's, paired document by document.

    Pairing removes what makes some documents harder than others for any model, so a small
    difference can be sure although both models' own intervals overlap.

    Raises:
        DataError: the two did not count the same numbers of tokens in the same documents.
    """
    if first.document_tokens != second.document_tokens:
        raise DataError(
            f"the first counted {first.tokens} tokens in {len(first.document_tokens)} documents, "
            f"the second {second.tokens} in {len(second.document_tokens)}; compare models on the "
            "same documents, with the same tokenizer and settings"
        )
    change = [b - a for a, b in zip(first.document_nats, second.document_nats, strict=True)]
    return Comparison(
        difference=math.fsum(change) / first.tokens,
        interval=bootstrap(change, first.document_tokens, key),
        wins=sum(each < 0.0 for each in change),
        documents=len(change),
    )


@dataclass(frozen=True)
class _Window:
    """A stretch of a document, and how many of its last tokens are counted."""

    document: int
    tokens: list[int]
    counted: int


def _windows(
    documents: Sequence[Sequence[int]],
    bos_id: int | None,
    eos_id: int | None,
    room: int,
    stride: int,
) -> Iterator[_Window]:
    """Windows that count every token once (but a first token that has no BOS before it).

    `room` is how many of a document's tokens the context holds beside BOS.
    """
    front = [] if bos_id is None else [bos_id]
    for index, document in enumerate(documents):
        ids = list(document) + ([] if eos_id is None else [eos_id])
        if front and ids[:1] == front:
            raise DataError(
                f"document {index} begins with BOS ({bos_id}), which is added here; "
                "encode documents without control tokens"
            )
        # A model reads all but the last token, so one more than the context can be scored.
        reached = min(len(ids), room + 1)
        counted = reached - (not front)
        if counted > 0:
            yield _Window(index, front + ids[:reached], counted)
        begin = 0
        while reached < len(ids):
            begin += stride
            end = min(len(ids), begin + room + 1)
            yield _Window(index, front + ids[begin:end], end - reached)
            reached = end


def _score(model: Policy, windows: Sequence[_Window], device: torch.device | str) -> list[float]:
    """The counted nats of each window."""
    masks = [
        [False] * (len(window.tokens) - window.counted) + [True] * window.counted
        for window in windows
    ]
    whole = TokenBatch.of([window.tokens for window in windows], masks=masks).to(device)
    # The last token of the longest window is a target only, and may lie beyond the context.
    batch = TokenBatch(**{name: value[:, :-1] for name, value in vars(whole).items()})
    prediction = model(batch)
    totals = []
    for row in range(len(windows)):
        alone = torch.zeros_like(batch.mask)
        alone[row] = batch.mask[row]
        totals.append(cross_entropy(prediction, replace(batch, mask=alone)).total.item())
    return totals


def _check(nats: Sequence[float], counts: Sequence[int]) -> None:
    if not any(counts):
        raise DataError(f"no token to count in {len(counts)} document(s); give some text")
    for index, total in enumerate(nats):
        if not math.isfinite(total):
            raise NonFinite(
                f"document {index} costs {total} nats; look for NaN in the model's weights, "
                "or evaluate in float32"
            )
