"""Policies that write a single token after a prompt of one: every law and divergence is a sum.

world = Table(prompts=16, outcomes=32, key=Key(0))
law = world.law()                # prompts outcomes, log-probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cabochon.algorithms import bond
from cabochon.core import Completion, Group, Key, LinearPrediction, TokenBatch
from cabochon.rewards.experience import Experience
from cabochon.rewards.scores import Scores
from cabochon.training.anchors import Anchor


class Memory:
    """Of nothing: what comes next depends on the newest token alone."""

    capacity = 2

    def select(self, rows: Tensor) -> Memory:
        return self

    def put(self, rows: Tensor, other: Memory, sources: Tensor) -> None:
        pass


class OneToken(nn.Module):
    """Logits over the outcomes, 0 to K - 1, by the prompt's token, 0 to P - 1."""

    context = 2

    def __init__(self, logits: nn.Module, prompts: int) -> None:
        super().__init__()
        self.logits, self.prompts = logits, prompts

    def table(self) -> Tensor:
        """P K."""
        return self.logits(torch.arange(self.prompts))

    def law(self) -> Tensor:
        """P K float64, log-probabilities."""
        return self.table().detach().double().log_softmax(-1)

    def forward(self, batch: TokenBatch, cache: object = None) -> LinearPrediction:
        table = self.table()
        hidden = table[batch.tokens.clamp(max=self.prompts - 1)]
        return LinearPrediction(hidden=hidden, head=torch.eye(table.shape[1]))

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Memory:
        return Memory()


def tabular(start: Tensor) -> OneToken:
    """A free number for every logit; begins at `start`, P K."""
    return OneToken(nn.Embedding.from_pretrained(start.clone(), freeze=False), len(start))


class Shared(nn.Module):
    """A small network on 12 random features of the prompt: what is learned of one helps others."""

    def __init__(self, prompts: int, outcomes: int, key: Key) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(prompts, 12, generator=key.generator()))
        self.layers = nn.Sequential(
            nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outcomes)
        )
        with torch.no_grad():
            for name, weight in self.layers.named_parameters():
                drawn = torch.randn(weight.shape, generator=key.fold(name).generator())
                weight.copy_(drawn * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.0))

    def forward(self, prompts: Tensor) -> Tensor:
        return self.layers(self.features[prompts])


def batches(prompts: int, rows: int, start: int = 0) -> Iterator[TokenBatch]:
    """Endless micro-batches of `rows` prompts, in turn."""
    number = start
    while True:
        chosen = [(number * rows + row) % prompts for row in range(rows)]
        yield TokenBatch.of([[each] for each in chosen], masks=[[False]] * rows)
        number += 1


def by_table(reward: Tensor) -> Callable[[Sequence[Group]], Tensor]:
    """A reward function that looks a P K table up."""

    def worth(groups: Sequence[Group]) -> Tensor:
        return torch.stack(
            [
                reward[int(group.prompt[0]), [int(each.tokens[0]) for each in group.completions]]
                for group in groups
            ]
        )

    return worth


def written(policy: OneToken, worth: Tensor, key: Key, samples: int, **more: object) -> Experience:
    """`samples` draws after every prompt; the engine would take twenty times as long."""
    law = policy.law()
    drawn = law.exp().multinomial(samples, replacement=True, generator=key.generator())
    logprob = law.gather(1, drawn).float()
    groups = tuple(
        Group(
            prompt=torch.tensor([place]),
            completions=tuple(
                Completion(tokens=t, logprob=lp, model_logprob=lp, stopped=True)
                for t, lp in zip(tokens.split(1), logprobs.split(1), strict=True)
            ),
        )
        for place, (tokens, logprobs) in enumerate(zip(drawn, logprob, strict=True))
    )
    return Experience(groups=groups, scores=Scores(total=worth.gather(1, drawn)), **more)  # type: ignore[arg-type]


def experiences(
    config: bond.Config, policy: OneToken, anchor: Anchor[OneToken], worth: Tensor, key: Key
) -> Iterator[Experience]:
    """What `bond.experiences` would give, without its engine."""
    for step in range(config.steps):
        now = key.fold(step)
        for writer, model, samples in (
            ("policy", policy, config.samples), ("anchor", anchor.model, config.anchor_samples),
        ):  # fmt: skip
            yield written(
                model, worth, now.fold(writer), samples, number=step, version=step, writer=writer
            )


class Pairs(nn.Module):
    """Reads a prompt with its outcome as one of P K signs: a linear map of that knows no bounds."""

    def __init__(self, prompts: int, outcomes: int) -> None:
        super().__init__()
        self.prompts, self.outcomes = prompts, outcomes

    def forward(self, batch: TokenBatch) -> LinearPrediction:
        signs = batch.tokens.clone()
        signs[:, 1] += batch.tokens[:, 0] * self.outcomes
        whole = torch.eye(self.prompts * self.outcomes)
        return LinearPrediction(hidden=whole[signs], head=whole)
