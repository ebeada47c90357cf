"""What a policy thinks of completions that are already there: the training forward, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.core import Group, Policy, TokenBatch
from cabochon.core.errors import DataError
from cabochon.generation.modes import device_of, evaluating
from cabochon.generation.sample import sampled_from

__all__ = ["score"]

ROWS_OF_LOGITS = 512
"""Positions whose logits exist at a time."""


@torch.no_grad()
def score(
    policy: Policy,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rows: int = 16,
) -> list[list[Tensor]]:
    """The log-probability of every token of every completion, in nats.

    Args:
        policy: read in evaluation mode and without gradients, where it is.
        groups: prompts and what to score behind them.
        temperature: with the two cuts, of the distribution to score under; the policy itself when
            left alone. Above 0.
        top_k: as `sample.draw`.
        top_p: as `sample.draw`.
        rows: how many completions are read at a time.

    Returns:
        T float32 for each completion of each group, on its device; -inf where a cut leaves no such
        token.

    Raises:
        DataError: an empty prompt.
        NonFinite: logits without a distribution.
    """
    pairs = [(group.prompt, c.tokens) for group in groups for c in group.completions]
    empty = [number for number, (prompt, _) in enumerate(pairs) if len(prompt) == 0]
    if empty:
        raise DataError(f"completion {empty[0]} has an empty prompt; begin with BOS")
    found: list[Tensor] = []
    with evaluating(policy):
        for start in range(0, len(pairs), rows):
            chunk = pairs[start : start + rows]
            batch = _batch(chunk).to(device_of(policy, chunk[0][0]))
            prediction = policy(batch)
            chosen = batch.mask.flatten().nonzero().flatten()
            parts = []
            for some in chosen.split(ROWS_OF_LOGITS):
                logits = prediction.logits(some)
                if (temperature, top_k, top_p) == (1.0, 0, 1.0):
                    law = logits.log_softmax(-1)
                else:
                    law = sampled_from(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                targets = batch.targets.flatten()[some].unsqueeze(-1)
                parts.append(law.gather(-1, targets).squeeze(-1))
            flat = torch.cat(parts) if parts else torch.zeros(0)
            each = flat.split([len(completion) for _, completion in chunk])
            found += [
                one.to(completion.device) for one, (_, completion) in zip(each, chunk, strict=True)
            ]
    scores = iter(found)
    return [[next(scores) for _ in group.completions] for group in groups]


def _batch(pairs: Sequence[tuple[Tensor, Tensor]]) -> TokenBatch:
    """Prompt and completion a row; the completion's tokens are the targets."""
    return TokenBatch.of(
        [torch.cat([prompt.cpu(), completion.cpu()]) for prompt, completion in pairs],
        masks=[[False] * len(prompt) + [True] * len(completion) for prompt, completion in pairs],
    )
