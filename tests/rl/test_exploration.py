"""The ladder of rates, and actions that depart from the best at those rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.rl.exploration import epsilon_greedy, epsilons


def test_the_ladder_goes_from_the_base_to_its_eighth_power() -> None:
    rates = epsilons(8)
    np.testing.assert_allclose(rates, [0.4**i for i in range(1, 9)])
    assert epsilons(1).tolist() == [0.4]
    assert (np.diff(epsilons(100)) < 0).all()
    for wrong in ({"environments": 0}, {"environments": 2, "base": 1.5}):
        with pytest.raises(ConfigError, match="ladder"):
            epsilons(**wrong)  # type: ignore[arg-type]


def test_each_environment_departs_at_its_own_rate_to_all_actions_alike() -> None:
    rates = np.array([0.0, 0.3, 1.0])
    choose = epsilon_greedy(rates)
    draws = 30_000
    environments = np.arange(draws) % 3
    q = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(draws, 4)
    actions = choose({"q": q}, environments, Key(0).numpy().random((draws, 2)))
    for environment, rate in enumerate(rates):
        found = np.bincount(actions[environments == environment], minlength=4) / (draws / 3)
        wanted = np.full(4, rate / 4)
        wanted[1] += 1 - rate
        np.testing.assert_allclose(found, wanted, atol=0.015)


def test_more_environments_than_rates_begin_the_ladder_again() -> None:
    choose = epsilon_greedy(np.array([0.0, 1.0]))
    q, uniform = torch.tensor([[2.0, 0.0, 1.0]]).expand(5, 3), np.full((5, 2), 0.99)
    assert choose({"q": q}, np.arange(5), uniform).tolist() == [0, 2, 0, 2, 0]
