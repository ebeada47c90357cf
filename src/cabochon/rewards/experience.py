"""Experience: what a policy wrote for a micro-batch of prompts, and what that was worth.

    experience = draw(policy, prompts, reward, settings, key, 4, number=12, version=6)
    observe(experience)                              # RUN/rollouts, as RLDS episodes
    advantages = gains(experience.scores.total, "prompt")

Whatever learns from an experience finds all it needs in it: the tokens, the log-probability of each
when it was drawn, the version of the weights that drew it, the rewards and their parts. So a run
learns the same from its records, without sampler and reward, as it learned the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from cabochon.core import Backbone, Completion, Group, Key, RewardFn, TokenBatch
from cabochon.generation.engine import Settings, generate
from cabochon.losses.policy_gradient import leave_one_out, standardised
from cabochon.rewards.scores import Scores, scores

__all__ = [
    "Baseline",
    "Experience",
    "Observe",
    "continued",
    "draw",
    "gains",
]

Baseline = Literal["prompt", "batch", "group_normalised", "none"]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Groups that one writer drew for one micro-batch, and their rewards."""

    number: int
    """Of the micro-batch in the run: update * accumulate + part."""
    groups: tuple[Group, ...]
    """P, of G completions each."""
    scores: Scores
    """P G."""
    version: int
    """Of the weights that drew them: how many updates those had."""
    versions: tuple[tuple[Tensor, ...], ...] = ()
    """P G tensors of T int64: the version that drew each token; empty where all are `version`."""
    writer: str = "policy"
    """Who drew them, where several do for one micro-batch (an anchor)."""
    judged: bool = True
    """False where there was no reward; the scores are then 0."""

    def to(self, device: torch.device | str) -> Experience:
        """The same with prompts, completions and scores on `device`."""
        groups = tuple(
            Group(
                prompt=group.prompt.to(device),
                completions=tuple(
                    Completion(
                        tokens=each.tokens.to(device),
                        logprob=each.logprob.to(device),
                        model_logprob=each.model_logprob.to(device),
                        stopped=each.stopped,
                    )
                    for each in group.completions
                ),
            )
            for group in self.groups
        )
        parts = {name: part.to(device) for name, part in self.scores.parts.items()}
        scores = Scores(total=self.scores.total.to(device), parts=parts)
        return replace(self, groups=groups, scores=scores)

    @property
    def token_versions(self) -> tuple[tuple[Tensor, ...], ...]:
        """P G tensors of T int64: the version of the weights that drew each token."""
        return self.versions or tuple(
            tuple(torch.full_like(each.tokens, self.version) for each in group.completions)
            for group in self.groups
        )


Observe = Callable[[Experience], None]
"""Is shown every experience before anything is learned from it."""


def draw(
    model: Backbone,
    prompts: Sequence[Tensor],
    reward: RewardFn,
    settings: Settings,
    key: Key,
    samples: int,
    *,
    number: int,
    version: int,
    writer: str = "policy",
    indices: Sequence[int] | None = None,
) -> Experience:
    """`samples` completions of each prompt, drawn from the model as it is now and judged.

    Args:
        model: who writes.
        prompts: T int64 each.
        reward: of whole groups.
        settings: how is drawn.
        key: a draw depends on (key, prompt's index, sample, position) alone.
        samples: G.
        number: of the micro-batch in the run.
        version: how many updates the model has had.
        writer: recorded beside it.
        indices: of the prompts in the key, see `generate`.

    Raises:
        DataError: a prompt cannot be continued; or the reward failed, see `scores`.
        NonFinite: logits from which nothing can be drawn, or a reward that is no number.
    """
    groups = tuple(generate(model, prompts, settings, key, samples, indices=indices))
    return Experience(
        number=number,
        groups=groups,
        scores=scores(reward, groups),
        version=version,
        writer=writer,
    )


def gains(rewards: Tensor, baseline: Baseline) -> Tensor:
    """What each reward is above its baseline; exactly 0 where all that are compared are equal.

    prompt            the mean of the prompt's other samples (RLOO)
    batch             the mean of all other samples of the micro-batch
    group_normalised  the mean of the prompt's samples, itself included; the difference is then
                      divided by their standard deviation (GRPO)
    none              0: the reward itself

    Args:
        rewards: P G float32.
        baseline: one of these.
    """
    if baseline == "none":
        return rewards
    if baseline == "group_normalised":
        return standardised(rewards)
    compared = rewards if baseline == "prompt" else rewards.flatten()
    return leave_one_out(compared).view_as(rewards)


def continued(
    recalled: Iterable[Experience],
    draw: Callable[[Iterable[TokenBatch], int], Iterator[Experience]],
    batches: Iterable[TokenBatch],
    *,
    start: int,
    accumulate: int,
    writers: int = 1,
) -> Iterator[Experience]:
    """What an interrupted run had drawn beyond its checkpoint, then what is drawn now.

    The weights that drew the first may be gone, so it could not be drawn again as it was.

    Args:
        recalled: as `Recorder.recalled` gives it from the first micro-batch of step `start` on.
        draw: micro-batches from the first of a step on, and that step -> experiences.
        batches: micro-batches from the first of step `start` on.
        start: how many steps were already made.
        accumulate: micro-batches of a step.
        writers: how many experiences there are of each micro-batch, one behind the other; of an
            incomplete last micro-batch all are drawn again.
    """
    count, held = 0, list[Experience]()
    for each in recalled:
        held.append(each)
        if len(held) == writers:
            yield from held
            count, held = count + 1, []
    step, part = divmod(start * accumulate + count, accumulate)
    due = islice(batches, (step - start) * accumulate, None)
    yield from islice(draw(due, step), part * writers, None)
