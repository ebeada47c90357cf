"""An actor-critic that learns from what older versions of itself did, corrected by V-trace.

Actors hold environments and no network; one server asks the network for all of them, cuts what
happens into unrolls and keeps, for every step, the logits it was drawn from. The learner takes a
batch of unrolls and minimises

    - log pi(a_t) adv_t + baseline_cost (v_t - V_t)^2 / 2 - entropy_cost H(pi)
    + kl_cost (log mu(a_t) - log pi(a_t))

averaged over transitions, with v_t and adv_t from V-trace.

Source: Espeholt et al. 2018 (IMPALA), arXiv:1802.01561; Espeholt et al. 2020 (SEED RL),
arXiv:1910.06591.
Deviations: an episode that was cut short is worth the value of its last observation,
where SEED's code takes the cut for an end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from cabochon.core import Loss, Objective, Step
from cabochon.core.errors import ConfigError
from cabochon.losses.vtrace import vtrace
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.collector import Collector, Cutting
from cabochon.rl.unrolls import UnrollBatch, stack
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "batches", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned from which unrolls, for how long."""

    unroll_length: int = 20
    """T: transitions of an unroll."""
    batch_size: int = 16
    """Unrolls of a micro-batch."""
    discount: float = 0.99
    """gamma."""
    trace: float = 1.0
    """lambda of the value targets."""
    correction: Literal["vtrace", "importance", "none"] = "vtrace"
    """V-trace's bounded ratios; the ratios without bounds; or none, as if pi had acted itself."""
    rho_bar: float = 1.0
    """Bound of the ratios in the value targets; together with c_bar it says what they converge to.
    """
    c_bar: float = 1.0
    """Bound of the ratios that carry later errors back."""
    rho_bar_advantage: float = 1.0
    """Bound of the ratios in the policy gradient."""
    baseline_cost: float = 0.5
    entropy_cost: float = 0.01
    kl_cost: float = 0.0
    reward_scale: float = 1.0
    """Rewards are multiplied by it in the loss; never in the returns reported. It keeps values
    small: those in hundreds take long to be learned, and spoil layers shared with the policy."""
    max_abs_reward: float | None = None
    """Scaled rewards are clipped to it in the loss, where it is given; never in the returns
    reported."""
    lag: int = 0
    """With --runtime inline: unrolls wait for so many updates before they are learned from."""
    max_lag: int | None = None
    """Unrolls that began more updates ago than that are dropped; any age when absent."""
    steps: int = 1000
    """Updates in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    warmup: int = 0
    """Updates over which the learning rate rises."""
    schedule: Kind = "linear"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.0
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 40.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        _ = self.learning_rate_schedule
        sizes = (self.unroll_length, self.batch_size, self.steps, self.accumulate)
        costs = (self.baseline_cost, self.entropy_cost, self.kl_cost)
        for wrong, reason in (
            (min(sizes) < 1, "unroll_length, batch_size, steps and accumulate must be at least 1"),
            (not 0.0 <= self.discount <= 1.0, f"discount must lie in [0, 1], got {self.discount}"),
            (not 0.0 <= self.trace <= 1.0, f"trace must lie in [0, 1], got {self.trace}"),
            (not 0.0 <= self.c_bar <= self.rho_bar < math.inf, "0 <= c_bar <= rho_bar must hold, "
             f"and be finite (correction importance has no bounds), got {self.c_bar} and "
             f"{self.rho_bar}"),
            (not 0.0 <= self.rho_bar_advantage < math.inf, "rho_bar_advantage must be finite and "
             "not negative (correction importance has no bounds)"),
            (not all(0.0 <= cost < math.inf for cost in costs),
             f"costs must be finite and not negative, got {costs}"),
            (not 0.0 < self.reward_scale < math.inf,
             f"reward_scale must be above 0 and finite, got {self.reward_scale}"),
            (self.max_abs_reward is not None and not self.max_abs_reward > 0.0,
             f"max_abs_reward must be above 0, or absent, got {self.max_abs_reward}"),
            (self.lag < 0 or (self.max_lag or 0) < 0, "lag and max_lag must not be negative"),
            (self.max_lag is not None and self.lag > self.max_lag,
             f"unrolls of lag {self.lag} are all older than max_lag {self.max_lag}"),
            (not self.max_grad_norm > 0.0, "max_grad_norm must be above 0"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(reason)

    @property
    def cutting(self) -> Cutting:
        """How unrolls are cut and how old they may be."""
        return Cutting(
            length=self.unroll_length,
            batch=self.batch_size,
            lag=self.lag * self.accumulate,
            max_lag=self.max_lag,
        )

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)


def batches(
    config: Config, collector: Collector, *, device: torch.device | str = "cpu", start: int = 0
) -> Iterator[UnrollBatch]:
    """Micro-batches without end; each is collected when it is asked for."""
    for number in count(start * config.accumulate):
        unrolls = collector.take(config.batch_size, number // config.accumulate)
        yield stack(unrolls).to(device)


def objective(config: Config) -> Objective[AgentNetwork, UnrollBatch]:
    """The loss of a batch of unrolls: a sum over its transitions, and their number."""
    bounds = {
        "vtrace": (config.rho_bar, config.c_bar, config.rho_bar_advantage),
        "importance": (math.inf, math.inf, math.inf),
        "none": (1.0, 1.0, 1.0),
    }[config.correction]
    rho_bar, c_bar, rho_bar_advantage = bounds

    def loss(network: AgentNetwork, batch: UnrollBatch) -> Loss:
        unrolled = network.unroll(
            batch.observation,
            batch.previous_action,
            batch.reward,
            batch.first,
            batch.state,
            batch.finals,
        )
        logprobs = unrolled.outputs["logits"][:-1].float().log_softmax(-1)
        behaviour = batch.outputs["logits"].float().log_softmax(-1)
        values = unrolled.outputs["value"].float()
        action = batch.action.unsqueeze(-1)
        logprob = logprobs.gather(-1, action).squeeze(-1)
        log_rhos = (logprob - behaviour.gather(-1, action).squeeze(-1)).detach()
        learned = vtrace(
            torch.zeros_like(log_rhos) if config.correction == "none" else log_rhos,
            _rewards(config, batch, unrolled.finals),
            config.discount * (~batch.first[1:]).float(),
            values[:-1].detach(),
            values[-1].detach(),
            trace=config.trace,
            rho_bar=rho_bar,
            c_bar=c_bar,
            rho_bar_advantage=rho_bar_advantage,
        )
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        value_error = 0.5 * (learned.targets - values[:-1]).square()
        total = (
            -(logprob * learned.advantages).sum()
            + config.baseline_cost * value_error.sum()
            - config.entropy_cost * entropy.sum()
        )
        if config.kl_cost:
            total = total - config.kl_cost * logprob.sum()  # log mu has no gradient
        rhos = log_rhos.exp()
        report = {
            "value_error": value_error.detach().sum(),
            "entropy": entropy.detach().sum(),
            "rho": rhos.sum(),
            "rho_clipped": (rhos > config.rho_bar).float().sum(),
            "kl_behaviour": -log_rhos.sum(),
            "reward": batch.reward[1:].sum(),
        }
        weight = torch.tensor(float(logprob.numel()), device=total.device)
        return Loss(total=total, weight=weight, report=report)

    return loss


def train(
    config: Config,
    network: AgentNetwork,
    collector: Collector,
    optimizer: Optimizer,
    *,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        network: learns, and acts through the collector.
        collector: made with `config.cutting`; brings the unrolls, restored where `start` is not 0.
        optimizer: of the network's parameters.
        start: how many updates were already made.

    Raises:
        ConfigError: the collector cuts other unrolls than these.
        DataError: environments failed again and again.
    """
    if collector.cutting != config.cutting:
        raise ConfigError(f"the collector cuts {collector.cutting}, expected {config.cutting}")
    device = next(network.parameters()).device
    steps = fit(
        network,
        objective(config),
        batches(config, collector, device=device, start=start),
        optimizer,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        schedule=config.learning_rate_schedule,
        start=start,
    )
    for step in islice(steps, max(0, config.steps - start)):
        yield replace(step, report={**step.report, **collector.report()})


def _rewards(config: Config, batch: UnrollBatch, finals: Mapping[str, Tensor]) -> Tensor:
    """T B: of each transition, with the value of what an episode cut short would have brought."""
    rewards = config.reward_scale * batch.reward[1:].float()
    if config.max_abs_reward is not None:
        rewards = rewards.clamp(-config.max_abs_reward, config.max_abs_reward)
    if finals:
        time, row, _ = batch.finals
        rewards = rewards.clone()
        rewards[time - 1, row] += config.discount * finals["value"].detach().float()
    return rewards
