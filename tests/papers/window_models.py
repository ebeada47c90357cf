"""A world small enough for teacher hacking in seconds: language models that see four tokens.

The oracle is a random network; teacher and student learn a little of what it writes; the student
is distilled from the teacher in each regime, and both distances are measured on held-out prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cabochon.algorithms.pretrain import distillation_objective, objective
from cabochon.core import Completion, Group, Key, LinearPrediction, TokenBatch
from cabochon.evaluation.distances import Distance, sequence_kl
from cabochon.training.fit import finish, fit
from cabochon.training.optimizers import OptimizerConfig, adamw
from cabochon.training.schedules import Kind, scheduled

V, SEEN, PROMPT, RESPONSE = 24, 4, 4, 8
ROWS = 64
REGIMES = ("offline", "diverse", "more_prompts", "online_teacher", "online_student")


@dataclass(frozen=True, kw_only=True)
class World:
    """What may be changed of it."""

    prompts: int = 200
    """M, of the distillation."""
    responses: int = 8
    """k, of `diverse`; `more_prompts` has k M prompts."""
    steps: int = 800
    """Updates of each distillation."""
    learning_rate: float = 3e-3
    schedule: Kind = "constant"
    oracle_width: int = 64
    teacher_width: int = 64
    student_width: int = 256
    sharpness: float = 4.0
    """Of the oracle's logits."""
    teach: int = 3000
    begin: int = 400
    """Updates of teacher and student on the oracle's responses."""
    sequences: int = 20_000
    """The oracle's, that they learn from."""
    held_out: int = 400
    points: int = 18


class WindowModel(nn.Module):
    """A policy that sees the last four tokens through one hidden layer."""

    def __init__(self, width: int, key: Key, sharpness: float = 0.1) -> None:
        super().__init__()
        stream = key.generator()

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=stream) * scale)

        self.embed = drawn(V + 1, 16, scale=1.0)
        """The last row stands for what is before the beginning."""
        self.inner = drawn(width, SEEN * 16, scale=(SEEN * 16) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.head = drawn(V, width, scale=sharpness * width**-0.5)

    def hidden(self, seen: Tensor) -> Tensor:
        """... width, from ... 4 tokens."""
        mixed = nn.functional.linear(self.embed[seen].flatten(-2), self.inner, self.bias)
        return torch.tanh(mixed)

    def forward(self, batch: TokenBatch) -> LinearPrediction:
        before = nn.functional.pad(batch.tokens, (SEEN - 1, 0), value=V)
        return LinearPrediction(hidden=self.hidden(before.unfold(1, SEEN, 1)), head=self.head)

    @torch.no_grad()
    def write(self, prompts: Tensor, stream: torch.Generator) -> Tensor:
        """n PROMPT + RESPONSE: the prompts with a response each."""
        written = prompts
        for _ in range(RESPONSE):
            prob = (self.hidden(written[:, -SEEN:]) @ self.head.T).softmax(-1)
            written = torch.cat([written, torch.multinomial(prob, 1, generator=stream)], 1)
        return written


def rows_of(written: Tensor) -> TokenBatch:
    """Whole sequences as rows whose responses count."""
    rows, length = written.shape
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, PROMPT - 1 : -1] = True
    return TokenBatch(
        tokens=written,
        positions=torch.arange(length).expand(rows, length),
        documents=torch.zeros(rows, length, dtype=torch.int64),
        targets=written.roll(-1, 1),
        mask=mask,
    )


def groups_of(written: Tensor) -> list[Group]:
    zeros = torch.zeros(RESPONSE)
    return [
        Group(
            prompt=row[:PROMPT],
            completions=(
                Completion(tokens=row[PROMPT:], logprob=zeros, model_logprob=zeros, stopped=False),
            ),
        )
        for row in written
    ]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Both distances of one student."""

    steps: list[int]
    proxy: list[Distance]
    golden: list[Distance]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One seed's experiment."""

    teacher: Distance
    """Of the teacher to the oracle."""
    start: Distance
    """Of the student to the oracle as it began."""
    curves: dict[str, Curves]


def experiment(seed: int, world: World | None = None, regimes: Sequence[str] = REGIMES) -> Outcome:
    """The curves of every regime, with one seed."""
    world = world or World()
    key = Key(seed)
    oracle = WindowModel(world.oracle_width, key.fold("oracle"), world.sharpness)
    teacher = WindowModel(world.teacher_width, key.fold("teacher"))
    student = WindowModel(world.student_width, key.fold("student"))
    truth = oracle.write(prompts_of(key.fold("truth"), world.sequences), stream(key, "truth"))
    for name, model, steps in (
        ("teacher", teacher, world.teach),
        ("student", student, world.begin),
    ):
        learn(model, objective, some_of(truth, key.fold(name, "batches")), steps, 2e-3, "cosine")
    held_out = prompts_of(key.fold("held out"), world.held_out)
    from_oracle = groups_of(oracle.write(held_out, stream(key, "held out oracle")))
    from_teacher = groups_of(teacher.write(held_out, stream(key, "held out teacher")))
    few = prompts_of(key.fold("prompts"), world.prompts)
    many = torch.cat([few, prompts_of(key.fold("more"), world.prompts * (world.responses - 1))])
    draws = teacher.write(few.repeat(world.responses, 1), stream(key, "draws"))
    curves = {}
    for regime in regimes:
        model = copy.deepcopy(student)
        order = key.fold("order")
        fixed = {
            "offline": draws[: world.prompts],
            "diverse": draws,
            "more_prompts": teacher.write(many, stream(key, "many")),
        }
        if regime in fixed:
            batches = some_of(fixed[regime], order)
        else:
            writer = teacher if regime == "online_teacher" else model
            batches = fresh(writer, few, order)
        curves[regime] = measured(model, oracle, teacher, from_oracle, from_teacher, batches, world)
    return Outcome(
        teacher=sequence_kl(oracle, teacher, from_oracle, rows=len(held_out)),
        start=sequence_kl(oracle, student, from_oracle, rows=len(held_out)),
        curves=curves,
    )


def measured(
    model: WindowModel,
    oracle: WindowModel,
    teacher: WindowModel,
    from_oracle: list[Group],
    from_teacher: list[Group],
    batches: Iterator[TokenBatch],
    world: World,
) -> Curves:
    """Distils `model` and measures it at moments that are even in log step."""
    at = {round(each) for each in np.geomspace(world.steps / 100, world.steps, world.points)}
    found = Curves(steps=[], proxy=[], golden=[])
    optimizer = adamw(model, OptimizerConfig(learning_rate=world.learning_rate, weight_decay=0.0))
    schedule = scheduled(world.schedule, total=world.steps, warmup=world.steps // 50)
    steps = fit(model, distillation_objective(teacher), batches, optimizer, schedule=schedule)
    for step in islice(steps, world.steps):
        if step.index + 1 in at:
            found.steps.append(step.index + 1)
            rows = len(from_oracle)
            found.proxy.append(sequence_kl(teacher, model, from_teacher, rows=rows))
            found.golden.append(sequence_kl(oracle, model, from_oracle, rows=rows))
    return found


def learn(
    model: WindowModel,
    minimise: Callable[[Any, TokenBatch], Any],
    batches: Iterator[TokenBatch],
    steps: int,
    learning_rate: float,
    schedule: Kind,
) -> None:
    optimizer = adamw(model, OptimizerConfig(learning_rate=learning_rate, weight_decay=0.0))
    decay = scheduled(schedule, total=steps)
    finish(islice(fit(model, minimise, batches, optimizer, schedule=decay), steps))


def some_of(written: Tensor, key: Key) -> Iterator[TokenBatch]:
    drawn = key.generator()
    while True:
        yield rows_of(written[torch.randint(len(written), (ROWS,), generator=drawn)])


def fresh(writer: WindowModel, prompts: Tensor, key: Key) -> Iterator[TokenBatch]:
    drawn = key.generator()
    while True:
        chosen = torch.randint(len(prompts), (ROWS,), generator=drawn)
        yield rows_of(writer.write(prompts[chosen], drawn))


def prompts_of(key: Key, count: int) -> Tensor:
    return torch.randint(V, (count, PROMPT), generator=key.generator())


def stream(key: Key, name: str) -> torch.Generator:
    return key.fold("stream", name).generator()
