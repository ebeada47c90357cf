"""Best-of-N: its closed form against enumeration and against draws, and what must be refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_gemma import random_prompts, small_gemma
from torch import Tensor

from cabochon.core import Completion, Group, Key
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.best_of_n import (
    best_of_n,
    best_of_n_logprob,
    divergence,
    divergence_bound,
    expected_quantile,
    implied_reward,
    log_quantiles,
)
from cabochon.generation.engine import Settings, sampler

DISTINCT = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0, 4.0])
TIED = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0, 1.0])


def space(size: int, seed: int = 0) -> Tensor:
    logits = torch.randn(size, generator=Key(seed).generator(), dtype=torch.float64)
    return logits.log_softmax(-1)


def enumerated(logprob: Tensor, reward: Tensor, n: int) -> Tensor:
    """Every sequence of n draws; the first with the highest reward is kept."""
    prob, worth, law = logprob.exp().tolist(), reward.tolist(), [0.0] * len(logprob)
    for draws in itertools.product(range(len(law)), repeat=n):
        law[max(draws, key=worth.__getitem__)] += math.prod(prob[y] for y in draws)
    return torch.tensor(law, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("reward", [DISTINCT, TIED, torch.zeros(6)])
def test_the_closed_form_is_what_enumeration_gives(reward: Tensor, n: int) -> None:
    reference = space(6)
    law = best_of_n_logprob(reference, reward, n).exp()
    torch.testing.assert_close(law, enumerated(reference, reward, n), atol=1e-14, rtol=0)


def test_best_of_one_and_equal_rewards_change_nothing() -> None:
    reference = space(9)
    for reward, n in ((torch.arange(9.0), 1), (torch.ones(9), 7)):
        torch.testing.assert_close(best_of_n_logprob(reference, reward, n), reference)


def test_the_best_of_the_best_is_the_best_of_the_product() -> None:
    reference = space(6)
    twice = best_of_n_logprob(best_of_n_logprob(reference, TIED, 2), TIED, 3)
    torch.testing.assert_close(twice, best_of_n_logprob(reference, TIED, 6))


def test_only_the_order_of_the_rewards_counts() -> None:
    reference, batch = space(6), torch.stack([DISTINCT, DISTINCT.exp() * 3 + 7])
    laws = best_of_n_logprob(reference.expand(2, -1), batch, 4)
    assert torch.equal(laws[0], laws[1])


def test_with_ever_more_draws_only_the_highest_level_remains_in_its_own_proportions() -> None:
    reference = space(6).clone()
    best = torch.tensor([True, False, False, True, False, False])
    law = best_of_n_logprob(reference, best.float(), 1e12).exp()
    expected = reference.exp() * best / (reference.exp() * best).sum()
    torch.testing.assert_close(law, expected)


def test_a_rare_best_outcome_gains_the_factor_n_and_keeps_its_digits() -> None:
    rare = 1e-20
    reference = torch.tensor([math.log1p(-rare), math.log(rare)], dtype=torch.float64)
    law = best_of_n_logprob(reference, torch.tensor([0.0, 1.0]), 1000)
    assert float(law[1]) == pytest.approx(math.log(rare) + math.log(1000), abs=1e-12)


def test_outcomes_that_never_come_stay_impossible_and_harm_nobody() -> None:
    some = space(4)
    reference = torch.cat([torch.tensor([-torch.inf]).double(), some, torch.tensor([-torch.inf])])
    reward = torch.tensor([-5.0, 0.0, 1.0, 1.0, 2.0, 9.0])
    law = best_of_n_logprob(reference, reward, 3)
    assert law[[0, 5]].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(law[1:5], best_of_n_logprob(some, reward[1:5], 3))
    assert float(divergence(reference, reward, 3)) == pytest.approx(
        float(divergence(some, reward[1:5], 3))
    )


@pytest.mark.parametrize("n", [1, 2, 4, 16, 1000])
def test_the_divergence_is_within_its_bound_which_many_equal_outcomes_reach(n: int) -> None:
    reference = space(6)
    for reward in (DISTINCT, TIED):
        exact = enumerated(reference, reward, n) if n <= 4 else None
        found = divergence(reference, reward, n)
        assert -1e-12 <= float(found) <= divergence_bound(n) + 1e-12
        if exact is not None:
            kl = (exact * (exact.log() - reference)).sum()
            torch.testing.assert_close(found, kl, atol=1e-12, rtol=0)
    fine = torch.full((200_000,), -math.log(200_000), dtype=torch.float64)
    ranks = torch.arange(200_000)
    assert float(divergence(fine, ranks, n)) == pytest.approx(divergence_bound(n), abs=0.01)
    assert float(expected_quantile(fine, ranks, n)) == pytest.approx(n / (n + 1), abs=1e-4)
    assert float(expected_quantile(reference, TIED, n)) >= n / (n + 1)


def test_quantiles_by_hand() -> None:
    reference = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    below, at_most = log_quantiles(reference, torch.tensor([1.0, 0.0, 1.0, 3.0]))
    torch.testing.assert_close(below.exp().float(), torch.tensor([0.25, 0.0, 0.25, 0.875]))
    torch.testing.assert_close(at_most.exp().float(), torch.tensor([0.875, 0.25, 0.875, 1.0]))


@pytest.mark.parametrize("n", [2, 4, 9])
def test_the_implied_reward_has_best_of_n_as_its_regularised_optimum(n: int) -> None:
    reference = space(6)
    optimum = reference + (n - 1) * implied_reward(reference, TIED, n)
    torch.testing.assert_close(optimum, best_of_n_logprob(reference, TIED, n))


def single_token_groups(logprob: Tensor, samples: int):
    """A sampler of one-token completions from a given law."""

    def sample(prompts, key: Key, /) -> list[Group]:
        groups = []
        for index, prompt in enumerate(prompts):
            generator = key.fold(index).generator()
            drawn = logprob.exp().multinomial(samples, replacement=True, generator=generator)
            completions = tuple(
                Completion(
                    tokens=token[None],
                    logprob=logprob[token][None].float(),
                    model_logprob=logprob[token][None].float(),
                    stopped=True,
                )
                for token in drawn
            )
            groups.append(Group(prompt=prompt, completions=completions))
        return groups

    return sample


def tokens_as_reward(reward: Tensor):
    def score(groups) -> Tensor:
        tokens = [[int(c.tokens[0]) for c in group.completions] for group in groups]
        return reward[torch.tensor(tokens)]

    return score


@pytest.mark.parametrize("reward", [DISTINCT, TIED])
def test_what_is_kept_follows_the_law(reward: Tensor) -> None:
    """Chi-square with 5 degrees of freedom: 20.5 is its 99.9th percentile."""
    reference, n, count = space(6), 3, 5000
    prompts = [torch.zeros(1, dtype=torch.int64)] * count
    choose = best_of_n(single_token_groups(reference, n), tokens_as_reward(reward))
    kept = torch.tensor([int(b.completion.tokens[0]) for b in choose(prompts, Key(5))])
    seen = torch.bincount(kept, minlength=6)
    expected = best_of_n_logprob(reference, reward, n).exp() * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 20.5


def test_the_first_of_equals_is_kept_and_the_bound_holds() -> None:
    reference = space(6)
    sample = single_token_groups(reference, 8)
    (best,) = best_of_n(sample, tokens_as_reward(TIED))([torch.zeros(1)], Key(2))
    rewards = best.rewards.tolist()
    assert best.index == rewards.index(max(rewards))
    assert best.reward == max(rewards)
    exact = best_of_n_logprob(reference, TIED, 8)[best.completion.tokens[0]]
    assert float(exact) <= best.logprob_bound + 1e-6


def test_the_engine_is_a_sampler_for_it() -> None:
    draw = sampler(small_gemma(), Settings(max_new_tokens=4), 3)
    prompts = random_prompts(3, 5)

    def reward(groups) -> Tensor:
        return torch.tensor([[float(c.tokens.sum()) for c in g.completions] for g in groups])

    found = best_of_n(draw, reward)(prompts, Key(1))
    for best, group in zip(found, draw(prompts, Key(1)), strict=True):
        sums = [int(c.tokens.sum()) for c in group.completions]
        assert int(best.completion.tokens.sum()) == max(sums)
        assert best.logprob_bound == pytest.approx(
            float(group.completions[best.index].logprob.sum()) + math.log(3)
        )


def test_rewards_that_do_not_order_are_refused() -> None:
    sample = single_token_groups(space(6), 2)
    prompts = [torch.zeros(1), torch.zeros(1)]
    with pytest.raises(DataError, match=r"\(2,\), expected \(2, 2\)"):
        best_of_n(sample, lambda groups: torch.zeros(2))(prompts, Key(0))
    with pytest.raises(NonFinite, match="prompt 1, sample 0"):
        best_of_n(sample, lambda groups: torch.tensor([[1, 2], [torch.nan, 0]]))(prompts, Key(0))
    assert best_of_n(sample, lambda groups: torch.zeros(0, 0))([], Key(0)) == []


def test_spaces_and_counts_that_have_no_law_are_refused() -> None:
    reference = space(6)
    with pytest.raises(ConfigError, match="at least 1"):
        best_of_n_logprob(reference, DISTINCT, 0.5)
    with pytest.raises(ConfigError, match="at least 1"):
        divergence_bound(math.inf)
    with pytest.raises(ConfigError, match="above 1"):
        implied_reward(reference, DISTINCT, 1)
    with pytest.raises(DataError, match="sum to"):
        best_of_n_logprob(reference - 1, DISTINCT, 2)
    with pytest.raises(DataError, match="shape"):
        best_of_n_logprob(reference, DISTINCT[:5], 2)
    with pytest.raises(NonFinite):
        best_of_n_logprob(reference, DISTINCT.masked_fill(DISTINCT > 4, torch.nan), 2)


def test_rewards_finer_than_float32_are_told_apart() -> None:
    settings = Settings(max_new_tokens=2)
    rewards = torch.tensor([[2**24, 2**24 + 1]])
    choose = best_of_n(sampler(small_gemma(), settings, 2), lambda _: rewards)
    (best,) = choose([torch.tensor([4, 5])], Key(0))
    assert best.index == 1
    assert best.rewards.dtype == torch.float32
