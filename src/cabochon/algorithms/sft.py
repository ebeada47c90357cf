"""Supervised fine-tuning on conversations: the loss counts the tokens that the model has to say.

Source: Gemma Team 2024, arXiv:2403.08295, section 5 (supervised fine-tuning; the turn format of
table 4), and Gemma Team 2024, arXiv:2408.00118, section 4 (behavioural cloning on responses
written mostly by a larger model). The losses other than cross-entropy: Roulet et al. 2025,
arXiv:2501.18537.
Deviations: the second report also lets the teacher score the student's own samples; that is
on-policy distillation, a method of its own. Conversations are packed, which changes no gradient,
as they never attend to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch.optim import Optimizer

from cabochon.core import Loss, Objective, Policy, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import fenchel_young
from cabochon.losses.linear import cross_entropy
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "chosen_objective", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the model learns, and how its learning rate moves."""

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
    loss: fenchel_young.LossName = "cross_entropy"
    """What a token costs: cross-entropy, or the Fenchel-Young loss of another divergence."""
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

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)


def objective(model: Policy, batch: TokenBatch) -> Loss:
    """Cross-entropy of the model's turns, in nats, summed over their tokens.

    `batch.mask` is True where the target is part of a model turn or its end marker: what the user
    said, and the markers that the template puts there, are read and not learned.
    """
    return cross_entropy(model(batch), batch)


def chosen_objective(config: Config) -> Objective[Policy, TokenBatch]:
    """`objective` with the loss that the config names, over the same tokens.

    Other losses than cross-entropy report `accuracy`, how often the token's logit is the highest,
    and, where they are sparse, `support`, how many tokens have a probability above 0.
    """
    if config.loss == "cross_entropy":
        return objective
    criterion = fenchel_young.named(config.loss, config.loss_parameter)
    return lambda model, batch: criterion(model(batch), batch)


def train(
    config: Config,
    model: Policy,
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        model: the one that learns.
        batches: micro-batches of packed conversations, from the first of update `start` on.
        optimizer: of the model's parameters.
        start: how many updates were already made.
    """
    steps = fit(
        model,
        chosen_objective(config),
        batches,
        optimizer,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        schedule=config.learning_rate_schedule,
        start=start,
    )
    yield from islice(steps, max(0, config.steps - start))
