"""Rewards that count: how long a completion is, and how much of it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn
from cabochon.core.errors import ConfigError

__all__ = ["excess", "length", "repetition"]


def length(groups: Sequence[Group], /) -> Tensor:
    """P G: tokens of each completion, its stop token included; a negative weight asks for less."""
    return torch.tensor(
        [[float(len(each.tokens)) for each in group.completions] for group in groups]
    )


def excess(limit: int) -> RewardFn:
    """Minus the share of `limit` by which a completion is longer than it: 0 up to `limit` tokens.

    Raises:
        ConfigError: `limit` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"a length to keep to is at least 1 token, got {limit}")
    return lambda groups: -(length(groups) / limit - 1.0).clamp(min=0.0)


def repetition(n: int = 4) -> RewardFn:
    """Minus the share of a completion's n-grams of tokens that stood in it before: -1 to 0.

    A completion of fewer than n tokens repeats nothing.

    Raises:
        ConfigError: `n` is below 1.
    """
    if n < 1:
        raise ConfigError(f"n-grams have at least 1 token, got {n}")

    def reward(groups: Sequence[Group], /) -> Tensor:
        return torch.tensor(
            [[-_repeated(each.tokens.tolist(), n) for each in g.completions] for g in groups],
            dtype=torch.float32,
        )

    return reward


def _repeated(tokens: list[int], n: int) -> float:
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
