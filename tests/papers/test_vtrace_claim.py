"""What the bound of the ratios costs and buys, in a random world of five states, far off policy.

Targets with a bound of 1 scatter far less than those without; their mean is nearer to the value of
the policy that learns than what happens under the one that acts. With a lag, CartPole is learned
with the correction, and without it the policy collapses.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from cabochon.losses.vtrace import vtrace

STATES, ACTIONS, GAMMA, LENGTH, ROWS = 5, 4, 0.9, 20, 40_000


class World:
    """Moves, rewards, who acts and who learns; all exact."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.moves = draw.dirichlet(np.ones(STATES), (STATES, ACTIONS))
        self.reward = draw.normal(size=(STATES, ACTIONS))
        self.mu = draw.dirichlet(0.5 * np.ones(ACTIONS), STATES) * 0.9 + 0.1 / ACTIONS
        self.pi = draw.dirichlet(0.5 * np.ones(ACTIONS), STATES) * 0.9 + 0.1 / ACTIONS

    def value(self, policy: np.ndarray) -> np.ndarray:
        moves = np.einsum("sa,saz->sz", policy, self.moves)
        return np.linalg.solve(np.eye(STATES) - GAMMA * moves, (policy * self.reward).sum(1))

    def targets(self, value: np.ndarray, rho_bar: float, seed: int) -> np.ndarray:
        """ROWS targets of state 0, of unrolls that begin there and are drawn from mu."""
        draw = np.random.default_rng(seed)
        state = np.zeros(ROWS, np.int64)
        states, actions, rewards = [state], [], []
        for _ in range(LENGTH):
            action = _drawn(self.mu[state], draw)
            rewards.append(self.reward[state, action])
            state = _drawn(self.moves[state, action], draw)
            states.append(state)
            actions.append(action)
        s, a = np.stack(states), np.stack(actions)
        ratios = np.log(self.pi[s[:-1], a] / self.mu[s[:-1], a])
        found = vtrace(
            torch.tensor(ratios),
            torch.tensor(np.stack(rewards)),
            torch.full((LENGTH, ROWS), GAMMA),
            torch.tensor(value[s[:-1]]),
            torch.tensor(value[s[-1]]),
            rho_bar=rho_bar,
            c_bar=1.0 if math.isfinite(rho_bar) else math.inf,
        )
        return found.targets[0].numpy()


def _drawn(chances: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return (chances.cumsum(1) < draw.random((len(chances), 1))).sum(1).clip(0, chances.shape[1] - 1)


@pytest.mark.claim
def test_bounded_ratios_scatter_less_and_lean_towards_the_policy_that_learns() -> None:
    for seed in range(3):
        world = World(seed)
        bounded = np.minimum(world.mu, world.pi)
        bounded /= bounded.sum(1, keepdims=True)
        start = world.value(bounded)  # the fixed point: the bounded targets' mean stays there
        near = world.targets(start, 1.0, seed)
        free = world.targets(start, math.inf, seed)
        assert abs(near.mean() - start[0]) < 4 * near.std() / ROWS**0.5
        assert free.std() > 3 * near.std()
        middle = np.abs(start - world.value(world.pi)).max()
        assert middle < np.abs(world.value(world.mu) - world.value(world.pi)).max()


@pytest.mark.claim
def test_with_a_lag_of_ten_cartpole_is_learned_with_the_correction_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from vtrace_lag import returns

    assert any(mean >= 475.0 for mean in returns("vtrace", 0, lag=10))
    *_, last = islice(returns("none", 0, lag=10), 300)
    assert last < 50.0
