"""Reward modelling: the scores of a language model with a scalar head learn which answer is better.

Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.4 and equation 1 (without its average over
the pairs of a prompt: here each pair is a unit); Gemma Team 2024, arXiv:2403.08295, section 6.2
(the Bradley-Terry model of preferences); dropout as in Rame et al. 2024, arXiv:2401.12187
(WARM), appendix B.
Deviations: a score is read at the answer's last token and has no bias. Dropout falls on what the
head reads and not within the backbone, which has none; its masks are keyed by the update, so that
a resumed run drops the same. `centre`, which holds the scores near 0, is not in these papers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer

from cabochon.core import Key, Loss, Objective, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses.preference import bradley_terry
from cabochon.models.reward_head import RewardModel
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "PairBatch", "numbered", "objective", "probe_objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the model learns, how its learning rate moves, and what holds it back."""

    steps: int = 200
    """Updates in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    warmup: int | None = None
    """Updates over which the learning rate rises from nothing; a tenth of `steps`, at most 50, when
    absent."""
    schedule: Kind = "cosine"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.1
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 1.0
    """Longer mean gradients are shortened to this norm."""
    dropout: float = 0.0
    """Share of what the head reads that is dropped, the same for both answers of a pair."""
    centre: float = 0.0
    """How much of the squared sum of a pair's scores is added to its loss."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise ConfigError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        _ = self.learning_rate_schedule  # refuses a warm-up or floor that cannot be
        if not self.max_grad_norm > 0.0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not 0.0 <= self.dropout < 1.0 or not self.centre >= 0.0:
            raise ConfigError(
                "dropout must lie in [0, 1) and centre not below 0, got "
                f"{self.dropout} and {self.centre}"
            )

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs, and the stream that decides what is dropped of them."""

    rows: TokenBatch
    """Row 2 i holds the preferred answer of pair i, row 2 i + 1 the other."""
    key: Key


def numbered(batches: Iterable[TokenBatch], key: Key, start: int) -> Iterator[PairBatch]:
    """The batches with a key each, the first of which is number `start`."""
    for number, rows in enumerate(batches, start):
        yield PairBatch(rows=rows, key=key.fold("dropout", number))


def objective(config: Config) -> Objective[RewardModel, PairBatch]:
    """-log sigmoid(score of the preferred - score of the other), in nats, summed over pairs.

    Reports how often the preferred scored higher (`accuracy`), by how much (`margin`), and the
    pair's mean score.
    """

    def loss(model: RewardModel, batch: PairBatch) -> Loss:
        features = model.features(batch.rows)
        return _of_scores(model.score_of(_dropped(features, config.dropout, batch.key)), config)

    return loss


def probe_objective(config: Config) -> Objective[RewardModel, PairBatch]:
    """`objective` of the head alone: the backbone gives features and learns nothing."""

    def loss(model: RewardModel, batch: PairBatch) -> Loss:
        with torch.no_grad():
            features = model.features(batch.rows)
        return _of_scores(model.score_of(_dropped(features, config.dropout, batch.key)), config)

    return loss


def train(
    config: Config,
    model: RewardModel,
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    key: Key,
    probe: bool = False,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        model: the one that learns.
        batches: micro-batches of pairs, two rows each, from the first of update `start` on.
        optimizer: of the model's parameters; for a probe, of its head.
        key: names what is dropped.
        probe: only the head learns.
        start: how many updates were already made.
    """
    pairs = numbered(batches, key, start * config.accumulate)
    steps = fit(
        model,
        (probe_objective if probe else objective)(config),
        pairs,
        optimizer,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        schedule=config.learning_rate_schedule,
        start=start,
    )
    yield from islice(steps, max(0, config.steps - start))


def _dropped(features: Tensor, share: float, key: Key) -> Tensor:
    """n D: each feature is 0 with probability `share`, alike in both rows of a pair, or scaled."""
    if share == 0.0:
        return features
    pairs, width = len(features) // 2, features.shape[1]
    kept = torch.rand(pairs, width, generator=key.generator()) >= share
    factor = kept.float().div_(1.0 - share).repeat_interleave(2, dim=0)
    return features * factor.to(features)


def _of_scores(scores: Tensor, config: Config) -> Loss:
    chosen, rejected = scores[::2], scores[1::2]
    with torch.no_grad():
        margin = chosen - rejected
        report = {
            "accuracy": (margin > 0.0).sum().float(),
            "margin": margin.sum(),
            "score": (chosen + rejected).sum() / 2.0,
        }
    total = bradley_terry(chosen, rejected, centre=config.centre).sum()
    weight = torch.tensor(float(len(chosen)), device=scores.device)
    return Loss(total=total, weight=weight, report=report)
