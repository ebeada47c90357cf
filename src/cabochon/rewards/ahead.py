"""Experience drawn ahead: a writer of its own goes on while the learner learns.

    with Ahead(policy, experiences, lag=2, total=400) as source:
        for step in rlhf.train(config, policy, ..., source=source): ...

The writer is an actor with a copy of the policy, which it brings up to date before each micro-batch
by what the learner published last. It is asked for the micro-batches of at most `lag` steps beyond
the one that is due, so no token is older than that: what the learner gets for step s was written by
the weights of step s - lag or later, and says by which. Those are not the learner's own: learn from
it with importance ratios. At lag 0 the writer is asked when it is needed and has the learner's very
weights: what is drawn is, to the bit, what the learner would have drawn itself.

Weights change between two micro-batches, never within a completion: all tokens of one have one
version.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import nn

from cabochon.core import Backbone
from cabochon.core.errors import ActorDied, ConfigError
from cabochon.rewards.experience import Experience
from cabochon.runtime import Actor, Subscriber, threads
from cabochon.training import parallel

__all__ = ["Ahead", "Draw"]

Draw = Callable[[Backbone], Iterator[Experience]]
"""From the model that writes to its experiences, each drawn when it is asked for."""


class Ahead:
    """An iterator of experiences; leaving its `with` block ends the writer."""

    def __init__(
        self,
        policy: nn.Module,
        draw: Draw,
        *,
        lag: int,
        total: int,
        start: int = 0,
        accumulate: int = 1,
        updates: int = 1,
    ) -> None:
        """The writer has a copy of the policy, and has not begun.

        Args:
            policy: learns between two micro-batches that are due; its weights are read then.
            draw: called once, with the writer's copy; its first experience is micro-batch `start`.
            lag: so many steps are drawn ahead at most.
            total: micro-batches of the run; none is drawn that nobody would learn from.
            start: the first micro-batch, at the beginning of a step.
            accumulate: micro-batches of a step.
            updates: of the weights in a step; versions count them.

        Raises:
            ConfigError: a negative lag, or several ranks: each holds a part of the weights only.
        """
        if lag < 0:
            raise ConfigError(f"lag must be 0 or more steps, got {lag}")
        if parallel.ranks() > 1:
            raise ConfigError("with several ranks nobody has whole weights to draw ahead with")
        self._policy, self._lag, self._total = policy, lag, total
        self._accumulate, self._updates = accumulate, updates
        self._due = self._asked = start
        self._calls: deque[Future[Experience]] = deque()
        self._runtime = threads()
        self._publisher = self._runtime.publisher(policy.state_dict())
        model = copy.deepcopy(policy).eval().requires_grad_(False)
        self._writer: Actor = self._runtime.spawn(
            _Writer, model, draw, self._publisher.subscriber(), torch.get_num_threads(),
            name="writer",
        )  # fmt: skip

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Experience:
        """The micro-batch that is due; the learner has made all updates before its step.

        Raises:
            DataError, NonFinite: what the writer or the reward failed with.
        """
        if self._due >= self._total:
            raise StopIteration
        step = self._due // self._accumulate
        if step > self._publisher.version:
            self._publisher.publish(self._policy.state_dict(), step)
        while self._asked < min(self._total, (step + self._lag + 1) * self._accumulate):
            self._calls.append(self._writer.call("write"))
            self._asked += 1
        try:
            experience = self._calls.popleft().result()
        except ActorDied as died:
            raise (died.__cause__ or died) from died
        if experience.number != self._due:
            raise ConfigError(
                f"micro-batch {experience.number} was drawn where {self._due} was due; draw and "
                "start do not belong together"
            )
        self._due += 1
        return replace(experience, version=experience.version * self._updates)

    def close(self) -> None:
        """What is being drawn is drawn to its end; the rest is forgotten."""
        if self._writer.death is None:
            self._writer.kill("nobody learns any more")
        self._runtime.close(grace=60.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Writer:
    """The actor."""

    def __init__(self, model: nn.Module, draw: Draw, weights: Subscriber, threads: int) -> None:
        torch.set_num_threads(threads)  # every thread has a number of its own
        self._model, self._weights = model, weights
        self._experiences = draw(cast(Backbone, model))
        self._version = -1

    def write(self) -> Experience:
        version, weights = self._weights.newest()
        if version != self._version:
            self._model.load_state_dict(cast("dict[str, Any]", weights))
            self._version = version
        return replace(next(self._experiences), version=version)
