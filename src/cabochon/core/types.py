"""The records that travel between the rooms.

Shape letters, the same in every file: B batch, T time (tokens), V vocabulary, D width, N heads,
K key/value heads, H head width, L layers, P prompts, G samples of one prompt, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError

__all__ = [
    "Completion",
    "Group",
    "GroupTargets",
    "LinearPrediction",
    "Loss",
    "SampledTargets",
    "Step",
    "TokenBatch",
    "TopKTargets",
    "soft_cap",
]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one micro-batch: a sum and a count, never a mean.

    Sums and counts add over micro-batches and ranks; means do not. `fit` divides once.
    """

    total: Tensor
    """Sum over the units, a float32 scalar that carries the gradient."""
    weight: Tensor
    """How many units (tokens, sequences, images) were summed: a scalar."""
    report: Mapping[str, Tensor] = field(default_factory=dict)
    """Further sums over the same units, detached scalars; `fit` divides them by the weight."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of tokens, each of which may hold several documents or end in padding.

    A token attends to the tokens of its own document that are not after it, so packing several
    documents into a row, and padding on either side, change nothing.
    """

    tokens: Tensor
    """B T int64: the inputs."""
    positions: Tensor
    """B T int64: place within the document, from 0."""
    documents: Tensor
    """B T int64: which document of its row a token belongs to; -1 is padding."""
    targets: Tensor
    """B T int64: the token that follows in the same document; any value where `mask` is False."""
    mask: Tensor
    """B T bool: the target counts in the loss."""

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        rows, length = self.tokens.shape
        return rows, length

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        return TokenBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Rows `start` to `stop` (exclusive), as views."""
        return TokenBatch(**{name: value[start:stop] for name, value in vars(self).items()})

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int] | Tensor],
        *,
        masks: Sequence[Sequence[bool]] | None = None,
        pad: int = 0,
        left: bool = False,
    ) -> TokenBatch:
        """One document a row, padded to the longest; every token but the first is a target.

        Args:
            sequences: token ids, each of at least one token.
            masks: per sequence, True where the token *itself* is to be predicted (the first
                token's entry is ignored: nothing precedes it); all True when absent.
            pad: the id written into the padding; its value changes no result.
            left: pad on the left instead of the right.

        Raises:
            ValueError: a sequence is empty, or a mask is not as long as its sequence.
        """
        lengths = [len(sequence) for sequence in sequences]
        if not lengths or min(lengths) == 0:
            raise ValueError(f"need sequences of at least one token, got lengths {lengths}")
        if masks is not None and [len(mask) for mask in masks] != lengths:
            found = [len(mask) for mask in masks]
            raise ValueError(f"masks have lengths {found}, sequences {lengths}; they must agree")
        rows, longest = len(lengths), max(lengths)
        tokens = torch.full((rows, longest), pad, dtype=torch.int64)
        targets = torch.full((rows, longest), pad, dtype=torch.int64)
        positions = torch.zeros((rows, longest), dtype=torch.int64)
        documents = torch.full((rows, longest), -1, dtype=torch.int64)
        mask = torch.zeros((rows, longest), dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids = torch.as_tensor(sequence, dtype=torch.int64)
            begin = longest - len(ids) if left else 0
            end = begin + len(ids)
            tokens[row, begin:end] = ids
            positions[row, begin:end] = torch.arange(len(ids))
            documents[row, begin:end] = 0
            targets[row, begin : end - 1] = ids[1:]
            counted = torch.ones(len(ids)) if masks is None else torch.as_tensor(masks[row])
            mask[row, begin : end - 1] = counted[1:].bool()
        return TokenBatch(
            tokens=tokens, positions=positions, documents=documents, targets=targets, mask=mask
        )


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), which keeps |logits| below `cap`; None leaves them alone."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True, kw_only=True)
class LinearPrediction:
    """Next-token logits kept as hidden states and head: unembedded only where asked for.

    logits = soft_cap(hidden @ head.T) / temperature, in float32.
    """

    hidden: Tensor
    """B T D: after the final norm."""
    head: Tensor
    """V D: the unembedding, often the tied embedding."""
    cap: float | None = None
    """The final soft-cap, inside every logit this prediction gives."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 < self.temperature < math.inf and (self.cap is None or self.cap > 0.0)):
            raise ConfigError(
                f"temperature and soft-cap must be above 0, got {self.temperature} and {self.cap}"
            )

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: the logits of the chosen rows of the flattened (B T) positions."""
        chosen = self.hidden.flatten(0, 1)[rows]
        return soft_cap((chosen @ self.head.T).float(), self.cap) / self.temperature

    def tempered(self, temperature: float) -> LinearPrediction:
        """The same prediction with its logits divided by `temperature` once more."""
        return replace(self, temperature=self.temperature * temperature)


@dataclass(frozen=True, kw_only=True)
class TopKTargets:
    """A teacher's likeliest tokens at every position, and how likely all others are together."""

    ids: Tensor
    """B T k int64: different tokens; -1 where a position has fewer than k."""
    logprob: Tensor
    """B T k float32, nats: under the teacher's whole distribution; -inf where `ids` is -1."""
    tail: Tensor
    """B T float32, nats: log of the probability of every token that is not among `ids`, -inf if
    none is left; NaN where the teacher says nothing."""


@dataclass(frozen=True, kw_only=True)
class SampledTargets:
    """Tokens that a teacher drew, with replacement, at every position."""

    ids: Tensor
    """B T m int64: different tokens; -1 where a position has fewer than m."""
    share: Tensor
    """B T m float32: of the position's draws, summing to 1 (0 where `ids` is -1); all 0 where the
    teacher says nothing."""


@dataclass(frozen=True, kw_only=True)
class GroupTargets:
    """How likely a teacher of another vocabulary finds each group of the text's tokens."""

    group: Tensor
    """B T int64: the group, from 0, that a position's target is in; -1 for none."""
    logprob: Tensor
    """n float32, nats: of the bytes of each group, as the teacher's own tokens spell them."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a policy wrote after a prompt."""

    tokens: Tensor
    """T int64: every token drawn, the stop token included when there is one."""
    logprob: Tensor
    """T float32, nats: of each token under the distribution it was really drawn from, after
    temperature, top-k and top-p. Greedy decoding draws nothing: there it is `model_logprob`."""
    model_logprob: Tensor
    """T float32, nats: of each token under the model itself, at temperature 1 and with no cut."""
    stopped: bool
    """True if a stop token ended it, False if the length limit did."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt and the samples drawn for it."""

    prompt: Tensor
    """T int64."""
    completions: tuple[Completion, ...]
    """G of them."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one update did; everything is a plain number."""

    index: int
    """Which update, counted from 0."""
    loss: float
    """Mean over the units of the whole update."""
    grad_norm: float
    """Euclidean norm of the mean gradient, before clipping."""
    weight: float
    """How many units the update averaged."""
    learning_rate: float
    """Of the first parameter group."""
    report: Mapping[str, float]
    """The loss's further sums, divided by the weight."""
