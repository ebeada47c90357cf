"""Which of two policies is preferred, and when a proxy's gain is no longer one.

A win rate compares two policies on the same prompts under one judge; a tie is half a win. An
over-optimisation curve follows one run under two judges, the proxy that it was trained on and a
gold reward that it never saw: where the proxy rises and gold falls, the run learns the proxy's
faults.

Source: Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760 (gold
against KL, and the law of its figure 1); Clopper and Pearson 1934 (exact intervals of proportions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.evaluation.intervals import Interval, mean_interval

__all__ = [
    "OverOptimisation",
    "Preference",
    "gold_law",
    "over_optimisation",
    "preferred",
    "proportion_interval",
    "win_rates",
]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """How often the first of two policies was preferred, prompt by prompt."""

    prompts: int
    rate: float
    """Mean over prompts: 1 for a win of the first, 0.5 for a tie, 0 for a loss."""
    interval: Interval | None
    """Of `rate`, 95%, over prompts; None with a single prompt."""
    wins: int
    """Prompts on which the first is better in more than half of the comparisons."""
    ties: int
    losses: int
    decided_rate: float | None
    """Wins among prompts that are no tie; None where all are."""
    decided_interval: Interval | None
    """Of `decided_rate`, 95%, exact."""

    @property
    def decided(self) -> bool:
        """True if the exact interval leaves out one half: the sign test at 5%."""
        if self.decided_interval is None:
            return False
        low, high = self.decided_interval
        return not low <= 0.5 <= high


def preferred(first: Tensor, second: Tensor, *, margin: float = 0.0) -> Preference:
    """How often the first policy's samples are better than the second's, for the same prompts.

    Every sample of the one is compared with every sample of the other, and a prompt counts once,
    however many samples it has: samples of one prompt are not independent.

    Args:
        first: P G: the judge's scores, or P for one sample each.
        second: P H, or P.
        margin: scores that differ by no more than it are a tie; in the judge's unit.

    Raises:
        DataError: no prompts, or another number of them.
        NonFinite: a score that is no number.
        ConfigError: a margin below 0.
    """
    if not 0.0 <= margin < math.inf:
        raise ConfigError(f"margin must be finite and at least 0, got {margin}")
    ours, theirs = (_scores(each) for each in (first, second))
    if len(ours) != len(theirs):
        raise DataError(
            f"the policies were judged on {len(ours)} and {len(theirs)} prompts; score both on the "
            "same ones, in the same order"
        )
    difference = ours.unsqueeze(2) - theirs.unsqueeze(1)  # P G H
    outcome = (difference > margin).double() + 0.5 * (difference.abs() <= margin).double()
    rates = outcome.flatten(1).mean(1)
    wins, losses = int((rates > 0.5).sum()), int((rates < 0.5).sum())
    count = wins + losses
    return Preference(
        prompts=len(rates),
        rate=rates.mean().item(),
        interval=mean_interval(rates.tolist()),
        wins=wins,
        ties=len(rates) - count,
        losses=losses,
        decided_rate=wins / count if count else None,
        decided_interval=proportion_interval(wins, count) if count else None,
    )


def win_rates(scores: Sequence[Tensor], *, margin: float = 0.0) -> Tensor:
    """M M float64: how often policy i is preferred to policy j; one half on the diagonal.

    Args:
        scores: P G_m for each policy, on the same prompts.
        margin: as `preferred`.
    """
    table = torch.full((len(scores), len(scores)), 0.5, dtype=torch.float64)
    for i, ours in enumerate(scores):
        for j, theirs in enumerate(scores[:i]):
            table[i, j] = preferred(ours, theirs, margin=margin).rate
            table[j, i] = 1.0 - table[i, j]
    return table


def proportion_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """The exact interval of Clopper and Pearson for a proportion.

    Its ends are the proportions under which so many successes or more, or so many or fewer, have
    probability (1 - level) / 2; it covers the truth at least as often as it says.

    Raises:
        ConfigError: no trials, successes outside of 0 to `trials`, or a level outside of (0, 1).
    """
    if not (trials >= 1 and 0 <= successes <= trials and 0.0 < level < 1.0):
        raise ConfigError(
            "an interval needs trials of at least 1, successes from 0 to trials and a level in "
            f"(0, 1), got {trials}, {successes} and {level}"
        )
    tail = (1.0 - level) / 2.0
    low = _proportion(successes, trials, tail) if successes else 0.0
    failures = trials - successes
    high = 1.0 - _proportion(failures, trials, tail) if failures else 1.0
    return low, high


@dataclass(frozen=True, kw_only=True)
class OverOptimisation:
    """A run under the reward that it was trained on and one that it never saw."""

    kl: tuple[float, ...]
    """Of each point, in nats, as given."""
    proxy: tuple[float, ...]
    gold: tuple[float, ...]
    peak: int
    """The point at which gold is highest."""
    fall: float
    """Gold of the last point minus gold at the peak; 0 where the last is the peak."""
    fall_interval: Interval | None
    """95%, paired over prompts. The peak was chosen on the same prompts, so a fall looks larger
    than it is; judge a small one on others."""
    proxy_rise: float
    """Proxy of the last point minus proxy at the peak."""

    @property
    def over_optimised(self) -> bool:
        """True if gold has fallen, beyond its interval, while the proxy rose."""
        return (
            self.proxy_rise > 0 and self.fall_interval is not None and self.fall_interval[1] < 0.0
        )


def over_optimisation(
    kl: Sequence[float], proxy: Sequence[Tensor], gold: Sequence[Tensor]
) -> OverOptimisation:
    """The curves of a run, and whether it went too far.

    Args:
        kl: of each point from the start, in nats, in the order of training.
        proxy: P (or P G) scores of each point's samples under the reward that was trained on.
        gold: the same samples under the other reward.

    Raises:
        DataError: no points, or not as many of each, or other prompts.
        NonFinite: a score that is no number.
    """
    if not len(kl) == len(proxy) == len(gold) > 0:
        raise DataError(
            f"a curve needs as many divergences as scores, got {len(kl)}, {len(proxy)} proxy and "
            f"{len(gold)} gold"
        )
    proxies, golds = ([_scores(each).mean(1) for each in scores] for scores in (proxy, gold))
    if len({len(each) for each in (*proxies, *golds)}) != 1:
        raise DataError("the points of a curve must be judged on the same prompts")
    means = [each.mean().item() for each in golds]
    peak = max(range(len(means)), key=means.__getitem__)
    fall = golds[-1] - golds[peak]
    return OverOptimisation(
        kl=tuple(kl),
        proxy=tuple(each.mean().item() for each in proxies),
        gold=tuple(means),
        peak=peak,
        fall=fall.mean().item(),
        fall_interval=mean_interval(fall.tolist()),
        proxy_rise=(proxies[-1] - proxies[peak]).mean().item(),
    )


def gold_law(kl: Sequence[float], gain: Sequence[float]) -> tuple[float, float]:
    """(a, b) of gain = d (a - b log d), d = sqrt(KL), by least squares: Gao's law for RL.

    Where b > 0 it has its highest value at d = exp(a / b - 1).

    Args:
        kl: above 0, in nats; at least two different ones.
        gain: gold reward minus that of the start, at each.

    Raises:
        DataError: fewer than two points that can be used.
    """
    d = np.sqrt(np.asarray(kl, dtype=np.float64))
    if len(d) != len(gain) or len(set(d.tolist())) < 2 or not np.all(d > 0):
        raise DataError(
            f"the law needs at least two different KL above 0 with a gain each, got {list(kl)}"
        )
    terms = np.stack([d, -d * np.log(d)], axis=1)
    a, b = np.linalg.lstsq(terms, np.asarray(gain, dtype=np.float64))[0].tolist()
    return a, b


def _scores(scores: Tensor) -> Tensor:
    """P G float64."""
    table = scores.detach().cpu().double()
    table = table.unsqueeze(1) if table.dim() == 1 else table
    if table.dim() != 2 or table.numel() == 0:
        raise DataError(f"scores must be P or P G with at least one, got {tuple(scores.shape)}")
    if not table.isfinite().all():
        prompt, sample = (~table.isfinite()).nonzero()[0].tolist()
        raise NonFinite(f"the score of prompt {prompt}, sample {sample} is no number")
    return table


def _proportion(successes: int, trials: int, tail: float) -> float:
    """Under which proportion `successes` or more of `trials` have probability `tail`: bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if _at_least(successes, trials, middle) < tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def _at_least(successes: int, trials: int, p: float) -> float:
    """The binomial tail P(X >= successes)."""
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(p)
        + (trials - k) * math.log1p(-p)
        for k in range(successes, trials + 1)
    )
    return math.fsum(map(math.exp, logs))
