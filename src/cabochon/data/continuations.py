"""Prompts and what was written after them: rows taken apart, and put together to be learned from.

Here a row holds one document. Its prompt is what stands before its first counted target; where
nothing counts, the whole row is a prompt that nothing follows yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.core.types import Group, TokenBatch

__all__ = ["Sequences", "Written", "prompts_of", "references_of", "written_in"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A prompt and what one writer put after it."""

    prompt: Tensor
    """T int64."""
    tokens: Tensor
    """T int64."""
    counts: Tensor
    """T bool: which of the tokens are to be predicted."""
    logprob: Tensor | None = None
    """T float32, nats: under the model that learns, as it was when it drew them; None if another
    wrote them."""
    stopped: bool = True
    """A stop token ended it, not a limit."""
    reward: float = 0.0
    gain: float = 0.0
    """The reward less its baseline."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What a micro-batch learns from, a row each."""

    batch: TokenBatch
    """B T; what was written counts, the prompts do not."""
    own: Tensor
    """B bool: the model that learns wrote it."""
    stopped: Tensor
    """B bool: a stop token ended it, not a limit."""
    recorded: Tensor
    """B T float32, nats: its log-probability of each target when it drew it; 0 elsewhere."""
    reward: Tensor
    """B float32."""
    gain: Tensor
    """B float32: the reward less its baseline."""

    @staticmethod
    def of(found: Sequence[Written], device: torch.device | str = "cpu") -> Sequences:
        """A row for each, padded on the right."""
        batch = TokenBatch.of(
            [torch.cat([each.prompt, each.tokens]).cpu() for each in found],
            masks=[[False] * len(each.prompt) + each.counts.tolist() for each in found],
        ).to(device)
        recorded = torch.zeros(batch.shape)
        for row, each in enumerate(found):
            if each.logprob is not None:
                begin = len(each.prompt) - 1  # where the first token written is the target
                recorded[row, begin : begin + len(each.logprob)] = each.logprob.cpu()
        return Sequences(
            batch=batch,
            own=torch.tensor([each.logprob is not None for each in found], device=device),
            stopped=torch.tensor([each.stopped for each in found], device=device),
            recorded=recorded.to(device),
            reward=torch.tensor([each.reward for each in found], device=device),
            gain=torch.tensor([each.gain for each in found], device=device),
        )


def prompts_of(batch: TokenBatch) -> list[Tensor]:
    """The prompt of each row, T int64; no token after it is read.

    Raises:
        DataError: a row does not hold one document from its first slot on.
    """
    lengths = _lengths(batch)
    counted = batch.mask.int()
    # The target at the first counted place is the first token after the prompt.
    ends = torch.where(batch.mask.any(1), counted.argmax(1) + 1, lengths).tolist()
    return [row[:end] for row, end in zip(batch.tokens, ends, strict=True)]


def references_of(
    batch: TokenBatch, stop_ids: Collection[int], rows: Iterable[int]
) -> list[Written]:
    """What follows the prompts of these rows.

    Nothing counts after the first counted stop token: padding that looks like it is not learned.

    Raises:
        DataError: as `prompts_of`; or nothing follows a prompt.
    """
    batch = batch.to("cpu")
    prompts, lengths = prompts_of(batch), _lengths(batch).tolist()
    found = []
    for row in rows:
        begin = len(prompts[row])
        tokens = batch.tokens[row, begin : lengths[row]]
        counts = batch.mask[row, begin - 1 : lengths[row] - 1]
        if not len(tokens):
            raise DataError(
                f"row {row} is a prompt of {begin} tokens that nothing follows; give it a "
                "completion, or learn from the student's own samples alone"
            )
        stops = torch.isin(tokens, torch.tensor(list(stop_ids), dtype=torch.int64)) & counts
        after = stops.cumsum(0) - stops.int() > 0
        found.append(
            Written(
                prompt=prompts[row],
                tokens=tokens,
                counts=counts & ~after,
                stopped=bool(stops.any()),
            )
        )
    return found


def written_in(
    groups: Sequence[Group],
    *,
    own: bool,
    rewards: Tensor | None = None,
    gains: Tensor | None = None,
) -> list[Written]:
    """The completions of groups, one after another.

    Args:
        groups: P prompts with G completions each.
        own: the model that learns wrote them.
        rewards: P G; 0 where absent.
        gains: P G, the rewards less their baselines; 0 where absent.
    """
    return [
        Written(
            prompt=group.prompt,
            tokens=each.tokens,
            counts=torch.ones_like(each.tokens, dtype=torch.bool),
            logprob=each.model_logprob if own else None,
            stopped=each.stopped,
            reward=0.0 if rewards is None else float(rewards[place, sample]),
            gain=0.0 if gains is None else float(gains[place, sample]),
        )
        for place, group in enumerate(groups)
        for sample, each in enumerate(group.completions)
    ]


def _lengths(batch: TokenBatch) -> Tensor:
    """B: tokens of each row's document.

    Raises:
        DataError: a row does not hold one document from its first slot on.
    """
    real = batch.documents >= 0
    lengths = real.sum(1)
    place = torch.arange(batch.shape[1], device=real.device)
    whole = (real == (place < lengths[:, None])).all(1) & (lengths > 0)
    alone = ((batch.documents == batch.documents[:, :1]) | ~real).all(1)
    wrong = (~(whole & alone)).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"rows {wrong[:5]} do not hold one document from their first slot on; put each prompt "
            "into a row of its own"
        )
    return lengths
