"""Direct preference optimisation: a policy learns from pairs as if it were its own reward model.

Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; Wang et al. 2024, arXiv:2309.16240
(other divergences from the reference: f-DPO).
Deviations: none in the loss; log-probabilities are sums over an answer's tokens, its end included,
and the reference never moves. The gradient is taken in two steps that build no logits of a whole
batch: the loss's slope by each answer's log-probability first, then the policy gradient with those
slopes as gains, which is the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from cabochon.core import Loss, Objective, Policy, Step, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import f_divergences, preference
from cabochon.losses.f_divergences import FDivergence
from cabochon.losses.policy_gradient import logprobs, policy_gradient
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the policy is held to its reference, how long it learns, and at what rate."""

    steps: int = 200
    """Updates in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    strength: float = 0.1
    """Of the divergence from the reference; beta in the paper."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "jsd_paper", "hellinger", "chi_square", "alpha",
        "jeffreys",
    ] = "forward_kl"  # fmt: skip
    """D(policy, reference): forward_kl, KL(policy || reference), is DPO itself; reverse_kl is
    KL(reference || policy)."""
    divergence_parameter: float | None = None
    """What belongs to the divergence: a of alpha, beta in [0, 1] of jsd and jsd_paper."""
    warmup: int | None = None
    """Updates over which the learning rate rises from nothing; a tenth of `steps`, at most 50, when
    absent."""
    schedule: Kind = "cosine"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.1
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 1.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise ConfigError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        if not self.strength > 0.0:
            raise ConfigError(f"strength must be above 0, got {self.strength}")
        _ = self.f  # refuses a parameter that is missing, superfluous or out of range
        _ = self.learning_rate_schedule
        if not self.max_grad_norm > 0.0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")

    @property
    def f(self) -> FDivergence:
        """The divergence that holds the policy."""
        return f_divergences.named(self.divergence, self.divergence_parameter)

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)


def objective(config: Config, reference: Policy) -> Objective[Policy, TokenBatch]:
    """-log sigmoid(strength (f'(u of the preferred) - f'(u of the other))), summed over pairs.

    Row 2 i of a batch holds the preferred answer of pair i, row 2 i + 1 the other; u is policy over
    reference of the answer's counted tokens. Reports `accuracy` (how often the policy has gained
    more on the preferred one), `margin` (of the implicit rewards) and `chosen` and `rejected`, the
    log-ratios in nats.
    """
    f = config.f

    def loss(policy: Policy, batch: TokenBatch) -> Loss:
        if batch.shape[0] % 2:
            raise DataError(f"a pair is two rows; the batch has {batch.shape[0]}")
        with torch.no_grad():
            before = logprobs(reference(batch), batch).sum(1)
        prediction = policy(batch)
        log_ratio = (logprobs(prediction, batch).sum(1) - before).requires_grad_()
        with torch.enable_grad():
            chosen, rejected = log_ratio[::2], log_ratio[1::2]
            value = preference.dpo(chosen, rejected, config.strength, f).sum()
            (slope,) = torch.autograd.grad(value, log_ratio)
        gain = (-slope).unsqueeze(1).expand(batch.shape)
        carried = policy_gradient(prediction, batch, gain).total
        return Loss(
            total=carried + (value.detach() - carried.detach()),
            weight=torch.tensor(float(len(chosen)), device=value.device),
            report=_report(chosen.detach(), rejected.detach(), config),
        )

    return loss


def train(
    config: Config,
    policy: Policy,
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    reference: Policy,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        policy: the one that learns.
        batches: micro-batches of pairs, two rows each, from the first of update `start` on.
        optimizer: of the policy's parameters.
        reference: the policy before any training, or whatever it is held to; it learns nothing.
        start: how many updates were already made.
    """
    steps = fit(
        policy,
        objective(config, reference),
        batches,
        optimizer,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        schedule=config.learning_rate_schedule,
        start=start,
    )
    yield from islice(steps, max(0, config.steps - start))


def _report(chosen: Tensor, rejected: Tensor, config: Config) -> dict[str, Tensor]:
    gained = [preference.gained(each, config.f) for each in (chosen, rejected)]
    margin = config.strength * (gained[0] - gained[1])
    return {
        "accuracy": (margin > 0.0).sum().float(),
        "margin": margin.sum(),
        "chosen": chosen.sum(),
        "rejected": rejected.sum(),
    }
