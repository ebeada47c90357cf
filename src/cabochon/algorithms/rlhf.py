"""RLHF by REINFORCE: make likelier what a reward likes, close to an anchor.

Source: Gemma report, arXiv:2403.08295, section 6 (a REINFORCE variant with a KL term towards the
policy it began from), its baselines from Ahmadian et al. 2024 (RLOO), arXiv:2402.14740; Shao et
al. 2024 (GRPO), arXiv:2402.03300; Lee et al. 2023, arXiv:2309.00267, appendix F (learned values).
For a completion y of a prompt, with the log-ratio log pi(y) / anchor(y) summed over its tokens,

    R(y) = reward(y) - kl_weight * log-ratio(y),     gradient (R(y) - baseline) grad log pi(y).

`kl` "exact" takes KL over the whole vocabulary at each token instead: its own gradient, and less
gain for tokens that lead to more of it. An anchor that follows slowly is stage 1 of WARP.

Deviations: of GRPO only the advantage is taken. The KL is in the reward (its k3 penalty in the loss
has another gradient), log-probabilities of a completion are summed, not averaged over its length,
and ratios are only formed where experience is reused or of older weights. Of PPO only the clipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

from cabochon.core import Backbone, Key, Loss, Objective, Policy, RewardFn, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.continuations import prompts_of
from cabochon.generation.engine import Settings
from cabochon.losses import policy_gradient as pg
from cabochon.losses.tempering import tempered
from cabochon.models.critic import Critic
from cabochon.rewards.experience import Experience, Observe, draw
from cabochon.rewards.returns import Learned, Returns, completions_of, due, kl_report, reused
from cabochon.training import parallel, rollout_metrics
from cabochon.training.anchors import Anchor, AnchorConfig
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "experiences", "objective", "scored", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned from a reward, how carefully, for how long."""

    baseline: Literal["prompt", "group_normalised", "batch", "value", "none"] = "prompt"
    """prompt (RLOO), group_normalised (GRPO's), batch, a learned value of each token's, none."""
    critic: Literal["head", "network"] = "head"
    """value: a linear map of the policy's hidden states, or a network of its own."""
    value_weight: float = 0.1
    """value: what multiplies the squared error of the values in the loss."""
    samples: int = 4
    """Completions of each prompt."""
    kl_weight: float = 0.05
    """beta: what a nat of KL to the anchor costs in reward."""
    kl: Literal["sampled", "exact"] = "sampled"
    """From the tokens drawn, in the reward; or over the whole vocabulary, in the loss."""
    max_kl: float = 8.0
    """The run stops where KL to the anchor is above so many nats a token; inf: never."""
    anchor: Literal["frozen", "ema", "copy"] = "frozen"
    """What the anchor does after each update."""
    anchor_rate: float = 0.01
    """mu: share of the policy that enters an ema anchor; 0 is frozen, 1 the policy itself."""
    anchor_every: int = 1000
    """Updates after which the anchor becomes the policy, where it is copied."""
    limit_reward: float | None = None
    """Of completions that the length limit cut, whatever was judged; as judged when absent."""
    sampling_temperature: float = 1.0
    """Of the policy when it writes; policy and anchor are compared at it."""
    max_new_tokens: int = 128
    """The longest completion that is drawn."""
    updates: int = 1
    """Made of each experience; further ones are corrected by importance ratios."""
    correction: Literal["none", "truncate", "clip"] = "none"
    """Importance ratios of the recorded log-probabilities: cut at `max_ratio`, or PPO's."""
    ratio: Literal["token", "sequence"] = "token"
    """Of each token, or of a whole completion."""
    max_ratio: float = 2.0
    clip: float = 0.2
    """clip: a token teaches while its ratio lies within 1 +- this."""
    steps: int = 200
    """Experiences to learn from in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    warmup: int | None = None
    """Updates over which the learning rate rises; a tenth of all, at most 50, when absent."""
    schedule: Kind = "constant"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.1
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 1.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        _ = (self.learning_rate_schedule, self.settings(()), self.anchor_config, self.corrected)
        by_token = self.baseline == "value" or self.kl == "exact"
        for wrong, reason in (
            (min(self.steps, self.accumulate, self.samples, self.updates) < 1,
             "steps, accumulate, samples and updates must be at least 1"),
            (not (0.0 <= self.kl_weight < math.inf and 0.0 < self.value_weight < math.inf
                  and self.max_kl > 0.0 < self.max_grad_norm),
             "kl_weight must be finite, at least 0; value_weight, max_kl, max_grad_norm above 0"),
            (self.critic != "head" and self.baseline != "value", "a critic needs baseline value"),
            (not math.isfinite(self.limit_reward or 0.0), "limit_reward must be a finite number"),
            (self.samples < 2 and self.baseline in ("prompt", "group_normalised"),
             f"the baseline {self.baseline} compares samples of a prompt: samples 2 or more, or "
             "baseline batch, value or none"),
            (self.updates > 1 and self.correction == "none",
             "several updates of one experience need a correction: truncate or clip"),
            (by_token and self.ratio == "sequence",
             "a ratio of whole completions goes with gains of whole completions: baseline other "
             "than value, kl sampled"),
            (self.sampling_temperature == 0.0,
             "what is decoded greedily has no probability to change: sampling_temperature above 0"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(reason)

    @property
    def anchor_config(self) -> AnchorConfig:
        """For `anchor_of`."""
        return AnchorConfig(kind=self.anchor, rate=self.anchor_rate, every=self.anchor_every)

    @property
    def returns(self) -> Returns:
        """What a completion is worth; an exact KL costs in the loss, not here."""
        return Returns(baseline=self.baseline, limit_reward=self.limit_reward, most=self.max_kl,
                       price=self.kl_weight if self.kl == "sampled" else 0.0)  # fmt: skip

    @property
    def corrected(self) -> pg.Correction:
        """How experience of older weights is taken."""
        return pg.Correction(kind=self.correction, level=self.ratio, most=self.max_ratio,
                             clip=self.clip)  # fmt: skip

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        total = self.steps * self.updates
        return scheduled(self.schedule, total=total, warmup=self.warmup, floor=self.floor)

    def settings(self, stop_ids: Sequence[int]) -> Settings:
        """How the policy writes: from its whole distribution, without top-k or top-p."""
        return Settings(max_new_tokens=self.max_new_tokens, stop_ids=tuple(stop_ids),
                        temperature=self.sampling_temperature)  # fmt: skip


def experiences(
    config: Config,
    policy: Backbone,
    batches: Iterable[TokenBatch],
    *,
    reward: RewardFn,
    key: Key,
    stop_ids: Sequence[int],
    start: int = 0,
) -> Iterator[Experience]:
    """What the policy as it is then writes for each micro-batch, judged.

    A draw depends on key, step, micro-batch and row alone. The arguments are those of `train`.
    """
    for number, batch in enumerate(batches, start * config.accumulate):
        step, part = divmod(number, config.accumulate)
        prompts = prompts_of(batch)
        first = parallel.rank() * len(prompts)  # several ranks draw together what one would
        yield draw(policy, prompts, reward, config.settings(stop_ids), key.fold("rlhf", step, part),
                   config.samples, number=number, version=step * config.updates,
                   indices=range(first, first + len(prompts)))  # fmt: skip


def scored(
    config: Config, experience: Experience, anchor: Policy, beginning: Policy | None = None
) -> Learned:
    """Rewards, less what the KL to the anchor costs, less their baseline.

    Raises:
        Diverged: the policy is too far from the anchor, or writes what the anchor never would.
    """
    found, temperature = completions_of(experience), config.sampling_temperature
    log_ratio = found.drawn - found.logprobs(anchor, temperature)
    report = {**found.report, **kl_report(log_ratio), "sum_silent": config.returns.silent(found)}
    if beginning is not None:
        report["kl_start"] = (found.drawn - found.logprobs(beginning, temperature)).sum()
    step = experience.number // config.accumulate
    gain = config.returns.gains(found, log_ratio, f"step {step}")
    return Learned(completions=found, gain=gain, report=report)


def objective(
    config: Config, anchor: Policy, critic: Critic | None = None
) -> Objective[Policy, Learned]:
    """-gain log pi, summed, with importance ratios, exact KL and squared errors where wanted."""
    correction, price = config.corrected, config.kl_weight

    def loss(policy: Policy, learned: Learned) -> Loss:
        found, gain = learned.completions, learned.gain
        batch, prediction = found.rows.batch, policy(found.rows.batch)
        law = tempered(prediction, config.sampling_temperature)
        further, report = torch.zeros((), device=gain.device), {**learned.report}
        if critic is not None:
            error = (gain - critic(batch, prediction)) * batch.mask
            further = config.value_weight * error.square().sum()
            gain, report["sum_value_error"] = error.detach(), error.detach().square().sum()
        if config.kl == "exact":
            with torch.no_grad():
                held = tempered(anchor(batch), config.sampling_temperature)
            exact, later = pg.exact_kl(law, held, batch)
            gain, further = gain - price * later, further + price * exact
            report["kl_exact"] = exact.detach()
        learns = pg.off_policy_gradient(law, batch, gain, found.drawn, correction)
        sums = rollout_metrics.sums(found.rows, prediction, rewarded=True)
        rows = torch.tensor(float(len(gain)), device=gain.device)
        return Loss(total=learns.total + further, weight=rows,
                    report={**report, **learns.report, **sums, "sum_lag": learned.lag})  # fmt: skip

    return loss


def train(
    config: Config,
    policy: Backbone,
    anchor: Anchor[Any],
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    key: Key,
    stop_ids: Sequence[int],
    reward: RewardFn | None = None,
    critic: Critic | None = None,
    beginning: Policy | None = None,
    observe: Observe | None = None,
    source: Iterable[Experience] | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """A step for each experience from `start` to the last; the anchor has moved before it comes.

    Args:
        config: what the run tunes.
        policy: writes and learns; it should write sensibly before it begins (after `sft`).
        anchor: `anchor_of(policy, config.anchor_config)`; its `state` belongs into checkpoints.
        batches: micro-batches from the first of step `start` on, a prompt a row.
        optimizer: of the policy's parameters, and the critic's.
        key: of all that is drawn.
        stop_ids: tokens that end a completion; they are learned.
        reward: of the policy's completions.
        critic: made by `critic_of`, for the baseline `value`.
        beginning: the model that the run began with, to report the KL to it.
        observe: shown every experience before it is learned from.
        source: instead of both, experiences from step `start` on: recorded, or drawn ahead.
        start: how many steps were already made.

    Raises:
        ConfigError: not one of reward and source, or a critic but for the baseline `value`.
        DataError, NonFinite: prompts, reward or source are at fault; or an update is no number.
        Diverged: see `scored`; weights and optimizer are as the update before left them.
    """
    if (reward is None) == (source is None):
        raise ConfigError("give a reward, or a source of experiences that were judged already")
    if (critic is None) == (config.baseline == "value"):
        raise ConfigError("a critic goes with the baseline value, and only with it")
    if reward is not None:
        source = experiences(config, policy, batches, reward=reward, key=key, stop_ids=stop_ids,
                             start=start)  # fmt: skip

    taken = due(source or (), start * config.accumulate, config.samples, observe)
    learned = (scored(config, each, anchor.model, beginning) for each in taken)
    again = reused(learned, config.accumulate, config.updates, start * config.updates)
    steps = fit(policy, objective(config, anchor.model, critic), again, optimizer,
                accumulate=config.accumulate, max_grad_norm=config.max_grad_norm,
                schedule=config.learning_rate_schedule, start=start * config.updates)  # fmt: skip
    moved = anchor.following(cast(nn.Module, policy), steps)
    for index in range(start, config.steps):
        if made := list(islice(moved, config.updates)):
            yield rollout_metrics.together(index, made)
