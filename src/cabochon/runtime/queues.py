"""The bounded queue itself: one host's memory, any number of threads; every runtime uses it."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from cabochon.core.errors import Closed, ConfigError
from cabochon.runtime.protocols import Counts, Item, Stale

__all__ = ["BoundedQueue"]

R = TypeVar("R")


class BoundedQueue:
    """A `Queue` whose waiting is done by futures, so that nobody needs a thread to wait in."""

    def __init__(
        self,
        capacity: int,
        *,
        max_lag: int | None = None,
        stale: Stale = "drop",
        takes: int = 1,
        alone: bool = False,
        admit: Callable[[], None] = lambda: None,
    ) -> None:
        """An empty queue at version 0; see `Runtime.queue` for what bounds it.

        `alone` says that nobody else can end a waiting; `admit`, called by whoever puts or gets,
        raises for those who may not.
        """
        if capacity < 1 or takes < 1:
            raise ConfigError(f"capacity and takes must be at least 1, got {capacity}, {takes}")
        if max_lag is not None and max_lag < 0:
            raise ConfigError(f"max_lag must be at least 0, or None, got {max_lag}")
        if stale not in ("drop", "wait"):
            raise ConfigError(f"stale is drop or wait, got {stale!r}")
        self.capacity = capacity
        self._max_lag = math.inf if max_lag is None else max_lag
        self._waits = stale == "wait"
        self._takes = takes
        self._alone = alone
        self._admit = admit
        self._lock = threading.Lock()
        self._records: deque[tuple[Any, int]] = deque()
        self._putting: deque[tuple[Future[bool], Any, int]] = deque()
        self._getting: deque[Future[Item]] = deque()
        self._version = 0
        self._closed = False
        self._put = self._dropped = 0
        self._since = 0
        self._lags: Counter[int] = Counter()

    def put(self, record: Any, /, *, version: int = 0, timeout: float | None = None) -> bool:
        """As the protocol says."""
        self._admit()
        return self._awaited(self.offer(record, version), timeout, "full")

    def get(self, timeout: float | None = None) -> Item:
        """As the protocol says."""
        self._admit()
        return self._awaited(self.take(), timeout, "empty")

    def offer(self, record: Any, version: int) -> Future[bool]:
        """`put` as a future; cancelled before it is done, it was not put."""
        future: Future[bool] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(Closed("the queue is closed"))
                return future
            self._putting.append((future, record, version))
        self._settle()
        return future

    def take(self) -> Future[Item]:
        """`get` as a future; cancelled before it is done, nothing was taken."""
        future: Future[Item] = Future()
        with self._lock:
            self._getting.append(future)
        self._settle()
        return future

    def give_back(self, item: Item) -> None:
        """An item that never reached whom it was taken for is the oldest again."""
        with self._lock:
            self._lags[item.lag] -= 1
            self._since = max(0, self._since - 1)
            self._records.appendleft((item.record, item.version))
        self._settle()

    def advance(self, version: int, /) -> None:
        """As the protocol says."""
        with self._lock:
            if version > self._version:
                self._version, self._since = version, 0
        self._settle()

    @property
    def counts(self) -> Counts:
        """As the protocol says."""
        with self._lock:
            lags = {lag: count for lag, count in sorted(self._lags.items()) if count}
            return Counts(
                put=self._put,
                taken=sum(lags.values()),
                dropped=self._dropped,
                held=len(self._records),
                waiting=sum(not future.done() for future, _, _ in self._putting),
                lags=lags,
            )

    def close(self) -> None:
        """As the protocol says."""
        with self._lock:
            self._closed = True
        self._settle()

    def _settle(self) -> None:
        """Do whatever can be done now; tell those it was done for when the lock is free again."""
        told: list[Callable[[], None]] = []
        with self._lock:
            while self._enter(told) or self._leave(told):
                pass
            if self._closed:
                told += self._dismissed()
        for tell in told:
            tell()

    def _enter(self, told: list[Callable[[], None]]) -> bool:
        """Let the first who puts go ahead, if there is one and there is room."""
        while self._putting and self._putting[0][0].cancelled():
            self._putting.popleft()
        if not self._putting or self._closed:
            return False
        future, record, version = self._putting[0]
        lag = self._version - version
        late = lag > self._max_lag
        if not late and not self._room(lag):
            return False
        self._putting.popleft()
        if not future.set_running_or_notify_cancel():
            return True
        self._put += 1
        if late:
            self._dropped += 1
        else:
            self._records.append((record, version))
        told.append(partial(future.set_result, not late))
        return True

    def _room(self, lag: int) -> bool:
        """Whether one more, so old already, would be taken in time."""
        held = len(self._records)
        if held >= self.capacity:
            return False
        # So many versions pass until the learner, who took `_since` of this one, comes to it.
        return not self._waits or lag + (self._since + held) // self._takes <= self._max_lag

    def _leave(self, told: list[Callable[[], None]]) -> bool:
        """Give the oldest record that is not too old to the first who waits for one.

        True also where there is only room now, because what was too old has gone.
        """
        dropped = self._dropped
        while self._records and self._version - self._records[0][1] > self._max_lag:
            self._records.popleft()
            self._dropped += 1
        while self._getting and self._getting[0].cancelled():
            self._getting.popleft()
        if not self._records or not self._getting:
            return self._dropped > dropped
        future = self._getting.popleft()
        if future.set_running_or_notify_cancel():
            record, version = self._records.popleft()
            lag = max(0, self._version - version)
            self._lags[lag] += 1
            self._since += 1
            item = Item(record=record, version=version, lag=lag)
            told.append(partial(future.set_result, item))
        return True

    def _dismissed(self) -> list[Callable[[], None]]:
        """Closed: nobody puts any more, and nobody waits for what will not come."""
        waiting: list[Future[Any]] = [future for future, _, _ in self._putting]
        self._putting.clear()
        if not self._records:
            waiting += self._getting
            self._getting.clear()
        return [
            partial(future.set_exception, Closed("the queue is closed"))
            for future in waiting
            if future.set_running_or_notify_cancel()
        ]

    def _awaited(self, future: Future[R], timeout: float | None, state: str) -> R:
        try:
            return future.result(0.0 if self._alone else timeout)
        except TimeoutError:
            if not future.cancel():  # it was done at the last moment
                return future.result()
        held = f"the queue is {state}: it holds {len(self._records)} of {self.capacity}"
        if self._alone and timeout is None:
            raise ConfigError(f"{held}, and in an inline runtime nobody else can change that")
        raise TimeoutError(f"{held}, for {0.0 if self._alone else timeout} seconds")
