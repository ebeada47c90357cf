"""What a policy wrote among what an anchor wrote after the same prompts, by the order of rewards.

Best-of-N distillation learns from this alone, so every strictly increasing transform of the reward
gives the same updates, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cabochon.core import Group, Policy
from cabochon.core.errors import DataError, Diverged
from cabochon.data.continuations import Sequences, written_in
from cabochon.generation.score import score
from cabochon.rewards.experience import Experience, Observe
from cabochon.rewards.ranks import Ties, ranks

__all__ = ["Comparison", "Drawn", "compared", "paired", "refuse_beyond"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """P prompts, G samples of the policy, k of the anchor."""

    groups: tuple[Group, ...]
    """P of G + 1: behind the policy's samples stands the best of the anchor's first n."""
    rewards: Tensor
    """P G+1 float32."""
    below: Tensor
    """P G int64: how many of the anchor's k are worth less."""
    at_most: Tensor
    """P G int64: how many are worth at most as much."""
    draws: int
    """k."""
    report: Mapping[str, Tensor]
    """Sums over the prompts: `quantile`, the mean share of the anchor's draws that a sample of the
    policy is worth at least as much as; `anchor_reward`, the mean of the anchor's; the policy's
    parts of the reward; how many prompts there are, and have nothing but equals."""

    def rows(self, device: torch.device | str) -> Sequences:
        """P (G + 1) rows, group by group; the policy's own know what they were drawn with."""
        size = len(self.groups[0].completions)
        written = written_in(self.groups, own=True, rewards=self.rewards)
        return Sequences.of(
            [
                replace(each, logprob=None) if row % size == size - 1 else each
                for row, each in enumerate(written)
            ],
            device,
        )

    def logprobs(self, model: Policy, temperature: float) -> Tensor:
        """P G+1 float32, nats: of each completion under `model`."""
        rows = score(model, self.groups, temperature=temperature)
        sums = torch.stack([torch.stack([each.sum() for each in row]) for row in rows])
        return sums.to(self.below.device)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is learned from: P prompts, G samples of the policy, the best of the anchor's."""

    rows: Sequences
    """P (G + 1): behind a prompt's samples stands the anchor's best."""
    anchor: Tensor
    """P G+1 float32, nats: log-probability of each under the anchor."""
    beginning: Tensor | None
    """The same under the model that the run began with, where that is reported."""
    tilt: Tensor | None
    """P G float32, nats: estimate of log best-of-N(y) - log anchor(y); None where it is learned."""
    at_most: Tensor
    """P G float32: share of the anchor's draws that are worth at most what y is."""
    report: Mapping[str, Tensor]
    """Sums over the prompts."""


def compared(
    own: Experience, others: Experience, *, best_of: int, ties: Ties, device: torch.device
) -> Comparison:
    """Ranks what the policy wrote among what the anchor wrote.

    Args:
        own: the policy's.
        others: the anchor's, after the same prompts, of k samples.
        best_of: n, at most k: the anchor's best is that of so many; the first of equals.
        ties: what becomes of equal rewards.
        device: where the model is that learns from it.

    Raises:
        DataError: the prompts differ.
    """
    rewards, anchors = own.scores.total.to(device), others.scores.total.to(device)
    mine, theirs = ranks([(own.groups, rewards), (others.groups, anchors)], ties)
    best = theirs[:, :best_of].argmax(1)
    chosen = anchors.gather(1, best.unsqueeze(1))
    equal = torch.cat([mine, theirs], dim=1).amax(1) == 0
    parts = {f"reward_{name}": p.to(device).mean(1).sum() for name, p in own.scores.parts.items()}
    at_most = (theirs.unsqueeze(1) <= mine.unsqueeze(2)).sum(-1)
    return Comparison(
        groups=tuple(
            Group(prompt=one.prompt, completions=(*one.completions, other.completions[place]))
            for one, other, place in zip(own.groups, others.groups, best.tolist(), strict=True)
        ),
        rewards=torch.cat([rewards, chosen], dim=1),
        below=(theirs.unsqueeze(1) < mine.unsqueeze(2)).sum(-1),
        at_most=at_most,
        draws=theirs.shape[1],
        report={
            **parts,
            "quantile": at_most.float().mean(1).sum() / theirs.shape[1],
            "anchor_reward": anchors.mean(1).sum(),
            "sum_groups": torch.tensor(float(len(mine)), device=device),
            "sum_silent": equal.sum().float(),
        },
    )


def paired(
    source: Iterable[Experience],
    samples: int,
    anchor_samples: int,
    observe: Observe | None = None,
) -> Iterator[tuple[Experience, Experience]]:
    """What policy and anchor wrote for the same micro-batch; a last one without its other is left.

    Args:
        source: the policy's and the anchor's in turn.
        samples: G of the policy's.
        anchor_samples: k of the anchor's.
        observe: shown each of a pair before it is handed on.

    Raises:
        DataError: the source has other writers, or other numbers of samples.
    """
    taken = iter(source)
    for own in taken:
        others = next(taken, None)
        if others is None:
            return  # the process that recorded it was killed between the two
        found = [(e.writer, e.number, len(e.groups[0].completions)) for e in (own, others)]
        expected = [("policy", own.number, samples), ("anchor", own.number, anchor_samples)]
        if found != expected:
            raise DataError(
                f"expected (writer, micro-batch, samples) {expected}, got {found}; replay what was "
                "recorded with the same settings"
            )
        if observe is not None:
            observe(own)
            observe(others)
        yield own, others


def refuse_beyond(most: float, own: Experience, anchor: Tensor) -> None:
    """For a policy that has left its anchor: nothing good comes back from there.

    Args:
        most: nats a token of KL to the anchor, by what the policy wrote.
        own: that, with the log-probabilities it was drawn with.
        anchor: P G, log-probabilities of the same completions under the anchor.

    Raises:
        Diverged: it is further.
    """
    drawn = torch.cat([each.logprob for group in own.groups for each in group.completions])
    distance = float(drawn.sum() - anchor.sum().to(drawn.device)) / len(drawn)
    if not distance <= most:
        raise Diverged(
            f"update {own.version}: KL to the anchor is {distance:.1f} nats a token, above max_kl "
            f"{most:g}; nothing was learned from that. Lower the learning rate, raise "
            "regularisation, or look at what the reward likes"
        )
