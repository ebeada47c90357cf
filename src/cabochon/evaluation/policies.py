"""What a policy writes, judged: reward, distance from where it began, entropy, length.

    judged = judge(policy, start, prompts, reward, Settings(max_new_tokens=64), Key(0), samples=4)
    judged.point("after BOND")                 # (KL, reward), for a front

All of it is measured on fresh samples of the policy itself, drawn with a key of their own, so that
policies are compared on the same prompts and the same random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cabochon.core import Backbone, Group, Key, Policy, RewardFn
from cabochon.core.errors import ConfigError, NonFinite
from cabochon.evaluation.intervals import Interval, mean_interval
from cabochon.evaluation.pareto import Point
from cabochon.generation.engine import Settings, generate
from cabochon.generation.score import score
from cabochon.rewards.scores import scores

__all__ = ["Judged", "Mean", "judge", "mean_of"]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over prompts with its 95% interval."""

    value: float
    interval: Interval | None
    """None with a single prompt."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """P prompts with G samples of a policy each."""

    groups: tuple[Group, ...]
    reward: Tensor
    """P G float32."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """P G each: what the reward is made of, where it has parts."""
    log_ratio: Tensor
    """P G float32, nats: log policy - log reference of a whole sample (a sum, never a mean per
    token); its mean is an unbiased estimate of KL(policy || reference)."""
    surprisal: Tensor
    """P G float32, nats: -log policy of a whole sample; its mean is the policy's entropy."""
    length: Tensor
    """P G float32: tokens of a sample, its stop token included."""
    stopped: Tensor
    """P G float32: 1 where a stop token ended it, 0 where the limit did."""

    @property
    def entropy_per_token(self) -> float:
        """Nats: how open the next token is on average along the policy's own samples."""
        return (self.surprisal.double().sum() / self.length.double().sum()).item()

    @property
    def distinct(self) -> float:
        """How many different completions there are, over all prompts, as a share of all."""
        texts = [tuple(each.tokens.tolist()) for group in self.groups for each in group.completions]
        return len(set(texts)) / len(texts)

    def point(self, label: str = "") -> Point:
        """For a front."""
        kl, reward = self.log_ratio.double().mean(), self.reward.double().mean()
        return Point(kl=kl.item(), reward=reward.item(), label=label)


def judge(
    policy: Backbone,
    reference: Policy,
    prompts: Sequence[Tensor],
    reward: RewardFn,
    settings: Settings,
    key: Key,
    *,
    samples: int = 1,
) -> Judged:
    """`samples` completions of each prompt by the policy, under the reward and the reference.

    Args:
        policy: who writes.
        reference: where it began; reads what the policy wrote under the same settings.
        prompts: T int64 each, on the policy's device.
        reward: of whole groups.
        settings: how is drawn; both models are taken as they are under it (temperature, cuts).
        key: of the draws; the same for all policies that are compared.
        samples: G.

    Raises:
        ConfigError: greedy decoding, under which a policy has no divergence.
        DataError: a prompt cannot be continued; or the reward failed.
        NonFinite: a reward is no number; or under a cut the policy wrote what the reference
            never would, and the divergence is infinite.
    """
    temperature, top_k, top_p = settings.distribution
    if temperature == 0.0:
        raise ConfigError("a policy that decodes greedily has no divergence; temperature above 0")
    groups = tuple(generate(policy, prompts, settings, key, samples))
    worth = scores(reward, groups)
    read = score(reference, groups, temperature=temperature, top_k=top_k, top_p=top_p)
    own = _table([[each.logprob.sum() for each in group.completions] for group in groups])
    other = _table([[each.sum() for each in row] for row in read])
    if not other.isfinite().all():
        raise NonFinite(
            "the policy wrote what the reference cannot under the same top_k and top_p, so its "
            "divergence is infinite; measure without cuts (top_k 0, top_p 1)"
        )
    counts = [[len(each.tokens) for each in group.completions] for group in groups]
    stopped = [[each.stopped for each in group.completions] for group in groups]
    return Judged(
        groups=groups,
        reward=worth.total.cpu(),
        parts={name: part.cpu() for name, part in worth.parts.items()},
        log_ratio=own - other,
        surprisal=-own,
        length=torch.tensor(counts, dtype=torch.float32),
        stopped=torch.tensor(stopped, dtype=torch.float32),
    )


def mean_of(values: Tensor) -> Mean:
    """The mean of P G (or P) values with its interval over prompts: samples of one belong together.

    Args:
        values: P G, or P.
    """
    by_prompt = values.double().reshape(len(values), -1).mean(1).tolist()
    return Mean(value=sum(by_prompt) / len(by_prompt), interval=mean_interval(by_prompt))


def _table(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows]).float().cpu()
