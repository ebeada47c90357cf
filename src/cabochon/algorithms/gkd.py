"""Generalised knowledge distillation: learn from a teacher on what the student itself writes.

Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models", arXiv:2306.13649,
algorithm 1; equation 2 is `average="sequence"`, equation 5 is `distillation_weight` below 1.
lambda is `on_policy_fraction`; u < lambda is strict, so that 0 never samples and 1 never reads a
target. JSD(beta) is `divergence="jsd"` (rescaled: beta = 0 and 1 are the two KLs) or "jsd_paper".
Deviations: the coin may be tossed for each sequence instead of each batch; `credit="future"` adds
the term that the paper leaves out. No divergence is multiplied by a squared temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch.optim import Optimizer

from cabochon.core import (
    Backbone,
    Key,
    Loss,
    Objective,
    Policy,
    RewardFn,
    Step,
    Teacher,
    TokenBatch,
)
from cabochon.core.errors import ConfigError
from cabochon.data.continuations import Sequences, prompts_of, references_of, written_in
from cabochon.generation.engine import Settings, generate
from cabochon.losses import f_divergences, linear
from cabochon.losses.policy_gradient import future_sums, policy_gradient
from cabochon.losses.tempering import tempered, text_targets
from cabochon.rewards.experience import Experience, Observe, gains
from cabochon.rewards.scores import Scores, scores
from cabochon.training import parallel, rollout_metrics
from cabochon.training.fit import fit
from cabochon.training.schedules import Kind, Schedule, scheduled

__all__ = ["PRESETS", "Config", "objective", "sequences", "train"]

PRESETS: Mapping[str, float] = {
    "sft": 0.0, "seq_kd": 0.0, "supervised_kd": 0.0, "imit_kd": 0.5, "on_policy": 1.0,
}  # fmt: skip
"""Special case -> lambda. The first two learn the text itself: of the data, or of a teacher."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned from which sequences, for how long."""

    preset: Literal["sft", "seq_kd", "supervised_kd", "imit_kd", "on_policy"] = "on_policy"
    """The special cases of the paper (its table 1)."""
    on_policy_fraction: float | None = None
    """lambda: how often the student writes what it learns from; the preset's when absent."""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, jsd_paper, hellinger, chi_square, alpha, jeffreys."""
    divergence_parameter: float | None = None
    """beta of jsd and jsd_paper (0 is forward, 1 reverse KL), a of alpha; the others have none."""
    draw: Literal["batch", "sequence"] = "batch"
    """One coin for a whole micro-batch, or one for each prompt."""
    average: Literal["sequence", "token"] = "sequence"
    """Mean over a sequence's tokens, then over sequences (equation 2); or over all tokens alike."""
    credit: Literal["none", "future"] = "none"
    """Whether a token answers for the divergences after it, as the gradient of their sum has it."""
    sampling_temperature: float = 1.0
    """Of the student when it writes."""
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    """Of the student's distribution within the divergence."""
    max_new_tokens: int = 128
    """The longest completion that is drawn."""
    samples: int = 1
    """Completions of each prompt that the student writes for."""
    distillation_weight: float = 1.0
    """alpha of equation 5: the divergence's part of the objective; the rest is the reward's."""
    baseline: Literal["prompt", "batch"] = "prompt"
    """Mean reward of the other samples of the prompt, or of the others of the micro-batch."""
    steps: int = 200
    """Updates in all, those before an interruption included."""
    accumulate: int = 1
    """Micro-batches of an update."""
    warmup: int | None = None
    """Updates over which the learning rate rises; a tenth of `steps`, at most 50, when absent."""
    schedule: Kind = "cosine"
    """How the learning rate goes on after the warm-up."""
    floor: float = 0.1
    """Fraction of the learning rate that the last update keeps (cosine, linear)."""
    max_grad_norm: float = 1.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        _ = (self.learning_rate_schedule, self.settings(()), self.f)  # refuse what cannot be
        own, alpha = self.own_fraction, self.distillation_weight
        above_0 = (self.teacher_temperature, self.student_temperature, self.max_grad_norm)
        far, scored = self.credit == "future", alpha < 1.0 or self.credit == "future"
        as_text = (self.divergence, self.teacher_temperature, own) == ("forward_kl", 1.0, 0.0)
        for wrong, reason in (
            (not 0.0 <= own <= 1.0, f"on_policy_fraction must lie in [0, 1], got {own}"),
            (not 0.0 <= alpha <= 1.0, f"distillation_weight must lie in [0, 1], got {alpha}"),
            (min(self.steps, self.accumulate, self.samples) < 1,
             "steps, accumulate and samples must be at least 1"),
            (not all(x > 0.0 for x in above_0), "temperatures and max_grad_norm must be above 0"),
            (self.learns_text and not as_text, f"{self.preset} learns the text itself, by forward "
             "KL: leave divergence, teacher_temperature and on_policy_fraction out"),
            (far and own == 0.0, "future credit is for what the student draws; here it never does"),
            (self.samples > 1 and self.draw == "sequence" and 0.0 < own < 1.0,
             "samples beside one text of other prompts would count several times; draw by batch"),
            (alpha < 1.0 and (own < 1.0 or self.average == "token"), "a reward is of a whole "
             "sequence of the student's own: on_policy_fraction 1, average by sequence"),
            (alpha < 1.0 and self.samples < 2 and self.baseline == "prompt",
             "the baseline of a prompt needs 2 samples or more; or take that of the batch"),
            (scored and self.sampling_temperature == 0.0,
             "what is decoded greedily has no probability to change: sampling_temperature above 0"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(reason)

    @property
    def own_fraction(self) -> float:
        """lambda, the preset's where none was given."""
        given = self.on_policy_fraction
        return PRESETS[self.preset] if given is None else given

    @property
    def learns_text(self) -> bool:
        """Tokens are learned, not a teacher's distributions."""
        return self.preset in ("sft", "seq_kd")

    @property
    def f(self) -> f_divergences.FDivergence:
        """The divergence by its name and parameter."""
        return f_divergences.named(self.divergence, self.divergence_parameter)

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Update index -> multiplier of the learning rate."""
        return scheduled(self.schedule, total=self.steps, warmup=self.warmup, floor=self.floor)

    def settings(self, stop_ids: Sequence[int]) -> Settings:
        """How the student draws: from its whole distribution, without top-k or top-p."""
        return Settings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.sampling_temperature,
            stop_ids=tuple(stop_ids),
        )


def sequences(
    config: Config,
    student: Backbone,
    batches: Iterable[TokenBatch],
    *,
    key: Key,
    stop_ids: Sequence[int],
    reward: RewardFn | None = None,
    observe: Observe | None = None,
    start: int = 0,
) -> Iterator[Sequences]:
    """Lines 3 to 7 of the algorithm: the student writes, or what was written before is taken.

    A draw depends on key, update, micro-batch and row alone. The arguments are those of `train`.
    """
    settings = config.settings(stop_ids)
    for number, batch in enumerate(batches, start * config.accumulate):
        step, part = divmod(number, config.accumulate)
        now, prompts = key.fold("gkd", step, part), prompts_of(batch)
        first = parallel.rank() * len(prompts)  # several ranks draw together what one would
        coins = now.fold("coin").numpy().random(parallel.ranks() * len(prompts))
        uniform = coins[first:] if config.draw == "sequence" else [coins[0]] * len(prompts)
        own = [uniform[row] < config.own_fraction for row in range(len(prompts))]
        groups = generate(
            student,
            [prompt for prompt, mine in zip(prompts, own, strict=True) if mine],
            settings,
            now.fold("student"),
            config.samples,
            indices=[first + row for row, mine in enumerate(own) if mine],
        )
        rewards = torch.zeros(len(groups), config.samples)
        judged = Scores(total=rewards) if reward is None else scores(reward, groups)
        if observe is not None and groups:
            observe(Experience(number=number, groups=tuple(groups), scores=judged, version=step,
                               judged=reward is not None))  # fmt: skip
        above = rewards if reward is None else gains(judged.total, config.baseline)
        found = written_in(groups, own=True, rewards=judged.total, gains=above)
        found += references_of(batch, stop_ids, [row for row, mine in enumerate(own) if not mine])
        yield Sequences.of(found, batch.tokens.device)


def objective(config: Config, teacher: Teacher | None) -> Objective[Policy, Sequences]:
    """Lines 8 and 9: alpha D(teacher, student) - (1 - alpha) reward, the latter by REINFORCE.

    No gradient reaches the teacher; the drawing has none but by `credit` and by the reward.
    """
    alpha, f = config.distillation_weight, config.f

    def loss(student: Policy, drawn: Sequences) -> Loss:
        batch, prediction = drawn.batch, student(drawn.batch)
        share = batch.mask.float()
        if config.average == "sequence":
            share = share / share.sum(1, keepdim=True).clamp(min=1.0)
        total = divergence = torch.zeros((), device=share.device)
        gain = (1.0 - alpha) * drawn.gain.unsqueeze(1) * batch.mask
        if alpha > 0.0:
            learner = tempered(prediction, config.student_temperature)
            with torch.no_grad():
                said = text_targets(batch) if teacher is None else teacher(batch)
            target = tempered(said, config.teacher_temperature)
            distilled = linear.divergence(learner, target, batch, f, weights=share)
            total, divergence = alpha * distilled.total, distilled.total.detach()
            if config.credit == "future":
                later = torch.zeros_like(share)
                later[batch.mask] = linear.divergence_values(learner, target, batch, f)
                gain = gain - alpha * future_sums(later * share) * drawn.own.unsqueeze(1)
        if alpha < 1.0 or config.credit == "future":
            drew = tempered(prediction, config.sampling_temperature)
            total = total + policy_gradient(drew, batch, gain).total
        weight = (batch.mask if config.average == "token" else batch.mask.any(1)).sum().float()
        sums = rollout_metrics.sums(drawn, prediction, rewarded=alpha < 1.0)
        return Loss(total=total, weight=weight, report={"divergence": divergence, **sums})

    return loss


def train(
    config: Config,
    student: Backbone,
    batches: Iterable[TokenBatch],
    optimizer: Optimizer,
    *,
    key: Key,
    stop_ids: Sequence[int],
    teacher: Teacher | None = None,
    reward: RewardFn | None = None,
    observe: Observe | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        student: writes and learns; it should write sensibly before it begins (after `sft`).
        batches: micro-batches from the first of update `start` on, a prompt a row; what follows it
            and counts is its completion in the data, which may be absent where it is not learned.
        optimizer: of the student's parameters.
        key: of all that is drawn.
        stop_ids: tokens that end a completion; they are learned.
        teacher: whose distributions to learn; none where the text itself is learned.
        reward: of the student's completions, where `distillation_weight` is below 1.
        observe: shown what the student wrote for a micro-batch before it is learned from.
        start: how many updates were already made.

    Raises:
        ConfigError: a teacher or reward is missing, or would have no part in what is learned.
        DataError: rows are no prompts, or lack the completions that are to be learned.
    """
    if (config.distillation_weight < 1.0) != (reward is not None):
        raise ConfigError("a reward goes with a distillation_weight below 1, and only with it")
    if (config.learns_text or config.distillation_weight == 0.0) != (teacher is None):
        raise ConfigError(f"{config.preset} with distillation_weight {config.distillation_weight} "
                          f"learns from {'a' if teacher is None else 'no'} teacher")  # fmt: skip
    drawn = sequences(config, student, batches, key=key, stop_ids=stop_ids, reward=reward,
                      observe=observe, start=start)  # fmt: skip
    steps = fit(student, objective(config, teacher), drawn, optimizer,
                accumulate=config.accumulate, max_grad_norm=config.max_grad_norm,
                schedule=config.learning_rate_schedule, start=start)  # fmt: skip
    for step in islice(steps, max(0, config.steps - start)):
        yield replace(step, report=rollout_metrics.metrics(step.report))
