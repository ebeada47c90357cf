"""Actors in threads of this process: the default. Records are handed over, nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cabochon.core.errors import Closed
from cabochon.runtime.actors import Ledger, Recipe, cause_of
from cabochon.runtime.crew import Crew
from cabochon.runtime.protocols import Queue, Runtime, Stale
from cabochon.runtime.publishing import Snapshots
from cabochon.runtime.queues import BoundedQueue

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["threads"]

_here = threading.local()
"""The ledger of the actor that a thread is."""


def threads() -> Runtime:
    """A runtime of threads: light, and enough wherever the work releases Python's lock.

    Environments in C++, torch, and waiting do; for work in Python itself take `processes`.
    """
    return Crew(_Threads())


class _Threads:
    def start(self, recipe: Recipe, ledger: Ledger) -> _Thread:
        return _Thread(recipe, ledger)

    def publisher(self, tensors: Mapping[str, Tensor]) -> Snapshots:
        return Snapshots(tensors)

    def queue(self, capacity: int, max_lag: int | None, stale: Stale, takes: int) -> Queue:
        return BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes, admit=_admit)

    def close(self) -> None:
        pass


class _Thread:
    def __init__(self, recipe: Recipe, ledger: Ledger) -> None:
        self._ledger = ledger
        self._inbox: SimpleQueue[tuple[int, str, tuple[Any, ...], Any] | None] = SimpleQueue()
        # A daemon: one that hangs must not keep the program from ending.
        self._thread = threading.Thread(
            target=self._live, args=(recipe,), name=recipe.name, daemon=True
        )
        self._thread.start()

    def post(self, number: int, method: str, arguments: tuple[Any, ...], named: Any) -> None:
        self._inbox.put((number, method, arguments, named))

    def stop(self) -> None:
        self._inbox.put(None)

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def kill(self) -> None:
        self._inbox.put(None)

    def _live(self, recipe: Recipe) -> None:
        _here.ledger = self._ledger
        try:
            thing = recipe.factory(*recipe.arguments)
            self._ledger.made()
            while (letter := self._inbox.get()) is not None and self._ledger.death is None:
                number, method, arguments, named = letter
                self._ledger.answer(number, getattr(thing, method)(*arguments, **named))
            if hasattr(thing, "close"):
                thing.close()
        except BaseException as error:  # whatever ended it, SystemExit too, its callers hear of it
            self._ledger.die(cause_of(error), error)


def _admit() -> None:
    """A thread goes on when its actor was killed; it ends where it next asks for a queue."""
    ledger = getattr(_here, "ledger", None)
    if ledger is not None and ledger.death is not None:
        raise Closed(f"actor {ledger.name} is dead: {ledger.death}")
