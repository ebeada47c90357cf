"""Pre-training on packed documents: the next token, or a teacher's whole distribution over it.

Source: Gemma Team 2024, arXiv:2403.08295, section 4 (next-token prediction), and Gemma Team 2024,
arXiv:2408.00118, section 3 (knowledge distillation: at every position of real text, the
cross-entropy between the teacher's distribution and the student's in place of the next token's).
The losses other than cross-entropy: Roulet et al. 2025, arXiv:2501.18537.
Deviations: the reports name neither optimiser nor schedule; AdamW with a warm-up and a cosine is
ours. Neither says how much of the teacher's distribution was kept; any teacher serves here, one
that runs beside the student, whose distribution is whole, or one that says less of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.optim import Optimizer

from cabochon.core import Loss, Objective, Policy, Step, Teacher, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import fenchel_young, linear
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "chosen_objective", "distillation_objective", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the model learns, and how its learning rate moves."""

    steps: int = 1000
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
    loss: fenchel_young.LossName = "cross_entropy"
    """What a token of text costs: cross-entropy, or the Fenchel-Young loss of another
    divergence."""
    loss_parameter: float | None = None
    """What belongs to the loss: a of alpha (1.5 is in wide use), beta in [0, 1] of jsd and
    jsd_paper."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise ConfigError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        _ = self.learning_rate_schedule  # refuses a warm-up or floor that cannot be
        if not self.max_grad_norm > 0.0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        fenchel_young.named(self.loss, self.loss_parameter)

    def taught_otherwise(self) -> ConfigError:
        """What is said where `loss` and a teacher are both asked for."""
        return ConfigError(
            f"a teacher is learned by cross-entropy, not by loss {self.loss}; leave out one of the "
            "two (gkd learns from a teacher by any divergence)"
        )

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)


def objective(model: Policy, batch: TokenBatch) -> Loss:
    """Cross-entropy of the next token, in nats, summed over the tokens that count."""
    return linear.cross_entropy(model(batch), batch)


def distillation_objective(teacher: Teacher) -> Objective[Policy, TokenBatch]:
    """Cross-entropy of the student under the teacher's distribution, in nats, summed likewise.

    Its gradient is that of KL(teacher || student), which it exceeds by the teacher's entropy; the
    divergence itself is in the report as `kl`, where the teacher says enough of itself: of a
    teacher cut to its likeliest tokens that of these and the rest, of draws none.
    """

    def loss(student: Policy, batch: TokenBatch) -> Loss:
        with torch.no_grad():
            target = teacher(batch)
        return linear.distillation(student(batch), target, batch)

    return loss


def chosen_objective(config: Config, teacher: Teacher | None) -> Objective[Policy, TokenBatch]:
    """What a run minimises: a teacher's distribution, or the text with the loss that is named.

    Other losses than cross-entropy report `accuracy`, how often the token's logit is the highest,
    and, where they are sparse, `support`, how many tokens have a probability above 0.

    Raises:
        ConfigError: another loss than cross-entropy beside a teacher.
    """
    if config.loss == "cross_entropy":
        return objective if teacher is None else distillation_objective(teacher)
    if teacher is not None:
        raise config.taught_otherwise()
    criterion = fenchel_young.named(config.loss, config.loss_parameter)
    return lambda model, batch: criterion(model(batch), batch)


def train(
    config: Config,
    model: Policy,
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    teacher: Teacher | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        model: the one that learns.
        batches: micro-batches, from the first of update `start` on.
        optimizer: of the model's parameters.
        teacher: whose distribution to learn on this text; the text itself when absent.
        start: how many updates were already made.
    """
    steps = fit(
        model,
        chosen_objective(config, teacher),
        batches,
        optimizer,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        schedule=config.learning_rate_schedule,
        start=start,
    )
    yield from islice(steps, max(0, config.steps - start))
