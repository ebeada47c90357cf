"""The five verbs that every runtime has: spawn, call, wait, publish weights, bounded queue.

An *actor* is an object of its own that does what it is called for, one call after the other, in
the order of the calls. Where it lives is the runtime's business: in the caller (`inline`), in a
thread, in a process, on another machine (`ray`). The same code runs on all four if it keeps to
what the strictest of them allows:

- A factory is a function or class that its module can be asked for by name; what it is given, and
  what calls take and give, are *records*: None, bool, int, float, str, bytes, NumPy arrays and
  scalars, tensors, dataclasses of these, and lists, tuples and dicts (with str keys) of records;
  and, as arguments, the subscribers and queues of the same runtime.
- A record is handed over: whoever gave it away does not change it afterwards (threads and `inline`
  pass the very object, the others a copy); whoever got it may.
- An exception that leaves a method is the end of its actor, as is a killed process or a call that
  outlasts the actor's patience. Every call that was not answered fails with `ActorDied`, which
  names the actor and the cause; `replace` puts another one in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Actor", "Counts", "Item", "Publisher", "Queue", "Runtime", "Stale", "Subscriber"]

Stale = Literal["drop", "wait"]
"""What a queue with a bounded lag does about records that would be too old when taken.

`drop` takes what is put and throws away, and counts, what is too old by the time it is asked for.
`wait` holds whoever puts until the queue is so short that the record is taken in time; only what
was too old when it was put is thrown away.
"""


class Actor(Protocol):
    """A handle on an actor; any thread may use it."""

    @property
    def name(self) -> str:
        """As it was spawned; its replacements have the same."""
        ...

    @property
    def generation(self) -> int:
        """0 for the first of its name, 1 for the first replacement, ..."""
        ...

    @property
    def death(self) -> str | None:
        """What it died of; None while it lives."""
        ...

    def call(self, method: str, /, *arguments: Any, **named: Any) -> Future[Any]:
        """Ask for a method; calls are answered in their order.

        The future gets the method's result, or `ActorDied`. A call cannot be withdrawn. Futures
        are those of `concurrent.futures`: `result(timeout)`, `add_done_callback`, `wait`.
        """
        ...

    def kill(self, cause: str, /) -> None:
        """End it now; what it owes fails with `ActorDied` of this cause. Twice is once.

        A thread cannot be ended from outside: what it still does is done for nobody.
        """
        ...


class Subscriber(Protocol):
    """Reads the weights that a publisher writes; may be given to actors."""

    @property
    def version(self) -> int:
        """The newest version there is; -1 before the first. Costs next to nothing."""
        ...

    def newest(self) -> tuple[int, Mapping[str, Tensor]]:
        """The newest version and its weights: all of one publication, never parts of two.

        The tensors are on the CPU, for reading alone, and stay as they are.

        Raises:
            DataError: nothing has been published yet.
        """
        ...


class Publisher(Protocol):
    """Writes weights for every subscriber; never waits for one. One thread at a time."""

    @property
    def version(self) -> int:
        """The newest version; -1 before the first."""
        ...

    def publish(self, weights: Mapping[str, Tensor], /, version: int) -> None:
        """Copies `weights`, of the names, shapes and types it was made for, from any device.

        Raises:
            WeightsMismatch: other names, shapes or types.
            ConfigError: the version is not above the last one.
        """
        ...

    def subscriber(self) -> Subscriber:
        """A reader of what is published."""
        ...


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a queue gives."""

    record: Any
    version: int
    """Of the weights that made it."""
    lag: int
    """How many versions older than the queue's it was when it was taken; at most `max_lag`."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What went through a queue so far: put = taken + dropped + held."""

    put: int
    taken: int
    dropped: int
    """Too old, thrown away."""
    held: int
    """In the queue now."""
    waiting: int
    """Puts that are held back now; they are not counted in `put` yet."""
    lags: Mapping[int, int] = field(default_factory=dict)
    """Lag -> how many were taken with it."""


class Queue(Protocol):
    """A first-in first-out queue of records that holds so many and none that is too old.

    Any actor and any thread may put and get. Nothing that was put is lost but what is counted as
    dropped, and nothing is given out twice, whoever dies on the way. Ray's queue promises less: a
    record goes with the actor that waited for it and died, and counts as taken.
    """

    def put(self, record: Any, /, *, version: int = 0, timeout: float | None = None) -> bool:
        """Put a record made with the weights of `version`; waits while the queue is full.

        Returns:
            False if it was too old already, and dropped.

        Raises:
            TimeoutError: it was not put within `timeout` seconds.
            Closed: the queue is closed.
        """
        ...

    def get(self, timeout: float | None = None) -> Item:
        """Take the oldest record; waits while there is none.

        Raises:
            TimeoutError: there was none within `timeout` seconds.
            Closed: the queue is closed and empty.
        """
        ...

    def advance(self, version: int, /) -> None:
        """Say which version the learner has now: lags are counted from it. It never falls."""
        ...

    @property
    def counts(self) -> Counts:
        """What went through so far."""
        ...

    def close(self) -> None:
        """Nothing more is put; who waits to put gets `Closed`, who gets what is left and then that.

        Twice is once.
        """
        ...


class Runtime(Protocol):
    """Where actors live. A context manager: leaving it closes it."""

    def spawn(
        self,
        factory: Callable[..., Any],
        /,
        *arguments: Any,
        name: str,
        patience: float | None = None,
        megabytes: float = 0.0,
    ) -> Actor:
        """Start an actor, the object that ``factory(*arguments)`` makes; does not wait for it.

        Args:
            factory: what makes the object, where the actor lives.
            arguments: records.
            name: of the actor, in every message about it; no two that live may share one.
            patience: seconds that one call, or the making, may take before the actor counts as
                hung and is killed; None: for ever.
            megabytes: of memory that it needs, where the caller knows.

        Raises:
            ConfigError: the name is in use; there is not the memory for one more, in numbers; the
                factory cannot be found by name where that is needed.
            Closed: the runtime is closed.
        """
        ...

    def replace(self, actor: Actor, /) -> Actor:
        """A new actor of the same name, factory and arguments; the old one is killed if it lives.

        Raises:
            ActorDied: three in a row died before they had answered a call: another would, too.
        """
        ...

    def publisher(self, tensors: Mapping[str, Tensor], /) -> Publisher:
        """A publisher of weights of these names, shapes and types; nothing is published yet."""
        ...

    def queue(
        self,
        capacity: int,
        /,
        *,
        max_lag: int | None = None,
        stale: Stale = "drop",
        takes: int = 1,
    ) -> Queue:
        """A queue of at most `capacity` records.

        Args:
            capacity: at least 1.
            max_lag: the most versions by which a record that is given out may be older than the
                version the queue was told last; None: any.
            stale: what happens otherwise.
            takes: how many records the learner takes from one version to the next; `wait` reckons
                with it.
        """
        ...

    def close(self, grace: float = 5.0) -> tuple[str, ...]:
        """Close all queues, let each actor end its call within `grace` seconds, then end it.

        Returns:
            The names of those that did not end by themselves: killed, or, of threads, left behind.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
