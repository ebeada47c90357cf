"""What every runtime does alike for an actor: who is owed an answer, and what it died of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from cabochon.core.errors import ActorDied, CabochonError

__all__ = ["STARTUP_S", "Body", "Handle", "Ledger", "Recipe", "cause_of"]

STARTUP_S = 60.0
"""Seconds that making an actor may take beyond its patience: a process imports its libraries."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an actor is made, and how often it was made in vain."""

    factory: Callable[..., Any]
    arguments: tuple[Any, ...]
    name: str
    patience: float | None
    megabytes: float
    generation: int = 0
    barren: int = 0
    """How many before it, in a row, died before they had answered a call."""


class Body(Protocol):
    """The part of an actor that a runtime knows how to run; it tells the ledger what comes."""

    def post(self, number: int, method: str, arguments: tuple[Any, ...], named: Any, /) -> None:
        """Ask for a method; an answer has this number."""
        ...

    def stop(self) -> None:
        """Ask it to end when it has done what it was asked for."""
        ...

    def join(self, timeout: float, /) -> bool:
        """Wait for its end; False if it goes on."""
        ...

    def kill(self) -> None:
        """End it now, as far as that can be done."""
        ...


class Ledger:
    """The calls of one actor that are not answered yet. Each is answered once, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.death: str | None = None
        self.answered = 0
        self._lock = threading.Lock()
        self._owed: dict[int, tuple[Future[Any], str]] = {}
        self._entered = 0
        self._made = False
        self._since = time.monotonic()

    def enter(self, method: str) -> tuple[int, Future[Any]] | Future[Any]:
        """A number and a future for one more call; of a dead actor, a future that failed."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what was asked for cannot be withdrawn
        with self._lock:
            if self.death is None:
                if not self._owed and self._made:
                    self._since = time.monotonic()
                self._entered += 1
                self._owed[self._entered] = (future, method)
                return self._entered, future
        future.set_exception(ActorDied(self.name, self.death))
        return future

    def made(self) -> None:
        """The actor's object exists; from now on its calls take time."""
        with self._lock:
            self._made = True
            self._since = time.monotonic()

    def answer(self, number: int, result: Any) -> None:
        """What call `number` came to; nobody is told who was told already that the actor died."""
        with self._lock:
            future, _ = self._owed.pop(number, (None, ""))
            self._since = time.monotonic()
            self.answered += future is not None
        if future is not None:
            future.set_result(result)

    def forget(self, number: int) -> None:
        """The call was never made."""
        with self._lock:
            self._owed.pop(number, None)

    def die(self, cause: str, source: BaseException | None = None) -> None:
        """The first cause counts; whoever is owed an answer is told of it."""
        with self._lock:
            if self.death is not None:
                return
            self.death = cause
            owed = [future for future, _ in self._owed.values()]
            self._owed.clear()
        for future in owed:
            error = ActorDied(self.name, cause)
            error.__cause__ = source
            future.set_exception(error)

    def overdue(self, patience: float) -> str | None:
        """What it does for longer than it may; None if it keeps its time."""
        with self._lock:
            seconds = time.monotonic() - self._since
            if self.death is not None:
                return None
            if not self._made:
                late = seconds > patience + STARTUP_S
                return f"hung: was not made within {patience + STARTUP_S:g} s" if late else None
            if not self._owed or seconds <= patience:
                return None
            _, method = next(iter(self._owed.values()))
            return f"hung: no answer to {method} within {patience:g} s"


class Handle:
    """An `Actor`, wherever its body is."""

    def __init__(self, recipe: Recipe, start: Callable[[Recipe, Ledger], Body]) -> None:
        self.recipe = recipe
        self.ledger = Ledger(recipe.name)
        self._order = threading.Lock()
        self.body = start(recipe, self.ledger)

    @property
    def name(self) -> str:
        """As the protocol says."""
        return self.recipe.name

    @property
    def generation(self) -> int:
        """As the protocol says."""
        return self.recipe.generation

    @property
    def death(self) -> str | None:
        """As the protocol says."""
        return self.ledger.death

    def call(self, method: str, /, *arguments: Any, **named: Any) -> Future[Any]:
        """As the protocol says."""
        with self._order:
            entered = self.ledger.enter(method)
            if isinstance(entered, Future):
                return entered
            number, future = entered
            try:
                self.body.post(number, method, arguments, named)
            except CabochonError:
                self.ledger.forget(number)
                raise
        return future

    def kill(self, cause: str, /) -> None:
        """As the protocol says."""
        self.ledger.die(cause)
        self.body.kill()


def cause_of(error: BaseException) -> str:
    """The error in a line: its kind and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
