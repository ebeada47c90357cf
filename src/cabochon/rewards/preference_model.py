"""Models of preferences as rewards: one, or several whose scores are averaged.

A completion is read behind its prompt, tokens as they were drawn, and its score is the head's at
its last token. Only differences of scores mean anything (the loss that trained the model sees no
more), so several models are put on one scale before they are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.modes import device_of, evaluating
from cabochon.models.reward_head import RewardModel
from cabochon.rewards.scores import named

__all__ = ["preferred", "score_sequences"]


def preferred(model: RewardModel, *, rows: int = 16) -> RewardFn:
    """The reward that a model of preferences gives.

    Args:
        model: of the tokenizer that the groups' tokens are of; used in evaluation mode, without
            gradients, where it is.
        rows: completions that are read at a time; it changes no score beyond rounding.

    Returns:
        A reward that raises DataError for a completion that the model has no room for; names it.

    Raises:
        ConfigError: `rows` is below 1.
    """
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, got {rows}")

    def reward(groups: Sequence[Group], /) -> Tensor:
        texts = []
        for place, group in enumerate(groups):
            for sample, each in enumerate(group.completions):
                text = torch.cat([group.prompt.cpu(), each.tokens.cpu()])
                if not 0 < len(text) <= model.context:
                    raise DataError(
                        f"{named(groups, place, sample)} has {len(text)} tokens with its prompt; "
                        f"the reward model reads 1 to {model.context}"
                    )
                texts.append(text)
        values = score_sequences(model, texts, rows=rows)
        return values.reshape(len(groups), -1)

    return reward


@torch.no_grad()
def score_sequences(
    model: RewardModel, sequences: Sequence[Sequence[int] | Tensor], *, rows: int = 16
) -> Tensor:
    """n float32, on the CPU: the score of each sequence of token ids.

    Args:
        model: used in evaluation mode, where it is.
        sequences: n, each of at least one token.
        rows: how many are read at a time, those of like length together.
    """
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    found = torch.zeros(len(sequences))
    device = device_of(model, found)
    with evaluating(model):
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            batch = TokenBatch.of([sequences[place] for place in some])
            found[torch.tensor(some)] = model(batch.to(device)).float().cpu()
    return found
