"""Actors in the caller: every call is done when it is asked for. Deterministic, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cabochon.runtime.actors import Ledger, Recipe, cause_of
from cabochon.runtime.crew import Crew
from cabochon.runtime.protocols import Queue, Runtime, Stale
from cabochon.runtime.publishing import Snapshots
from cabochon.runtime.queues import BoundedQueue

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["inline"]


def inline() -> Runtime:
    """A runtime without concurrency: a call has been answered when it returns.

    Nobody can be interrupted, so patience means nothing here; who waits for a full or empty queue
    would wait for ever, so that is an error at once (`TimeoutError` where a timeout was given).
    """
    return Crew(_Inline())


class _Inline:
    def start(self, recipe: Recipe, ledger: Ledger) -> _Object:
        return _Object(recipe, ledger)

    def publisher(self, tensors: Mapping[str, Tensor]) -> Snapshots:
        return Snapshots(tensors)

    def queue(self, capacity: int, max_lag: int | None, stale: Stale, takes: int) -> Queue:
        return BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes, alone=True)

    def close(self) -> None:
        pass


class _Object:
    def __init__(self, recipe: Recipe, ledger: Ledger) -> None:
        self._ledger = ledger
        self._object: Any = None
        try:
            self._object = recipe.factory(*recipe.arguments)
        except Exception as error:  # an actor's end, whatever it was, is its caller's to hear of
            ledger.die(cause_of(error), error)
        else:
            ledger.made()

    def post(self, number: int, method: str, arguments: tuple[Any, ...], named: Any) -> None:
        try:
            result = getattr(self._object, method)(*arguments, **named)
        except Exception as error:
            self._ledger.die(cause_of(error), error)
        else:
            self._ledger.answer(number, result)

    def stop(self) -> None:
        if self._ledger.death is None and hasattr(self._object, "close"):
            self._object.close()

    def join(self, timeout: float) -> bool:  # noqa: ARG002
        return True

    def kill(self) -> None:
        self._object = None
