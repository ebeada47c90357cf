"""From experience to what each token answers for: rewards, less a price, less a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cabochon.core import Policy
from cabochon.core.errors import DataError, Diverged
from cabochon.data.continuations import Sequences, written_in
from cabochon.losses.policy_gradient import future_sums, kl_estimates, logprobs
from cabochon.losses.tempering import tempered
from cabochon.rewards.experience import Baseline, Experience, Observe, gains

__all__ = [
    "Completions",
    "Learned",
    "Returns",
    "completions_of",
    "due",
    "kl_report",
    "reused",
]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """An experience as rows to learn from: P prompts with G completions, P G rows."""

    rows: Sequences
    drawn: Tensor
    """B T float32, nats: log-probability of each token when it was drawn, 0 elsewhere."""
    version: Tensor
    """B T int64: updates of the weights that drew each token, 0 elsewhere."""
    shape: tuple[int, int]
    """P, G."""
    report: Mapping[str, Tensor]
    """Sums over the rows: parts of the reward, surprisal, groups that teach nothing."""

    def logprobs(self, model: Policy, temperature: float) -> Tensor:
        """B T float32, nats: of each token under a model that does not learn, 0 elsewhere."""
        with torch.no_grad():
            return logprobs(tempered(model(self.rows.batch), temperature), self.rows.batch)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a micro-batch learns from."""

    completions: Completions
    gain: Tensor
    """B T float32: what each token answers for, 0 outside of the completions."""
    report: Mapping[str, Tensor]
    """Sums over the rows."""
    update: int = 0
    """The update that learns from it."""

    @property
    def lag(self) -> Tensor:
        """Updates between the weights that drew a token and those that learn, over all tokens."""
        mask = self.completions.rows.batch.mask
        return ((self.update - self.completions.version) * mask).sum()


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What is subtracted from rewards, and what the rest is compared with."""

    baseline: Baseline | Literal["value"]
    """As in `experience.gains`; with "value" nothing is subtracted here, and a token answers for
    the prices of itself and of what follows instead of those of the whole completion."""
    price: float
    """In reward, of a nat of log-ratio."""
    limit_reward: float | None
    """Instead of the reward of completions that the length limit cut; None: as judged."""
    most: float
    """Mean log-ratio of a token, in nats, that is too far."""

    def gains(self, completions: Completions, log_ratio: Tensor, where: str) -> Tensor:
        """B T float32: what each token answers for, 0 elsewhere.

        Args:
            completions: with their rewards.
            log_ratio: B T, log of policy over anchor, 0 outside of the completions.
            where: for the message.

        Raises:
            Diverged: the policy is too far from the anchor, or writes what the anchor never would.
        """
        mask, cost = completions.rows.batch.mask, self.price * log_ratio
        distance = float(log_ratio.sum() / mask.sum())
        if not distance <= self.most:
            raise Diverged(
                f"{where}: KL to the anchor is {distance:.1f} nats a token, above max_kl "
                f"{self.most:g}; nothing was learned from that. Raise kl_weight, lower the "
                "learning rate, or look at what the reward likes"
            )
        reward = self._rewards(completions)
        if self.baseline == "value":
            return (reward.unsqueeze(1) - cost - future_sums(cost)) * mask
        above = gains((reward - cost.sum(1)).view(completions.shape), self.baseline)
        return above.view(-1, 1) * mask

    def silent(self, completions: Completions) -> Tensor:
        """(): how many groups have equal rewards alone, those of cut completions replaced."""
        total = self._rewards(completions).view(completions.shape)
        return (total.amax(1) == total.amin(1)).sum()

    def _rewards(self, completions: Completions) -> Tensor:
        """B float32."""
        reward, stopped = completions.rows.reward, completions.rows.stopped
        if self.limit_reward is None:
            return reward
        return torch.where(stopped, reward, self.limit_reward)


def due(
    source: Iterable[Experience], first: int, samples: int, observe: Observe | None = None
) -> Iterator[Experience]:
    """The experiences of a source, each of which must be the one that is due.

    Args:
        source: what the policy wrote, micro-batch after micro-batch.
        first: the micro-batch that the first is of.
        samples: G.
        observe: shown each before it is handed on.

    Raises:
        DataError: one is of another micro-batch or writer, was not judged, or has other groups.
    """
    for number, each in enumerate(source, first):
        sizes = {len(group.completions) for group in each.groups}
        if (each.writer, each.judged, each.number, sizes) != ("policy", True, number, {samples}):
            raise DataError(
                f"expected judged experience {number} of the policy, {samples} samples of each "
                f"prompt; got experience {each.number} of the {each.writer}, "
                f"{'' if each.judged else 'not '}judged, {sorted(sizes)} samples; replay what was "
                "recorded with the same settings, from its beginning"
            )
        if observe is not None:
            observe(each)
        yield each


def completions_of(experience: Experience) -> Completions:
    """The rows of an experience, on the device of its prompts."""
    groups, total = experience.groups, experience.scores.total
    rows = Sequences.of(written_in(groups, own=True, rewards=total), groups[0].prompt.device)
    mask = rows.batch.mask
    # The counted places in their order are the tokens of all completions in theirs.
    drawn, version = torch.zeros_like(rows.recorded), torch.zeros_like(rows.batch.tokens)
    drawn[mask] = torch.cat([c.logprob for g in groups for c in g.completions]).to(drawn)
    version[mask] = torch.cat([v for g in experience.token_versions for v in g]).to(version)
    report = {f"reward_{name}": part.sum() for name, part in experience.scores.parts.items()}
    report |= {
        "sum_groups": torch.tensor(float(len(groups)), device=mask.device),
        "sum_surprisal": -drawn.sum(),
    }
    shape = (total.shape[0], total.shape[1])
    return Completions(rows=rows, drawn=drawn, version=version, shape=shape, report=report)


def kl_report(log_ratio: Tensor) -> Mapping[str, Tensor]:
    """Sums over rows of the estimates of KL, summed over the tokens of a row."""
    return {f"kl_{name}": each.sum() for name, each in kl_estimates(log_ratio).items()}


def reused(items: Iterable[Learned], size: int, times: int, update: int) -> Iterator[Learned]:
    """Every `size` items `times` times, each with its update; none is asked for before it is due.

    Args:
        items: micro-batches.
        size: how many make an update.
        times: how many updates are made of the same ones.
        update: the first.
    """
    held: list[Learned] = []
    for item in items:
        yield replace(item, update=update)
        held.append(item)
        if len(held) == size:
            for again in range(1, times):
                yield from (replace(each, update=update + again) for each in held)
            held, update = [], update + times
