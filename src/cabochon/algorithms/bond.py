"""Best-of-N distillation (BOND and J-BOND): learn to write at once what the best of N would be.

Source: Sessa et al. 2025, "BOND: Aligning LLMs with Best-of-N Distillation", arXiv:2407.14622.
The defaults are J-BOND (algorithm 2): N = 2, one sample of the policy and two of an anchor that
follows it slowly, equation 17 as the reward of the backward part. BOND (section 4) is n of 2 and
more, `quantile` "floor" or "add_one" from `anchor_samples` of 16, or "learned" (appendix B.1), the
anchor frozen, or copied every so many updates (iterative BOND: best of n again and again).

    (1 - beta) KL(best-of-N || pi) + beta KL(pi || best-of-N) + gamma KL(pi || anchor)

Deviations: gamma's gradient descends its KL, +grad log pi * log(pi / anchor), where algorithm 2
prints the opposite sign; it has a baseline, as the backward part has. The factor B of theorem 1,
left out there, is kept where quantiles are estimated. Equal rewards may be ordered by a hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

from cabochon.core import Backbone, Key, Loss, Objective, Policy, RewardFn, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.continuations import prompts_of
from cabochon.generation.engine import Settings
from cabochon.generation.modes import device_of
from cabochon.losses import best_of_n_distillation as target
from cabochon.losses.policy_gradient import logprobs, policy_gradient
from cabochon.losses.tempering import tempered
from cabochon.models.critic import Critic
from cabochon.rewards.comparison import Drawn, compared, paired, refuse_beyond
from cabochon.rewards.experience import Experience, Observe, draw
from cabochon.rewards.ranks import Ties
from cabochon.training import parallel, rollout_metrics
from cabochon.training.anchors import Anchor, AnchorConfig
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "experiences", "judged", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which best-of-N is learned, how, for how long."""

    n: int = 2
    """N: the target is the best of so many draws of the anchor."""
    backward: float = 0.5
    """beta of Jeffreys: 0 learns the anchor's best alone, 1 the policy's own ranks alone."""
    regularisation: float = 0.0
    """gamma: weight of a further KL to the anchor."""
    quantile: target.Quantile = "two_draws"
    """log p_<= from c of k draws: -log 16 for c = 0, else 0 (two_draws, of k = 2); log c/k, and
    log 1/(2k) for c = 0 (floor); log (c+1)/(k+2) (add_one); or learned along with the policy."""
    quantile_model: Literal["head", "network"] = "head"
    """learned: a linear map of the policy's last hidden state, or a network of its own."""
    quantile_weight: float = 0.1
    """learned: what multiplies its cross-entropy in the loss."""
    level_factor: bool = True
    """Whether B of theorem 1 counts (floor, add_one); without it few values teach little."""
    ties: Ties = "equal"
    """Equal rewards are equal, or ordered by a hash of prompt and completion."""
    samples: int = 1
    """G, of the policy for each prompt."""
    anchor_samples: int = 2
    """k, of the anchor for each prompt; the first n compete to be its best. With a learned quantile
    and `backward` 1 fewer than n will do, even 1."""
    baseline: Literal["batch", "prompt"] = "batch"
    """Mean return of the other samples of the micro-batch, or of the prompt."""
    max_kl: float = 8.0
    """The run stops when KL to the anchor is above so many nats a token."""
    anchor: Literal["ema", "copy", "frozen"] = "ema"
    """What the anchor does after each update."""
    anchor_rate: float = 0.02
    """eta: share of the policy that enters an ema anchor; 0 is frozen, 1 the policy itself."""
    anchor_every: int = 1000
    """Updates after which an anchor is copied from the policy."""
    sampling_temperature: float = 1.0
    """Of policy and anchor alike, when they write and when they are compared."""
    max_new_tokens: int = 128
    """The longest completion that is drawn."""
    steps: int = 200
    """Updates in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    warmup: int | None = None
    """Updates over which the learning rate rises; a tenth of `steps`, at most 50, when absent."""
    schedule: Kind = "constant"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.1
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 1.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        _ = (self.learning_rate_schedule, self.settings(()), self.anchor_config)
        learned = self.quantile == "learned"
        for wrong, reason in (
            (self.n < 2 or self.anchor_samples < (1 if learned and self.backward == 1 else self.n),
             f"2 <= n <= anchor_samples, got n {self.n} of {self.anchor_samples}"),
            (not 0.0 < self.quantile_weight < float("inf"), "quantile_weight must be above 0"),
            (self.quantile_model != "head" and not learned, "quantile_model: for quantile learned"),
            (not 0.0 <= self.backward <= 1.0, f"backward must lie in [0, 1], got {self.backward}"),
            (not 0.0 <= self.regularisation < float("inf"), "regularisation must be at least 0"),
            (min(self.steps, self.accumulate, self.samples) < 1,
             "steps, accumulate and samples must be at least 1"),
            (not self.max_kl > 0.0 < self.max_grad_norm, "max_kl, max_grad_norm: above 0 (or inf)"),
            (self.quantile == "two_draws" and (self.n, self.anchor_samples) != (2, 2),
             "two_draws is of n 2 and anchor_samples 2; for others take quantile floor or add_one"),
            (self.baseline == "prompt" and self.samples < 2,
             "the baseline of a prompt needs 2 samples or more; or take that of the batch"),
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
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)

    def settings(self, stop_ids: Sequence[int]) -> Settings:
        """How both write: from their whole distributions, without top-k or top-p."""
        return Settings(max_new_tokens=self.max_new_tokens, stop_ids=tuple(stop_ids),
                        temperature=self.sampling_temperature)  # fmt: skip


def experiences(
    config: Config,
    policy: Backbone,
    anchor: Anchor[Any],
    batches: Iterable[TokenBatch],
    *,
    reward: RewardFn,
    key: Key,
    stop_ids: Sequence[int],
    start: int = 0,
) -> Iterator[Experience]:
    """What algorithm 2 draws: for each micro-batch the policy's samples, then the anchor's.

    A draw depends on key, update, micro-batch and row alone. The arguments are those of `train`.
    """
    settings = config.settings(stop_ids)
    for number, batch in enumerate(batches, start * config.accumulate):
        step, part = divmod(number, config.accumulate)
        prompts, now = prompts_of(batch), key.fold("bond", step, part)
        first = parallel.rank() * len(prompts)  # several ranks draw together what one would
        rows = range(first, first + len(prompts))
        writers = (("policy", policy, config.samples),
                   ("anchor", anchor.model, config.anchor_samples))  # fmt: skip
        for writer, model, samples in writers:
            yield draw(model, prompts, reward, settings, now.fold(writer), samples, number=number,
                       version=step, writer=writer, indices=rows)  # fmt: skip


def judged(
    config: Config, own: Experience, others: Experience, anchor: Policy, beginning: Policy | None
) -> Drawn:
    """Ranks the policy's samples among the anchor's; nothing else of the rewards is learned.

    Raises:
        Diverged: the policy has left the anchor.
    """
    found = compared(own, others, best_of=config.n, ties=config.ties,
                     device=device_of(anchor, own.scores.total))  # fmt: skip
    device, tilt, said = found.below.device, None, {}
    if config.quantile != "learned":
        log_p, tilt = target.counted_tilt(
            found.below, found.at_most, found.draws, config.n, config.quantile,
            level_factor=config.level_factor)  # fmt: skip
        said["log_quantile"] = log_p.mean(1).sum()
    held = found.logprobs(anchor, config.sampling_temperature)
    refuse_beyond(config.max_kl, own, held[:, :-1])
    start = found.logprobs(beginning, config.sampling_temperature) if beginning else None
    return Drawn(rows=found.rows(device), anchor=held, beginning=start, tilt=tilt,
                 at_most=found.at_most / found.draws, report={**found.report, **said})  # fmt: skip


def objective(config: Config, quantiles: Critic | None = None) -> Objective[Policy, Drawn]:
    """Both directions of KL to best-of-N and the KL to the anchor: a sum of -gain log pi(row).

    The factor N - 1 of equation 15 is in the tilt. What learns the quantile gets its own loss.
    """

    def loss(policy: Policy, drawn: Drawn) -> Loss:
        batch, prediction = drawn.rows.batch, policy(drawn.rows.batch)
        tilt, learned, report = drawn.tilt, torch.zeros((), device=drawn.anchor.device), {}
        if tilt is None:
            logit = cast(Critic, quantiles).at_ends(batch, prediction).view_as(drawn.anchor)
            log_p, tilt, losses = target.learned_tilt(logit[:, :-1], drawn.at_most, config.n)
            learned = losses.mean(1).sum()
            report = {"log_quantile": log_p.mean(1).sum(), "quantile_loss": learned.detach()}
        law = tempered(prediction, config.sampling_temperature)
        logprob = logprobs(law, batch).sum(1).view_as(drawn.anchor)
        log_ratio, best = (logprob - drawn.anchor).split([config.samples, 1], dim=1)
        gain = target.jeffreys_gains(tilt, log_ratio, backward=config.backward,
                                     regularisation=config.regularisation,
                                     within_prompt=config.baseline == "prompt")  # fmt: skip
        total = policy_gradient(law, batch, gain.view(-1, 1) * batch.mask).total
        prompts = torch.tensor(float(len(best)), device=best.device)
        report["backward_kl"] = (log_ratio - tilt).mean(1).sum()
        report["kl_anchor"] = log_ratio.mean(1).sum()
        if config.n <= config.anchor_samples:
            report["forward_kl"] = target.reference_divergence(config.n) * prompts - best.sum()
        if drawn.beginning is not None:
            report["kl_start"] = (logprob - drawn.beginning)[:, :-1].mean(1).sum()
        sums = rollout_metrics.sums(drawn.rows, prediction, rewarded=True)
        sums |= {"sum_rows": sums["sum_own"],
                 "sum_tokens": batch.mask[drawn.rows.own].sum().float(),
                 "sum_surprisal": -logprob[:, :-1].sum()}  # fmt: skip
        return Loss(total=total + config.quantile_weight * learned, weight=prompts,
                    report={**drawn.report, **report, **sums})  # fmt: skip

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
    quantiles: Critic | None = None,
    beginning: Policy | None = None,
    observe: Observe | None = None,
    source: Iterable[Experience] | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last; the anchor has moved before each is handed on.

    Args:
        config: what the run tunes.
        policy: writes and learns; it should write sensibly before it begins (after `sft`).
        anchor: made by `anchor_of(policy, config.anchor_config)` before the first update; its
            `state` belongs into the run's checkpoints.
        batches: micro-batches from the first of update `start` on, a prompt a row.
        optimizer: of the policy's parameters.
        key: of all that is drawn.
        stop_ids: tokens that end a completion; they are learned.
        reward: of both writers' completions; only its order within a prompt counts.
        quantiles: made by `critic_of(policy, config.quantile_model)`, for `quantile` "learned".
        beginning: the model that the run began with, to report the KL to it; none: no report.
        observe: shown every experience before it is learned from.
        source: experiences of an earlier run, in its order, instead of `batches` and `reward`.
        start: how many updates were already made.

    Raises:
        ConfigError: not one of reward and source, or `quantiles` but where they are learned.
        DataError, NonFinite: prompts, reward or source are at fault; or an update is no number.
    """
    if (reward is None) == (source is None):
        raise ConfigError("give a reward, or a source of experiences that were judged already")
    if (quantiles is None) == (config.quantile == "learned"):
        raise ConfigError("what learns quantiles goes with quantile learned, and only with it")
    if reward is not None:
        source = experiences(config, policy, anchor, batches, reward=reward, key=key,
                             stop_ids=stop_ids, start=start)  # fmt: skip

    pairs = paired(source or (), config.samples, config.anchor_samples, observe)
    drawn = (judged(config, own, others, anchor.model, beginning) for own, others in pairs)
    steps = fit(policy, objective(config, quantiles), drawn, optimizer,
                accumulate=config.accumulate, max_grad_norm=config.max_grad_norm,
                schedule=config.learning_rate_schedule, start=start)  # fmt: skip
    moved = anchor.following(cast(nn.Module, policy), steps)
    for step in islice(moved, max(0, config.steps - start)):
        yield replace(step, report=rollout_metrics.metrics(step.report))
