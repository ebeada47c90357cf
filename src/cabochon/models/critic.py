"""What a state is worth: a number for each position of a text, read from hidden states.

A learned baseline must not depend on the token that is judged by it: the value at a position has
seen the prompt and what was written up to there, not the target. It is one linear map, of the
policy's own hidden states (from which no gradient of it reaches the policy), or of a network of its
own that starts as a copy of the policy. A number for each whole text is the value at its end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cabochon.core.errors import ConfigError
from cabochon.core.protocols import Prediction
from cabochon.core.types import LinearPrediction, TokenBatch
from cabochon.models.reward_head import last_tokens

__all__ = ["Critic", "critic_of"]


class Critic(nn.Module):
    """A value for each position; see `critic_of`."""

    def __init__(self, width: int, trunk: nn.Module | None, device: torch.device) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: TokenBatch, prediction: Prediction) -> Tensor:
        """B T float32: what is to come from each position on.

        Args:
            batch: B T.
            prediction: of the policy for it, whose hidden states serve where there is no trunk.
        """
        if self.trunk is not None:
            return self._read(_hidden(self.trunk(batch)))
        return self._read(_hidden(prediction).detach())

    def at_ends(self, batch: TokenBatch, prediction: Prediction) -> Tensor:
        """n float32: the value at the last token of each document, row by row."""
        values: Tensor = self(batch, prediction)
        return values.flatten()[last_tokens(batch)]

    def state(self) -> Mapping[str, Tensor]:
        """Its parameters by name, live, for a checkpoint."""
        return {f"critic.{name}": each.detach() for name, each in self.named_parameters()}

    def _read(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.head(hidden.float()).squeeze(-1)
        return values


def critic_of(policy: nn.Module, kind: Literal["head", "network"]) -> Critic:
    """A critic for what `policy` does, whose first values are all 0.

    Args:
        policy: a language model of ours or of transformers.
        kind: "head" reads the policy's hidden states, "network" those of a copy that learns.

    Raises:
        ConfigError: the policy has no hidden states to read.
    """
    one = torch.zeros((1, 1), dtype=torch.int64, device=next(policy.parameters()).device)
    batch = TokenBatch(tokens=one, positions=one, documents=one, targets=one, mask=one.bool())
    with torch.no_grad():
        width = _hidden(policy(batch)).shape[-1]
    trunk = copy.deepcopy(policy) if kind == "network" else None
    return Critic(width, trunk, one.device)


def _hidden(prediction: Prediction) -> Tensor:
    if not isinstance(prediction, LinearPrediction):
        raise ConfigError(
            f"a critic reads hidden states, but the policy gives {type(prediction).__name__}, "
            "which has none; take another baseline, such as prompt"
        )
    return prediction.hidden
