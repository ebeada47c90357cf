"""The runtime that all hosts share: names, replacements, patience, and an orderly end."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from cabochon.core.errors import ActorDied, Closed, ConfigError
from cabochon.runtime.actors import Body, Handle, Ledger, Recipe
from cabochon.runtime.protocols import Actor, Publisher, Queue, Stale

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FRUITLESS", "Crew", "Host"]

FRUITLESS = 3
"""So many actors in a row that die before they answered a call: the next one would, too."""


class Host(Protocol):
    """What differs from one runtime to the next."""

    def start(self, recipe: Recipe, ledger: Ledger, /) -> Body:
        """Begin to make an actor."""
        ...

    def publisher(self, tensors: Mapping[str, Tensor], /) -> Publisher: ...

    def queue(self, capacity: int, max_lag: int | None, stale: Stale, takes: int, /) -> Queue: ...

    def close(self) -> None:
        """Nothing is left of it; every actor has ended before."""
        ...


class Crew:
    """A `Runtime` on a host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._actors: dict[str, Handle] = {}
        self._queues: list[Queue] = []
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        # A program that forgets to close still ends its actors.
        self._at_exit = _closing(weakref.ref(self))
        atexit.register(self._at_exit)

    def spawn(
        self,
        factory: Callable[..., Any],
        /,
        *arguments: Any,
        name: str,
        patience: float | None = None,
        megabytes: float = 0.0,
    ) -> Actor:
        """As the protocol says."""
        if patience is not None and not patience > 0:
            raise ConfigError(f"patience must be above 0 seconds, or None; got {patience}")
        recipe = Recipe(
            factory=factory,
            arguments=arguments,
            name=name,
            patience=patience,
            megabytes=megabytes,
        )
        return self._enlist(recipe)

    def replace(self, actor: Actor, /) -> Actor:
        """As the protocol says."""
        if not isinstance(actor, Handle):
            raise ConfigError(f"{actor!r} is no actor of a runtime")
        actor.kill("was replaced")
        old = actor.recipe
        barren = 0 if actor.ledger.answered else old.barren + 1
        if barren >= FRUITLESS:
            raise ActorDied(
                actor.name,
                f"{FRUITLESS} in a row died before they had answered a call, the last one so: "
                f"{actor.death}",
            )
        return self._enlist(replace(old, generation=old.generation + 1, barren=barren))

    def publisher(self, tensors: Mapping[str, Tensor], /) -> Publisher:
        """As the protocol says."""
        self._check_open()
        return self._host.publisher(tensors)

    def queue(
        self,
        capacity: int,
        /,
        *,
        max_lag: int | None = None,
        stale: Stale = "drop",
        takes: int = 1,
    ) -> Queue:
        """As the protocol says."""
        self._check_open()
        queue = self._host.queue(capacity, max_lag, stale, takes)
        self._queues.append(queue)
        return queue

    def close(self, grace: float = 5.0) -> tuple[str, ...]:
        """As the protocol says."""
        with self._lock:
            if self._closed.is_set():
                return ()
            self._closed.set()
            actors = list(self._actors.values())
        atexit.unregister(self._at_exit)
        for queue in self._queues:
            queue.close()
        for actor in actors:
            actor.body.stop()
        deadline = time.monotonic() + grace
        late = []
        for actor in actors:
            if not actor.body.join(max(0.0, deadline - time.monotonic())):
                late.append(actor.name)
                actor.kill(f"the runtime closed and it went on for {grace:g} s")
            actor.ledger.die("the runtime was closed")
        if self._watcher is not None:
            self._watcher.join()
        self._host.close()
        return tuple(late)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.close()

    def _enlist(self, recipe: Recipe) -> Handle:
        with self._lock:
            self._check_open()
            there = self._actors.get(recipe.name)
            if there is not None and there.death is None:
                raise ConfigError(f"there is an actor {recipe.name} already; names differ")
            actor = Handle(recipe, self._host.start)
            self._actors[recipe.name] = actor
            if recipe.patience is not None and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="patience", daemon=True)
                self._watcher.start()
        return actor

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Closed("the runtime is closed")

    def _watch(self) -> None:
        """Kill who keeps others waiting for longer than it was given."""
        pause = 0.01
        while not self._closed.wait(pause):
            with self._lock:
                actors = list(self._actors.values())
            limits = [(actor, actor.recipe.patience) for actor in actors if actor.death is None]
            for actor, patience in limits:
                if patience is not None and (late := actor.ledger.overdue(patience)):
                    actor.kill(late)
            shortest = min((limit for _, limit in limits if limit is not None), default=1.0)
            pause = min(0.5, max(0.01, shortest / 10))


def _closing(crew: weakref.ref[Crew]) -> Callable[[], None]:
    def close() -> None:
        there = crew()
        if there is not None:
            there.close(grace=0.0)

    return close
