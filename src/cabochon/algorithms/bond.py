"""Best-of-N distillation (BOND and J-BOND): learn to write at once what the best of N would be.

Source: Sessa et al. 2025, "BOND: Aligning LLMs with Best-of-N Distillation", arXiv:2407.14622.
The defaults are J-BOND (algorithm 2): N = 2, one sample of the policy and two of an anchor that
follows it slowly, equation 17 as the reward of the backward part. BOND (section 4) is n of 2 and
more, `quantile` "floor" or "add_one" from `anchor_samples` of 16, the anchor frozen, or copied
every so many updates (iterative BOND: best of n again and again).

    (1 - beta) KL(best-of-N || pi) + beta KL(pi || best-of-N) + gamma KL(pi || anchor)

Deviations: gamma's gradient descends its KL, +grad log pi * log(pi / anchor), where algorithm 2
prints the opposite sign; it has a baseline, as the backward part has. The factor B of theorem 1,
left out there, is kept where quantiles are estimated. Equal rewards may be ordered by a hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cabochon.core import Backbone, Key, Loss, Objective, Policy, RewardFn, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.continuations import Sequences, prompts_of
from cabochon.generation.engine import Settings
from cabochon.generation.modes import device_of
from cabochon.generation.score import score
from cabochon.losses import best_of_n_distillation as target
from cabochon.losses.policy_gradient import logprobs, policy_gradient
from cabochon.losses.tempering import tempered
from cabochon.rewards.comparison import compared, paired, refuse_beyond
from cabochon.rewards.experience import Experience, Observe, draw
from cabochon.rewards.ranks import Ties
from cabochon.training import parallel, rollout_metrics
from cabochon.training.anchors import Anchor, AnchorConfig
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["Config", "Drawn", "experiences", "judged", "objective", "train"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which best-of-N is learned, how, for how long."""

    n: int = 2
    """N: the target is the best of so many draws of the anchor."""
    backward: float = 0.5
    """beta of Jeffreys: 0 learns the anchor's best alone, 1 the policy's own ranks alone."""
    regularisation: float = 0.0
    """gamma: weight of a further KL to the anchor."""
    quantile: target.Estimate = "two_draws"
    """log p_<= from c of k draws: -log 16 for c = 0, else 0 (two_draws, of k = 2); log c/k, and
    log 1/(2k) for c = 0 (floor); log (c+1)/(k+2) (add_one)."""
    level_factor: bool = True
    """Whether B of theorem 1 counts (floor, add_one); without it few values teach little."""
    ties: Ties = "equal"
    """Equal rewards are equal, or ordered by a hash of prompt and completion."""
    samples: int = 1
    """G, of the policy for each prompt."""
    anchor_samples: int = 2
    """k, of the anchor for each prompt; the first n compete to be its best."""
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
        for wrong, reason in (
            (not 2 <= self.n <= self.anchor_samples,
             f"2 <= n <= anchor_samples, got n {self.n} of {self.anchor_samples}"),
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


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a micro-batch learns from: P prompts, G samples of the policy, the anchor's best."""

    rows: Sequences
    """P (G + 1): behind a prompt's samples stands the anchor's best."""
    anchor: Tensor
    """P G+1 float32, nats: log-probability of each under the anchor."""
    beginning: Tensor | None
    """The same under the model that the run began with, where that is reported."""
    tilt: Tensor
    """P G float32, nats: estimate of log best-of-N(y) - log anchor(y)."""
    report: Mapping[str, Tensor]
    """Sums over the prompts."""


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
    log_p = target.log_quantile(found.at_most, found.draws, config.quantile)
    counted = config.level_factor and config.quantile != "two_draws"
    factor = target.log_level_factor(found.below, found.at_most, config.n) if counted else None

    def likely(model: Policy) -> Tensor:
        rows = score(model, found.groups, temperature=config.sampling_temperature)
        sums = [torch.stack([each.sum() for each in row]) for row in rows]
        return torch.stack(sums).to(log_p.device)

    held = likely(anchor)
    refuse_beyond(config.max_kl, own, held[:, :-1])
    return Drawn(
        rows=found.rows(log_p.device),
        anchor=held,
        beginning=None if beginning is None else likely(beginning),
        tilt=target.log_tilt(log_p, config.n, factor),
        report={**found.report, "log_quantile": log_p.mean(1).sum()},
    )


def objective(config: Config) -> Objective[Policy, Drawn]:
    """Both directions of KL to best-of-N and the KL to the anchor: a sum of -gain log pi(row).

    The factor N - 1 of equation 15 is in the tilt.
    """

    def loss(policy: Policy, drawn: Drawn) -> Loss:
        batch, prediction = drawn.rows.batch, policy(drawn.rows.batch)
        law = tempered(prediction, config.sampling_temperature)
        logprob = logprobs(law, batch).sum(1).view_as(drawn.anchor)
        log_ratio, best = (logprob - drawn.anchor).split([config.samples, 1], dim=1)
        tokens = batch.mask[drawn.rows.own].sum()
        gain = target.jeffreys_gains(drawn.tilt, log_ratio, backward=config.backward,
                                     regularisation=config.regularisation,
                                     within_prompt=config.baseline == "prompt")  # fmt: skip
        total = policy_gradient(law, batch, gain.view(-1, 1) * batch.mask).total
        prompts = torch.tensor(float(len(best)), device=best.device)
        report = {
            "forward_kl": target.reference_divergence(config.n) * prompts - best.sum(),
            "backward_kl": (log_ratio - drawn.tilt).mean(1).sum(),
            "kl_anchor": log_ratio.mean(1).sum(),
        }
        if drawn.beginning is not None:
            report["kl_start"] = (logprob - drawn.beginning)[:, :-1].mean(1).sum()
        sums = rollout_metrics.sums(drawn.rows, prediction, rewarded=True)
        sums |= {"sum_rows": sums["sum_own"], "sum_tokens": tokens.float(),
                 "sum_surprisal": -logprob[:, :-1].sum()}  # fmt: skip
        return Loss(total=total, weight=prompts, report={**drawn.report, **report, **sums})

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
        beginning: the model that the run began with, to report the KL to it; none: no report.
        observe: shown every experience before it is learned from.
        source: experiences of an earlier run, in its order, instead of `batches` and `reward`.
        start: how many updates were already made.

    Raises:
        ConfigError: there is neither a reward nor a source, or both.
        DataError, NonFinite: prompts, reward or source are at fault; or an update is no number.
    """
    if (reward is None) == (source is None):
        raise ConfigError("give a reward, or a source of experiences that were judged already")
    if reward is not None:
        source = experiences(config, policy, anchor, batches, reward=reward, key=key,
                             stop_ids=stop_ids, start=start)  # fmt: skip

    pairs = paired(source or (), config.samples, config.anchor_samples, observe)
    drawn = (judged(config, own, others, anchor.model, beginning) for own, others in pairs)
    steps = fit(policy, objective(config), drawn, optimizer,
                accumulate=config.accumulate, max_grad_norm=config.max_grad_norm,
                schedule=config.learning_rate_schedule, start=start)  # fmt: skip
    moved = anchor.following(cast(nn.Module, policy), steps)
    for step in islice(moved, max(0, config.steps - start)):
        yield replace(step, report=rollout_metrics.metrics(step.report))
