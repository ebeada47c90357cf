"""Win rates and over-optimisation against counts by hand and published tables."""

from __future__ import annotations

import math

import pytest
import torch

from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.evaluation.preference import (
    gold_law,
    over_optimisation,
    preferred,
    proportion_interval,
    win_rates,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.3085), (8, 10, 0.4439, 0.9748), (10, 10, 0.6915, 1.0), (1, 2, 0.0126, 0.9874),
     (50, 100, 0.3983, 0.6017)],
)  # fmt: skip
def test_the_exact_interval_is_that_of_the_tables(
    successes: int, trials: int, low: float, high: float
) -> None:
    found = proportion_interval(successes, trials)
    assert found == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_without_failures_the_lower_end_is_a_power() -> None:
    """All n succeed: p^n = 0.025."""
    for trials in (1, 7, 400):
        assert proportion_interval(trials, trials)[0] == pytest.approx(0.025 ** (1 / trials))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_the_interval_covers_the_truth_at_least_as_often_as_it_says(p: float) -> None:
    """By enumeration of all outcomes of 20 trials."""
    n, covered = 20, 0.0
    for k in range(n + 1):
        low, high = proportion_interval(k, n)
        covered += math.comb(n, k) * p**k * (1 - p) ** (n - k) * (low <= p <= high)
    assert covered >= 0.95


def test_wins_ties_and_losses_are_counted_by_prompt() -> None:
    first = torch.tensor([2.0, 1.0, 0.0, 5.0])
    second = torch.tensor([1.0, 1.0, 3.0, 4.0])
    found = preferred(first, second)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.decided_rate == pytest.approx(2 / 3)
    assert found.decided_interval == proportion_interval(2, 3)
    assert not found.decided
    wide = preferred(first, second, margin=1.0)
    assert (wide.wins, wide.ties, wide.losses) == (0, 3, 1)


def test_every_sample_meets_every_sample_and_a_prompt_counts_once() -> None:
    first = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    found = preferred(first, second)
    # Prompt 0: 3 beats three; 0 loses two and ties one. Prompt 1: all ties.
    assert found.rate == pytest.approx(((3 + 0.5) / 6 + 0.5) / 2)
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)


def test_a_policy_against_itself_is_half_and_the_other_way_round_is_the_rest() -> None:
    one, two = torch.randn(30, 2), torch.randn(30, 3)
    assert preferred(one, one).rate == pytest.approx(0.5)
    assert preferred(one, two).rate == pytest.approx(1 - preferred(two, one).rate)
    table = win_rates([one, two, one + 9.0])
    assert torch.equal(table + table.T, torch.ones(3, 3, dtype=torch.float64))
    assert table[2, 1] == 1.0


def test_many_wins_decide_and_all_ties_do_not() -> None:
    better = preferred(torch.ones(20), torch.zeros(20))
    assert better.decided
    assert better.decided_interval == (pytest.approx(0.8316, abs=1e-4), 1.0)
    same = preferred(torch.ones(20), torch.ones(20))
    assert not same.decided
    assert (same.rate, same.ties, same.decided_rate) == (0.5, 20, None)


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="3 and 2 prompts"):
        preferred(torch.zeros(3), torch.zeros(2))
    with pytest.raises(NonFinite, match="prompt 1, sample 0"):
        preferred(torch.zeros(3), torch.tensor([0.0, math.nan, 0.0]))
    with pytest.raises(DataError, match="at least one"):
        preferred(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ConfigError, match="margin"):
        preferred(torch.zeros(3), torch.zeros(3), margin=-1.0)
    with pytest.raises(ConfigError, match="trials"):
        proportion_interval(3, 2)


def test_a_run_is_over_optimised_when_gold_falls_while_the_proxy_rises() -> None:
    noise = torch.randn(200)
    gold = [noise + level for level in (0.0, 1.0, 1.5, 0.7)]
    proxy = [noise + level for level in (0.0, 1.0, 2.0, 3.0)]
    found = over_optimisation([0.0, 1.0, 4.0, 9.0], proxy, gold)
    assert found.peak == 2
    assert found.fall == pytest.approx(-0.8, abs=1e-6)
    assert found.proxy_rise == pytest.approx(1.0, abs=1e-6)
    assert found.over_optimised
    healthy = over_optimisation([0.0, 1.0, 4.0], proxy[:3], gold[:3])
    assert (healthy.peak, healthy.fall, healthy.over_optimised) == (2, 0.0, False)


def test_a_fall_that_other_prompts_might_not_show_is_none() -> None:
    gold = [torch.randn(10), torch.randn(10) - 0.05]
    found = over_optimisation([0.0, 1.0], [torch.zeros(10), torch.ones(10)], gold)
    assert not found.over_optimised


def test_a_curve_needs_as_much_of_everything() -> None:
    with pytest.raises(DataError, match="2, 1 proxy and 1 gold"):
        over_optimisation([0.0, 1.0], [torch.zeros(3)], [torch.zeros(3)])
    with pytest.raises(DataError, match="same prompts"):
        over_optimisation([0.0], [torch.zeros(3)], [torch.zeros(4)])


def test_the_law_of_gold_is_found_again_with_its_peak() -> None:
    """d (2 - 0.5 log d) is highest at d = e^3: its slope is 2 - 0.5 log d - 0.5."""
    d = torch.linspace(0.5, 30, 20, dtype=torch.float64)
    a, b = gold_law((d**2).tolist(), (d * (2 - 0.5 * d.log())).tolist())
    assert (a, b) == (pytest.approx(2), pytest.approx(0.5))
    assert math.exp(a / b - 1) == pytest.approx(math.exp(3))
    with pytest.raises(DataError, match="two different KL"):
        gold_law([1.0, 1.0], [0.0, 0.0])
