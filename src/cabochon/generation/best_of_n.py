"""Best-of-N: draw N completions, keep the one with the highest reward; and the exact law of that.

    best = best_of_n(sampler(model, settings, samples=16), reward)(prompts, Key(0))

On a finite space the law of the kept one is known in closed form. With p_<(y) and p_<=(y) the
probabilities that a draw y' of the reference has a reward below, or at most, that of y
(Sessa et al. 2025, BOND, arXiv:2407.14622, theorem 1):

    pi_N(y) = pi(y) p_<=(y)^(N-1) sum_{i=1}^{N} (p_<(y) / p_<=(y))^(i-1)

which is pi(y) / (p_<= - p_<) * (p_<=^N - p_<^N): the highest level reached is y's with probability
p_<=^N - p_<^N, and within a level the reference decides. Keeping the first of equals, as here, is
the same law as choosing among equals at random, since the draws are exchangeable.

The functions on finite spaces take log-probabilities (... K) and rewards (... K), compute in
float64, and depend on the order of the rewards alone. N may be any real number from 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key, RewardFn, Sampler
from cabochon.core.errors import ConfigError, DataError, NonFinite

__all__ = [
    "Best",
    "best_of_n",
    "best_of_n_logprob",
    "divergence",
    "divergence_bound",
    "expected_quantile",
    "implied_reward",
    "log_quantiles",
]

UNNORMALISED = 1e-3
"""Nats by which the probabilities of a finite space may miss a sum of 1: float32's rounding."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The kept one of N completions of a prompt, and the others."""

    group: Group
    """The prompt and all N."""
    index: int
    """Which was kept: the first with the highest reward."""
    rewards: Tensor
    """N float32."""

    @property
    def completion(self) -> Completion:
        """The one that was kept."""
        return self.group.completions[self.index]

    @property
    def reward(self) -> float:
        """Of the one that was kept."""
        return float(self.rewards[self.index])

    @property
    def logprob_bound(self) -> float:
        """Nats: at most this is the log-probability of the kept one under best-of-N.

        log pi_N(y) <= log pi(y) + log N, with pi what the completions were drawn from (so it says
        nothing of greedy ones); equality where y has the highest reward and is improbable.
        """
        return float(self.completion.logprob.double().sum()) + math.log(len(self.rewards))


def best_of_n(sample: Sampler, reward: RewardFn) -> Callable[[Sequence[Tensor], Key], list[Best]]:
    """Keeps the best completion of each group that `sample` draws; N is its number of samples.

    The completions of a group must be independent draws, as those of every sampler here are.

    Returns:
        A function of prompts and key, which raises
        DataError where the rewards have another shape than P G, or groups differ in size, and
        NonFinite where a reward is NaN; names prompt and sample.
    """

    def choose(prompts: Sequence[Tensor], key: Key) -> list[Best]:
        groups = sample(prompts, key)
        if not groups:
            return []
        rewards = _checked(reward(groups), groups)
        kept = rewards.double().argmax(dim=1).tolist()  # the first of equals
        return [
            Best(group=group, index=index, rewards=row.float())
            for group, index, row in zip(groups, kept, rewards, strict=True)
        ]

    return choose


def log_quantiles(logprob: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """log p_< and log p_<= of every outcome, in nats; -inf where nothing is below.

    Args:
        logprob: ... K, of the reference; -inf for outcomes it never gives.
        reward: ... K; only its order counts.

    Returns:
        Twice ... K, float64.

    Raises:
        DataError: shapes differ, or the probabilities do not sum to 1.
        NonFinite: a NaN.
    """
    levels = _levels(logprob, reward)
    return levels.below, levels.at_most


def best_of_n_logprob(logprob: Tensor, reward: Tensor, n: float) -> Tensor:
    """log pi_N(y) of every outcome, in nats: theorem 1 of BOND, ties included.

    Args:
        logprob: ... K, of the reference.
        reward: ... K; only its order counts.
        n: how many draws the best is taken of; 1 gives the reference back.

    Returns:
        ... K, float64.

    Raises:
        ConfigError: `n` below 1.
        DataError: shapes differ, or the probabilities do not sum to 1.
        NonFinite: a NaN.
    """
    _check_n(n)
    levels = _levels(logprob, reward)
    law = logprob.double() + (n - 1) * levels.at_most + _log_repeats(levels.log_ratio, n)
    return law.masked_fill(logprob == -torch.inf, -torch.inf)


def implied_reward(logprob: Tensor, reward: Tensor, n: float) -> Tensor:
    """The reward r whose KL-regularised optimum is best-of-N, with KL strength 1 / (N - 1).

    r(y) = log p_<=(y) + log(B(y)) / (N - 1), with B the sum in theorem 1, between 1 and N: then
    pi_N is pi exp((N - 1) r), which needs no normaliser (BOND, section 3.2).

    Args:
        logprob: ... K, of the reference.
        reward: ... K; only its order counts.
        n: above 1.

    Returns:
        ... K, float64; -inf for what the reference never gives.
    """
    if not n > 1:
        raise ConfigError(f"best of {n} implies no reward; n must be above 1")
    _check_n(n)
    levels = _levels(logprob, reward)
    implied = levels.at_most + _log_repeats(levels.log_ratio, n) / (n - 1)
    return implied.masked_fill(logprob == -torch.inf, -torch.inf)


def divergence(logprob: Tensor, reward: Tensor, n: float) -> Tensor:
    """KL(pi_N || pi) in nats, exact: ... float64."""
    law = best_of_n_logprob(logprob, reward, n)
    gain = (law - logprob.double()).masked_fill(law == -torch.inf, 0.0)
    return (law.exp() * gain).sum(-1)


def divergence_bound(n: float) -> float:
    """log N - (N - 1) / N, in nats: KL(pi_N || pi) is at most this, and nears it without atoms."""
    _check_n(n)
    return math.log(n) - (n - 1) / n


def expected_quantile(logprob: Tensor, reward: Tensor, n: float) -> Tensor:
    """The mean of p_<= under pi_N: ... float64; at least N / (N + 1), its value without atoms."""
    law = best_of_n_logprob(logprob, reward, n)
    _, at_most = log_quantiles(logprob, reward)
    return (law + at_most).exp().sum(-1)


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """Of every outcome, ... K float64 nats."""

    below: Tensor
    at_most: Tensor
    log_ratio: Tensor
    """log(p_< / p_<=), right also where the level is all but nothing beside what is below it."""


def _levels(logprob: Tensor, reward: Tensor) -> _Levels:
    _check_space(logprob, reward)
    logprob, reward = logprob.double(), reward.double().contiguous()
    ordered, order = reward.sort(dim=-1)
    cumulative = logprob.gather(-1, order).logcumsumexp(dim=-1)
    cumulative = cumulative - cumulative[..., -1:]  # a large N multiplies the last rounding
    first = torch.searchsorted(ordered, reward)  # the level's first place in the order
    last = torch.searchsorted(ordered, reward, right=True) - 1
    at_most = cumulative.gather(-1, last)
    below = cumulative.gather(-1, (first - 1).clamp(min=0)).masked_fill(first == 0, -torch.inf)
    # The mass of the level itself, not the difference of two cumulative sums, which may cancel.
    highest = torch.full_like(logprob, -torch.inf).scatter_reduce(-1, first, logprob, "amax")
    shift = highest.gather(-1, first).clamp(min=torch.finfo(torch.float64).min)
    scaled = torch.zeros_like(logprob).scatter_add(-1, first, (logprob - shift).exp())
    mass = scaled.gather(-1, first).log() + shift
    share = (mass - at_most).exp()  # of the level in p_<=
    log_ratio = torch.where(share < 0.5, torch.log1p(-share), below - at_most)
    return _Levels(below=below, at_most=at_most, log_ratio=log_ratio)


def _log_repeats(log_ratio: Tensor, n: float) -> Tensor:
    """log of 1 + x + ... + x^(n-1), with x = exp(log_ratio) in [0, 1]: from 0 to log n."""
    still = log_ratio > -1e-300  # the level is nothing beside what lies below: the limit, n
    ratio = log_ratio.masked_fill(still, -1.0)
    summed = (-torch.expm1(n * ratio)).log() - (-torch.expm1(ratio)).log()
    return summed.masked_fill(still, math.log(n))


def _check_n(n: float) -> None:
    if not 1 <= n < math.inf:
        raise ConfigError(f"best of {n} draws is nothing; n must be finite and at least 1")


def _check_space(logprob: Tensor, reward: Tensor) -> None:
    if logprob.shape != reward.shape or logprob.ndim == 0:
        raise DataError(
            f"log-probabilities have shape {tuple(logprob.shape)}, rewards {tuple(reward.shape)}; "
            "give both for each of K outcomes, ... K"
        )
    if bool(logprob.isnan().any() | reward.isnan().any()):
        raise NonFinite("a log-probability or a reward is NaN; every outcome needs a number")
    total = logprob.double().logsumexp(dim=-1)
    if bool((total.abs() > UNNORMALISED).any()):
        raise DataError(
            f"the probabilities sum to {total.exp().flatten().tolist()[:4]}; give all outcomes of "
            "the space, normalised (log_softmax)"
        )


def _checked(rewards: Tensor, groups: Sequence[Group]) -> Tensor:
    sizes = sorted({len(group.completions) for group in groups})
    if len(sizes) > 1:
        raise DataError(f"groups have {sizes} completions; best-of-N needs the same N for all")
    expected = (len(groups), sizes[0])
    if tuple(rewards.shape) != expected:
        raise DataError(
            f"the rewards have shape {tuple(rewards.shape)}, expected {expected}: one for each "
            "prompt and sample"
        )
    broken = rewards.isnan().nonzero().tolist()
    if broken:
        prompt, sample = broken[0]
        raise NonFinite(
            f"the reward of prompt {prompt}, sample {sample} is NaN ({len(broken)} in all); "
            "a reward must order the completions"
        )
    return rewards
