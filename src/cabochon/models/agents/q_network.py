"""Heads of networks that judge actions: Q(s, a), whole or as value and advantage.

Source: Wang et al. 2016, "Dueling Network Architectures for Deep Reinforcement Learning",
arXiv:1511.06581, equation 9; as in SEED RL, the last layer of the advantages has no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import Head

__all__ = ["ActionValues", "DuelingValues", "q_head"]


class ActionValues(nn.Module):
    """One value for each action."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, actions)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """n D to q, n A."""
        return {"q": self.q(features)}


class DuelingValues(nn.Module):
    """Q = V + A - mean A: the worth of the state, and by how much an action betters the mean."""

    def __init__(self, width: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.value_hidden, self.value = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        self.advantage_hidden = nn.Linear(width, hidden)
        self.advantage = nn.Linear(hidden, actions, bias=False)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """n D to q, n A."""
        value = self.value(torch.relu(self.value_hidden(features)))
        advantage = self.advantage(torch.relu(self.advantage_hidden(features)))
        return {"q": value + advantage - advantage.mean(-1, keepdim=True)}


def q_head(dueling: int = 512) -> Head:
    """The head of a Q network.

    Args:
        dueling: width of the hidden layers of value and advantage; 0 for one linear layer.

    Raises:
        ConfigError: the width is negative.
    """
    if dueling < 0:
        raise ConfigError(f"the width of a dueling head must be 0 or more, got {dueling}")
    if dueling == 0:
        return ActionValues
    return lambda width, actions: DuelingValues(width, actions, dueling)
