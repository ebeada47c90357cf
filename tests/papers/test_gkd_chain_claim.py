"""GKD on a chain: what a student never sees in the fixed data, it learns from its own mistakes.

One token of eight is right at each of 24 steps; a wrong one derails, and from a derailed state only
one token, which the teacher knows, leads back. The fixed data are perfect paths, so nothing in them
ever is derailed. The student is a linear softmax whose eight random features cannot tell all 24
places apart: it errs, and what becomes of it depends on whether it has learned to recover.

Run as a program with a number of seeds, this file prints the table of docs/papers/gkd.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cabochon.algorithms import gkd
from cabochon.core import Key, LinearPrediction, TokenBatch
from cabochon.losses import f_divergences

LENGTH, VOCABULARY, DERAILED, EPSILON = 24, 8, 2, 0.02
RESET = VOCABULARY - 1
BATCH, SFT_STEPS, STEPS = 16, 40, 200
LEARNING_RATE = 0.07
Divergence = tuple[str, float | None]
DIVERGENCES: tuple[Divergence, ...] = (("forward_kl", None), ("jsd", 0.5), ("reverse_kl", None))


def right_tokens() -> Tensor:
    """T: the right token of each step; the reset token is never one."""
    return torch.randint(0, RESET, (LENGTH,), generator=Key(0).fold("chain").generator())


RIGHT = right_tokens()


def following(state: Tensor, token: Tensor, step: Tensor) -> Tensor:
    """The state after a token: 0 is on track, 1 and up are derailed."""
    on_track = state == 0
    right = torch.where(on_track, token == RIGHT[step.clamp(max=LENGTH - 1)], token == RESET)
    return torch.where(right, 0, 1 + token % DERAILED)


class Memory:
    """The state of each row after what it has read."""

    def __init__(self, rows: int) -> None:
        self.capacity = LENGTH + 1
        self.state = torch.zeros(rows, dtype=torch.int64)

    def select(self, rows: Tensor) -> Memory:
        found = Memory(len(rows))
        found.state = self.state[rows].clone()
        return found

    def put(self, rows: Tensor, other: Memory, sources: Tensor) -> None:
        grown = torch.zeros(max(len(self.state), int(rows.max()) + 1), dtype=torch.int64)
        grown[: len(self.state)] = self.state
        grown[rows] = other.state[sources]
        self.state = grown


class Chain(nn.Module):
    """A policy that sees features of the state: linear logits."""

    context = LENGTH + 1

    def __init__(self, features: Tensor, head: Tensor) -> None:
        """A policy of the chain.

        Args:
            features: T + derailed states, D.
            head: V D.
        """
        super().__init__()
        self.features = features
        self.head = nn.Parameter(head)

    def forward(self, batch: TokenBatch, memory: Memory | None = None) -> LinearPrediction:
        state = torch.zeros(batch.shape[0], dtype=torch.int64) if memory is None else memory.state
        states = []
        for column in range(batch.shape[1]):
            step = batch.positions[:, column] - 1  # the first token is the prompt
            after = following(state, batch.tokens[:, column], step)
            state = torch.where(step < 0, 0, after)
            states.append(state)
        if memory is not None:
            memory.state = state
        place = torch.stack(states, dim=1)
        index = torch.where(place == 0, batch.positions.clamp(max=LENGTH - 1), LENGTH + place - 1)
        return LinearPrediction(hidden=self.features[index], head=self.head)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Memory:
        return Memory(rows)

    def laws(self) -> Tensor:
        """T + derailed, V: the log-probabilities in every state."""
        return (self.features @ self.head.detach().T).log_softmax(-1)


def teacher() -> Chain:
    """Right on track, and knows the way back, but for EPSILON."""
    law = torch.full((LENGTH + DERAILED, VOCABULARY), EPSILON / (VOCABULARY - 1))
    law[torch.arange(LENGTH), RIGHT] = 1.0 - EPSILON
    law[LENGTH:, RESET] = 1.0 - EPSILON
    return Chain(torch.eye(LENGTH + DERAILED), law.log().T.contiguous()).requires_grad_(False)


def student(features: int, seed: int) -> Chain:
    """Random features of the places on track, an indicator of each derailed state."""
    table = torch.zeros(LENGTH + DERAILED, features + DERAILED)
    drawn = torch.randn(LENGTH, features, generator=Key(seed).fold("features").generator())
    table[:LENGTH, :features] = drawn
    table[LENGTH:, features:] = torch.eye(DERAILED)
    return Chain(table, torch.zeros(VOCABULARY, features + DERAILED))


def perfect_paths() -> Iterator[TokenBatch]:
    path = torch.cat([torch.zeros(1, dtype=torch.int64), RIGHT])
    return repeat(TokenBatch.of([path] * BATCH))


def learned(model: Chain, **settings: Any) -> Chain:
    config = gkd.Config(max_new_tokens=LENGTH, schedule="constant", warmup=0, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    teaching = None if config.learns_text else teacher()
    steps = gkd.train(
        config, model, perfect_paths(), optimizer, key=Key(1), stop_ids=(), teacher=teaching
    )
    for _ in steps:
        pass
    return model


@dataclass(frozen=True)
class Found:
    """What a student does, computed exactly from its distributions."""

    on_track: float
    """Share of the steps of its own samples that begin on track."""
    recovers: float
    """Probability of the reset token, mean over derailed states."""
    teacher_path: float
    """Nats: forward KL summed along the teacher's own sequences."""
    own_path: float
    """Nats: along its own samples."""
    offline: float
    """The divergence that was learned, summed along the fixed data."""


def judged(model: Chain, divergence: Divergence = ("forward_kl", None)) -> Found:
    guide = teacher().laws()
    own = model.laws()
    kl = (guide.exp() * (guide - own)).sum(-1)
    learned = f_divergences.divergence(f_divergences.named(*divergence), guide, own)
    mine, theirs = visits(own), visits(guide)
    return Found(
        on_track=float(mine[:LENGTH].sum() / LENGTH),
        recovers=float(own[LENGTH:, RESET].exp().mean()),
        teacher_path=float((theirs * kl).sum()),
        own_path=float((mine * kl).sum()),
        offline=float(learned[:LENGTH].sum()),
    )


def visits(law: Tensor) -> Tensor:
    """T + derailed: how often, in expectation, a sample of this law is in each state."""
    prob = law.exp()
    now = torch.zeros(1 + DERAILED)
    now[0] = 1.0
    visited = torch.zeros(LENGTH + DERAILED)
    for step in range(LENGTH):
        visited[step] += now[0]
        visited[LENGTH:] += now[1:]
        after = torch.zeros_like(now)
        for state in range(1 + DERAILED):
            row = prob[step] if state == 0 else prob[LENGTH + state - 1]
            tokens = torch.arange(VOCABULARY)
            to = following(torch.full_like(tokens, state), tokens, torch.full_like(tokens, step))
            after.index_add_(0, to, now[state] * row)
        now = after
    return visited


def begun(features: int, seed: int) -> Chain:
    return learned(student(features, seed), preset="sft", steps=SFT_STEPS)


def longer(features: int, seed: int) -> Chain:
    return learned(begun(features, seed), preset="sft", steps=STEPS)


def distilled(features: int, seed: int, divergence: Divergence, fraction: float) -> Found:
    name, parameter = divergence
    model = learned(
        begun(features, seed), steps=STEPS, on_policy_fraction=fraction, divergence=name,
        divergence_parameter=parameter,
    )  # fmt: skip
    return judged(model, divergence)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, str, float], Found]:
    """By features, divergence and lambda."""
    wanted = [(8, divergence) for divergence in DIVERGENCES] + [(12, DIVERGENCES[0])]
    return {
        (features, divergence[0], fraction): distilled(features, 0, divergence, fraction)
        for features, divergence in wanted
        for fraction in (0.0, 1.0)
    }


@pytest.mark.claim
@pytest.mark.parametrize("name", [name for name, _ in DIVERGENCES])
def test_learning_from_own_mistakes_keeps_the_student_on_track(
    runs: dict[tuple[int, str, float], Found], name: str
) -> None:
    offline, own = runs[8, name, 0.0], runs[8, name, 1.0]
    assert own.on_track > offline.on_track + 0.1
    assert own.recovers > 0.9
    assert offline.recovers == pytest.approx(1 / VOCABULARY, abs=1e-6)  # it never was derailed


@pytest.mark.claim
@pytest.mark.parametrize("name", [name for name, _ in DIVERGENCES])
def test_the_gain_does_not_show_in_the_loss_on_the_fixed_data(
    runs: dict[tuple[int, str, float], Found], name: str
) -> None:
    assert runs[8, name, 1.0].offline > runs[8, name, 0.0].offline - 0.01


@pytest.mark.claim
def test_a_student_that_errs_less_gains_less(runs: dict[tuple[int, str, float], Found]) -> None:
    small, large = (
        runs[features, "forward_kl", 1.0].on_track - runs[features, "forward_kl", 0.0].on_track
        for features in (8, 12)
    )
    assert 0.0 < large < 0.7 * small


@pytest.mark.claim
def test_a_student_too_small_does_better_with_a_mode_seeking_divergence(
    runs: dict[tuple[int, str, float], Found],
) -> None:
    covering = runs[8, "forward_kl", 1.0].on_track
    assert runs[8, "jsd", 1.0].on_track > covering + 0.02
    assert runs[8, "reverse_kl", 1.0].on_track > covering + 0.02


def main(seeds: Sequence[int]) -> None:
    """Means and standard deviations over seeds."""

    def show(title: str, found: Sequence[Found]) -> None:
        columns = [
            (name, torch.tensor([getattr(each, name) for each in found])) for name in vars(found[0])
        ]
        cells = [f"{name} {x.mean():.3f} ({x.std():.3f})" for name, x in columns]
        sys.stdout.write(" | ".join([title, *cells]) + "\n")
        sys.stdout.flush()

    for features in (8, 12):
        show(f"{features} sft", [judged(begun(features, seed)) for seed in seeds])
        show(f"{features} sft longer", [judged(longer(features, seed)) for seed in seeds])
        for divergence in DIVERGENCES:
            for fraction in (0.0, 0.25, 1.0):
                found = [distilled(features, seed, divergence, fraction) for seed in seeds]
                show(f"{features} {divergence[0]} lambda {fraction}", found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(range(int(sys.argv[1])))
