"""A policy of at most two tokens, so few that every expectation is a sum over all it can write.

Tokens 0 (ends a completion), 1, 2 and 3; a prompt is one token. What comes next depends on the
place and on the newest token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from cabochon.core import Completion, Group, Key, LinearPrediction, TokenBatch
from cabochon.rewards.experience import Experience
from cabochon.rewards.scores import Scores

EOS, VOCABULARY, LENGTH = 0, 4, 2
WRITTEN = [(EOS,), *((a, b) for a in range(1, VOCABULARY) for b in range(VOCABULARY))]
"""Every completion there is."""


class Memory:
    """What a row's place is; the newest token comes with the batch."""

    capacity = 8

    def select(self, rows: Tensor) -> Memory:
        return self

    def put(self, rows: Tensor, other: Memory, sources: Tensor) -> None:
        pass

    def rewind(self, lengths: Sequence[int]) -> None:
        pass


class Table(nn.Module):
    """Free logits for every place and newest token."""

    context = 1 + LENGTH

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        draw = Key(seed).fold("table").generator()
        start = scale * torch.randn(1 + LENGTH, VOCABULARY, VOCABULARY, generator=draw)
        self.logits = nn.Parameter(start)

    def forward(self, batch: TokenBatch, cache: object = None) -> LinearPrediction:
        places = batch.positions.clamp(0, LENGTH)
        hidden = self.logits[places, batch.tokens.clamp(0, VOCABULARY - 1)]
        return LinearPrediction(hidden=hidden, head=torch.eye(VOCABULARY))

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Memory:
        return Memory()

    def logprobs(self, prompt: int) -> list[Tensor]:
        """For each of `WRITTEN` the log-probability of each token; carries gradients."""
        found = []
        for tokens in WRITTEN:
            states = enumerate((prompt, *tokens[:-1]))
            laws = [self.logits[place, newest].log_softmax(-1) for place, newest in states]
            found.append(torch.stack([law[t] for law, t in zip(laws, tokens, strict=True)]))
        return found

    def law(self, prompt: int) -> Tensor:
        """Log-probability of each of `WRITTEN`."""
        return torch.stack([each.sum() for each in self.logprobs(prompt)])


@cache
def prize(prompt: int) -> Tensor:
    """Some reward for each of `WRITTEN`, far from 0 in the mean."""
    draw = Key(7).fold("prize", prompt).generator()
    return 3.0 + torch.randn(len(WRITTEN), generator=draw)


def judge(groups: Sequence[Group]) -> Tensor:
    """The reward as a sampler's groups meet it."""
    return torch.tensor(
        [
            [float(prize(int(g.prompt[0]))[WRITTEN.index(tuple(c.tokens.tolist()))])
             for c in g.completions]
            for g in groups
        ]
    )  # fmt: skip


def every_experience(
    drawer: Table, prompts: Sequence[int], samples: int
) -> list[tuple[float, Experience]]:
    """Everything that could be drawn for these prompts, with its probability."""
    laws = {prompt: [each.detach() for each in drawer.logprobs(prompt)] for prompt in prompts}
    slots = [prompt for prompt in prompts for _ in range(samples)]
    found = []
    for chosen in itertools.product(range(len(WRITTEN)), repeat=len(slots)):
        log_p = sum(
            float(laws[prompt][place].sum()) for prompt, place in zip(slots, chosen, strict=True)
        )
        groups = []
        for number, prompt in enumerate(prompts):
            places = chosen[number * samples : (number + 1) * samples]
            completions = tuple(
                Completion(
                    tokens=torch.tensor(WRITTEN[place]),
                    logprob=laws[prompt][place],
                    model_logprob=laws[prompt][place],
                    stopped=WRITTEN[place][-1] == EOS,
                )
                for place in places
            )
            groups.append(Group(prompt=torch.tensor([prompt]), completions=completions))
        experience = Experience(
            number=0, groups=tuple(groups), scores=Scores(total=judge(groups)), version=0
        )
        found.append((float(torch.tensor(log_p).exp()), experience))
    return found


def gradient_of(value: Tensor, model: nn.Module) -> Tensor:
    (found,) = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return found


def objective_gradient(
    policy: Table, anchor: Table, prompts: Sequence[int], price: float,
    reward: Callable[[int], Tensor] = prize,
) -> Tensor:  # fmt: skip
    """Of E[reward] - price KL(policy || anchor), the mean over prompts, by enumeration."""
    total = torch.zeros(())
    for prompt in prompts:
        law, held = policy.law(prompt), anchor.law(prompt).detach()
        total = total + (law.exp() * (reward(prompt) - price * (law - held))).sum()
    return gradient_of(total / len(prompts), policy)
