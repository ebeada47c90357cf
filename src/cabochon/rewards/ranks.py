"""The order of completions of a prompt by their rewards, and what is to be done with equals.

What learns from ranks alone is indifferent to every strictly increasing transform of the reward,
bit for bit. A reward of few values leaves many equals. They may stay equal, or be ordered by a hash
of their tokens: the same strict order of all texts in every update and every run, as a reward with
its smallest digits filled in would have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cabochon.core import Group
from cabochon.core.errors import DataError

__all__ = ["Ties", "ranks"]

Ties = Literal["equal", "hash"]
"""Equal rewards are equal ranks; or a hash of prompt and completion decides between them."""


def ranks(writers: Sequence[tuple[Sequence[Group], Tensor]], ties: Ties = "equal") -> list[Tensor]:
    """The rank of every completion among those that all writers put after the same prompt.

    Args:
        writers: for each its P groups and their rewards, P G; G may differ between writers, the
            prompts may not.
        ties: what becomes of equal rewards. The same tokens with the same reward are always equal.

    Returns:
        For each writer P G int64: 0 is the lowest rank of a prompt, equals share one, no rank is
        left out between two.

    Raises:
        DataError: writers with different prompts, or rewards of another shape than P G.
    """
    counts = {len(groups) for groups, _ in writers}
    if len(counts) != 1:
        raise DataError(f"the writers have {sorted(counts)} prompts; ranks are among completions "
                        "of the same prompts")  # fmt: skip
    found: list[list[list[int]]] = [[] for _ in writers]
    for place in range(counts.pop()):
        marks = [_marks(groups[place], rewards[place], ties) for groups, rewards in writers]
        _refuse_other_prompts([groups[place] for groups, _ in writers], place)
        order = {mark: rank for rank, mark in enumerate(sorted({m for own in marks for m in own}))}
        for rows, own in zip(found, marks, strict=True):
            rows.append([order[mark] for mark in own])
    return [
        torch.tensor(rows, dtype=torch.int64, device=rewards.device).view(rewards.shape)
        for rows, (_, rewards) in zip(found, writers, strict=True)
    ]


def _marks(group: Group, rewards: Tensor, ties: Ties) -> list[tuple[float, bytes]]:
    """What each completion is ordered by."""
    if tuple(rewards.shape) != (len(group.completions),):
        raise DataError(
            f"{len(group.completions)} completions have rewards of shape {tuple(rewards.shape)}"
        )
    return [
        (reward, _hash(group.prompt, each.tokens) if ties == "hash" else b"")
        for reward, each in zip(rewards.tolist(), group.completions, strict=True)
    ]


def _hash(prompt: Tensor, tokens: Tensor) -> bytes:
    """Of the prompt too, so that no text is preferred everywhere."""
    said = hashlib.blake2b(digest_size=8)
    said.update(len(prompt).to_bytes(8, "little"))
    said.update(prompt.cpu().numpy().tobytes())
    said.update(tokens.cpu().numpy().tobytes())
    return said.digest()


def _refuse_other_prompts(groups: Sequence[Group], place: int) -> None:
    first = groups[0].prompt
    for other in groups[1:]:
        if not torch.equal(first, other.prompt):
            raise DataError(
                f"the writers' prompts {place} differ ({len(first)} and {len(other.prompt)} "
                "tokens); ranks are among completions of the same prompts"
            )
