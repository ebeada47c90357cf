"""The server: asks actors for steps, answers whoever is ready in batches, replaces who dies.

Actors hold environments and no network. Each owes the answer to one call at a time; the server
waits until so many environments have arrived, or until a deadline after the first of them, asks the
network once for all, and sends each actor its actions. Nobody waits for the slowest, no observation
is answered twice, and an actor that died takes none but its own environments with it: another one
begins them anew, as another run. It is the same code for actors in this thread, in threads, in
processes and on other hosts.

Source: Espeholt et al. 2020 (SEED RL), arXiv:1910.06591. Differs: their server calls the network
when a fixed number has arrived, and waits for ever where fewer are alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ActorDied, ConfigError, DataError
from cabochon.rl.environment import Arrival, EnvironmentSpec, environments
from cabochon.rl.inference import Inference
from cabochon.rl.unrolls import Unroll
from cabochon.runtime import Actor, Runtime

__all__ = ["ActingConfig", "Server", "ServerCounts"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ActingConfig:
    """Who acts, and how long is waited for whom."""

    actors: int = 4
    environments: int = 4
    """Of each actor, stepped together."""
    inference_batch: int = 0
    """Ask the network when so many environments have arrived; 0: all of them."""
    deadline_ms: float = 5.0
    """Or so many milliseconds after the first of them."""
    patience: float = 60.0
    """Seconds that one step of an actor may take before it counts as hung and is replaced (not with
    `inline`, where nobody can be interrupted)."""
    replacements: int = 3
    """How often in a row the actors of the same environments may die before they completed an
    unroll; once more is an error. Of those that die before their first observation the third is an
    error, however many are allowed."""

    def __post_init__(self) -> None:
        for name in ("actors", "environments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("inference_batch", "deadline_ms", "replacements"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.patience > 0:
            raise ConfigError(f"patience must be above 0 seconds, got {self.patience}")
        if self.inference_batch > self.total:
            raise ConfigError(
                f"inference_batch is {self.inference_batch}, but there are {self.total} "
                "environments; it would never be full"
            )

    @property
    def total(self) -> int:
        """Environments of all actors."""
        return self.actors * self.environments


@dataclass
class ServerCounts:
    """What the server did so far."""

    steps: int = 0
    """Actions that were chosen."""
    batches: int = 0
    partial: int = 0
    """Batches that a deadline sent before they were full."""
    replaced: int = 0
    """Actors that died and were replaced."""


@dataclass
class _Seat:
    """The place of an actor and its successors."""

    actor: Actor
    deaths: int = 0
    """In a row, without an unroll completed."""
    run: int = -1
    awaited: Future[Any] | None = field(default=None, repr=False)


Observe = Callable[[Arrival, Array], None]
"""Is shown every batch that arrived, and the actions that were chosen for it."""


class Server:
    """See the module. One thread at a time uses it."""

    def __init__(
        self,
        runtime: Runtime,
        spec: EnvironmentSpec,
        inference: Inference,
        key: Key,
        config: ActingConfig,
        *,
        runs_from: int = 0,
        observe: Observe | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """Actors are spawned and asked for their first observations, or for `restore`.

        Args:
            runtime: where actors live; its names actor-0, actor-1, ... are this server's.
            spec: the environments.
            inference: answers them.
            key: of the environments' seeds.
            config: how many.
            runs_from: number of the first run; a server that goes on from a checkpoint without
                restoring the actors gives other episodes when it is larger.
            observe: called with everything that happens.
            notice: told, in a sentence, of every actor that is replaced.
        """
        self.runtime, self.inference, self.config = runtime, inference, config
        self.observe, self.notice = observe, notice
        self.counts = ServerCounts()
        self.next_run = runs_from
        self.wanted = config.inference_batch or config.total
        self.ready: SimpleQueue[tuple[int, Future[Any]]] = SimpleQueue()
        self.held: list[tuple[int, Arrival]] = []
        self.arrived: list[tuple[int, Arrival]] = []
        per = config.environments
        self.seats = [
            _Seat(
                runtime.spawn(
                    environments, spec, list(range(i * per, (i + 1) * per)), key,
                    name=f"actor-{i}", patience=config.patience,
                )
            )
            for i in range(config.actors)
        ]  # fmt: skip

    def begin(self) -> None:
        """Every environment begins anew, with what was there before forgotten."""
        self.arrived, self.held = [], []
        for number in range(len(self.seats)):
            self._begin(number)

    def turn(self, timeout: float = 0.1) -> list[Unroll]:
        """Answers who arrived in the last turn, then receives who arrives now.

        So whoever calls this may bring newer weights in between.

        Args:
            timeout: seconds to wait for a first arrival; without one there is nothing to answer.

        Returns:
            The unrolls that were completed by what arrived.

        Raises:
            DataError: the environments of an actor failed again and again; the cause is named.
            NonFinite: the network says something that is not finite.
        """
        self._answer()
        self.arrived = self._gather(timeout)
        if not self.arrived:
            return []
        unrolls = self.inference.receive(Arrival.joined([each for _, each in self.arrived]))
        for unroll in unrolls:
            self.seats[unroll.environment // self.config.environments].deaths = 0
        return unrolls

    def _answer(self) -> None:
        """Those who arrived in the turn before, with the weights as they are now."""
        if not self.arrived:
            return
        arrival = Arrival.joined([each for _, each in self.arrived])
        actions = self.inference.answer(arrival)
        if self.observe is not None:
            self.observe(arrival, actions)
        self.counts.batches += 1
        self.counts.steps += len(actions)
        self.counts.partial += len(actions) < self.wanted
        at = 0
        for number, each in self.arrived:
            self._ask(number, "step", actions[at : at + len(each.ids)])
            at += len(each.ids)
        self.arrived = []

    def state(self) -> dict[str, Array]:
        """Where every environment is, for `restore`. Between two turns of an `inline` runtime.

        Raises:
            ConfigError: an actor is busy; what it will bring cannot be saved.
        """
        self._drain()
        present = self.arrived + self.held
        if len(present) != len(self.seats):
            raise ConfigError("actors are busy: only with --runtime inline can their state be kept")
        saved = {"next_run": np.array([self.next_run])}
        for number, arrival in present:
            seat = self.seats[number]
            history = seat.actor.call("history").result()
            saved |= {f"{number}.history.{name}": value for name, value in history.items()}
            saved |= {f"{number}.arrival.{name}": value for name, value in vars(arrival).items()}
            saved[f"{number}.seat"] = np.array([seat.deaths, seat.run])
        saved["order"] = np.array([number for number, _ in present])
        saved["received"] = np.array([len(self.arrived)])
        return saved

    def restore(self, saved: Mapping[str, Array]) -> int:
        """Brings every environment back to where it was, by doing its episode again.

        Returns:
            How many actors had to begin anew, because their environments, from the same seeds and
            with the same actions, did not come to the same observations.
        """
        self.next_run = int(saved["next_run"][0])
        anew = 0
        for place, number in enumerate(saved["order"].tolist()):
            seat = self.seats[number]
            seat.deaths, seat.run = saved[f"{number}.seat"].tolist()
            arrival = Arrival(**_below(saved, f"{number}.arrival."))
            history = _below(saved, f"{number}.history.")
            if seat.actor.call("restore", history, arrival.observation).result():
                received = place < saved["received"][0]
                (self.arrived if received else self.held).append((number, arrival))
            else:
                anew += 1
                self._begin(number)
        return anew

    def _begin(self, number: int) -> None:
        seat = self.seats[number]
        seat.run = self.next_run
        self.next_run += 1
        self._ask(number, "reset", seat.run)

    def _ask(self, number: int, method: str, argument: Any) -> None:
        seat = self.seats[number]
        seat.awaited = seat.actor.call(method, argument)
        seat.awaited.add_done_callback(lambda future: self.ready.put((number, future)))

    def _gather(self, timeout: float) -> list[tuple[int, Arrival]]:
        """Those who are answered next, in the order of their actors."""
        self._drain()
        if not self.held:
            self._receive(timeout)
        deadline = time.monotonic() + self.config.deadline_ms / 1000
        while self._arrived() < self.wanted and self.held:
            left = deadline - time.monotonic()
            if left <= 0 or not self._receive(left):
                break
        taken, rows = 0, 0
        while taken < len(self.held) and rows < self.wanted:
            rows += len(self.held[taken][1].ids)
            taken += 1
        arrived, self.held = self.held[:taken], self.held[taken:]
        return sorted(arrived, key=lambda pair: pair[0])

    def _arrived(self) -> int:
        return sum(len(arrival.ids) for _, arrival in self.held)

    def _drain(self) -> None:
        while not self.ready.empty():
            self._receive(0.0)

    def _receive(self, timeout: float) -> bool:
        """One answer, if there is one in time: an arrival, or the news of a death."""
        try:
            number, future = self.ready.get(timeout=max(0.0, timeout))
        except Empty:
            return False
        seat = self.seats[number]
        if future is not seat.awaited:
            return True  # of an actor that was given up before it answered
        error = future.exception()
        if error is None:
            self.held.append((number, future.result()))
        elif isinstance(error, ActorDied):
            self._replace(number, error)
        else:
            raise error
        return True

    def _replace(self, number: int, error: ActorDied) -> None:
        seat = self.seats[number]
        seat.deaths += 1
        if seat.deaths > self.config.replacements:
            raise _given_up(error, seat.deaths) from error
        try:
            seat.actor = self.runtime.replace(seat.actor)
        except ActorDied:  # none of its kind came as far as an observation
            raise _given_up(error, seat.deaths) from error
        if self.notice is not None:
            self.notice(f"{error}; another one begins its environments anew")
        self.counts.replaced += 1
        self._begin(number)


def _given_up(error: ActorDied, deaths: int) -> Exception:
    """What is raised when there is no use in another actor: of the kind of what it died of."""
    again = f" {deaths} times in a row" if deaths > 1 else ""
    cause = error.__cause__
    kind = type(cause) if isinstance(cause, DataError | ArithmeticError) else DataError
    return kind(f"{error.actor} died{again}, the last time so: {error.cause}")


def _below(saved: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
