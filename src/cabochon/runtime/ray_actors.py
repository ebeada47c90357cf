"""Actors of Ray: several hosts. The five verbs map onto Ray's own one to one.

Ray starts, places and watches the actors and carries what they are given, in its own way; what is
added here is what the other runtimes promise too: causes of death, replacements, a queue of bounded
lag, publications that are whole, arrays that may be written to.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from cabochon.core.errors import Closed, ConfigError, DataError, MissingExtra
from cabochon.runtime.actors import Ledger, Recipe, cause_of
from cabochon.runtime.crew import Crew
from cabochon.runtime.protocols import Counts, Item, Runtime, Stale
from cabochon.runtime.publishing import NOTHING, check_publication
from cabochon.runtime.queues import BoundedQueue
from cabochon.runtime.records import writable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RayQueue", "RayReader", "RayWriter", "ray_runtime"]

R = TypeVar("R")

MOST_WAITING = 10_000
"""Actors that may wait for one queue at a time."""


def ray_runtime(address: str | None) -> Runtime:
    """See `cabochon.runtime.ray`."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray", "a runtime of several hosts") from error
    ours = not ray.is_initialized()
    if ours:
        with _same_path():
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
    elif address is not None:
        raise ConfigError("Ray runs already; give no address to use it as it is")
    return Crew(_Ray(ray, ours))


@contextmanager
def _same_path() -> Iterator[None]:
    """What is started here finds the modules that this process finds; a cluster's own hosts do not.

    Ray's `runtime_env` would do that too, and start a worker of its own, seconds, for each actor.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class _Ray:
    def __init__(self, ray: Any, ours: bool) -> None:
        self._ray = ray
        self._ours = ours
        self._queues: list[RayQueue] = []
        self._boards: list[Any] = []
        # Ray tells of answers in a thread of its own, in which Ray itself must not be asked for
        # anything; whoever hears of an answer may well want to.
        self._news: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._teller = threading.Thread(target=self._tell, name="answers", daemon=True)
        self._teller.start()

    def start(self, recipe: Recipe, ledger: Ledger) -> _RayActor:
        return _RayActor(self._ray, recipe, ledger, self._news)

    def publisher(self, tensors: Mapping[str, Tensor]) -> RayWriter:
        board = self._ray.remote(_Board).options(num_cpus=0).remote()
        self._boards.append(board)
        return RayWriter(board, tensors)

    def queue(self, capacity: int, max_lag: int | None, stale: Stale, takes: int) -> RayQueue:
        # What is wrong with the numbers is said here and now.
        BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes)
        options = self._ray.remote(_Shelf).options(num_cpus=0, max_concurrency=MOST_WAITING)
        queue = RayQueue(options.remote(capacity, max_lag, stale, takes))
        self._queues.append(queue)
        return queue

    def close(self) -> None:
        for actor in [*self._boards, *(queue.shelf for queue in self._queues)]:
            self._ray.kill(actor)
        self._news.put(None)
        self._teller.join()
        if self._ours:
            self._ray.shutdown()

    def _tell(self) -> None:
        while (tell := self._news.get()) is not None:
            tell()


class _RayActor:
    def __init__(
        self,
        ray: Any,
        recipe: Recipe,
        ledger: Ledger,
        news: SimpleQueue[Callable[[], None] | None],
    ) -> None:
        self._ray = ray
        self._ledger = ledger
        self._news = news
        self._ended = threading.Event()
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
        if recipe.megabytes:
            options["memory"] = int(recipe.megabytes * 2**20)
        remote = ray.remote(_Member).options(**options)
        self._actor = remote.remote()
        made = self._actor.make.remote(recipe.factory, *recipe.arguments)
        self._when_done(made, self._was_made)

    def post(self, number: int, method: str, arguments: tuple[Any, ...], named: Any) -> None:
        answer = self._actor.call.remote(method, arguments, named)
        self._when_done(answer, partial(self._was_answered, number))

    def stop(self) -> None:
        ended = self._actor.end.remote()
        self._when_done(ended, lambda _: self._ended.set())

    def join(self, timeout: float) -> bool:
        if not self._ended.wait(timeout):
            return False
        self._ray.kill(self._actor)
        return True

    def kill(self) -> None:
        self._ended.set()
        self._ray.kill(self._actor)

    def _when_done(self, reference: Any, then: Callable[[Future[Any]], None]) -> None:
        reference.future().add_done_callback(lambda done: self._news.put(partial(then, done)))

    def _was_made(self, made: Future[Any]) -> None:
        error = made.exception()
        if error is None:
            self._ledger.made()
        else:
            self._die(error)

    def _was_answered(self, number: int, answer: Future[Any]) -> None:
        error = answer.exception()
        if error is None:
            self._ledger.answer(number, writable(answer.result()))
        else:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        cause = getattr(error, "cause", None)  # Ray wraps what was raised
        if isinstance(cause, BaseException):
            self._ledger.die(cause_of(cause), cause)
        else:
            text = " ".join(str(error).split())
            self._ledger.die(f"Ray says {type(error).__name__}: {text}", error)
        self.kill()


class _Member:
    """What Ray makes an actor of: the object, and its end with its first error."""

    def __init__(self) -> None:
        self._object: Any = None

    def make(self, factory: Any, *arguments: Any) -> None:
        self._object = factory(*arguments)

    def call(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        arguments, named = writable((arguments, named))
        return getattr(self._object, method)(*arguments, **named)

    def end(self) -> None:
        if hasattr(self._object, "close"):
            self._object.close()


class _Board:
    """Holds the newest publication: its version and where Ray keeps the tensors."""

    def __init__(self) -> None:
        self._newest: tuple[int, Any] = (NOTHING, None)

    def pin(self, version: int, where: list[Any]) -> None:
        self._newest = (version, where)

    def newest(self) -> tuple[int, Any]:
        return self._newest

    def version(self) -> int:
        return self._newest[0]


class RayWriter:
    """A `Publisher` by way of Ray's object store."""

    def __init__(self, board: Any, tensors: Mapping[str, Tensor]) -> None:
        self._board = board
        self._expected = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        self._version = NOTHING

    @property
    def version(self) -> int:
        """As the protocol says."""
        return self._version

    def publish(self, weights: Mapping[str, Tensor], /, version: int) -> None:
        """As the protocol says."""
        import ray

        check_publication(self._expected, weights, version, self._version)
        tensors = {name: each.detach().cpu().contiguous() for name, each in weights.items()}
        # Ray's copy in the store is made here and never changes; in a list it stays a reference.
        ray.get(self._board.pin.remote(version, [ray.put(tensors)]))
        self._version = version

    def subscriber(self) -> RayReader:
        """As the protocol says."""
        return RayReader(self._board)


class RayReader:
    """A `Subscriber` on any host of the cluster."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._read: tuple[int, Mapping[str, Tensor]] = (NOTHING, {})

    @property
    def version(self) -> int:
        """As the protocol says."""
        import ray

        version: int = ray.get(self._board.version.remote())
        return version

    def newest(self) -> tuple[int, Mapping[str, Tensor]]:
        """As the protocol says."""
        import ray

        version, where = ray.get(self._board.newest.remote())
        if where is None:
            raise DataError("no weights have been published yet")
        if version != self._read[0]:
            self._read = (version, ray.get(where[0]))
        return self._read


class _Shelf:
    """The queue, as an actor whose methods wait without a thread each."""

    def __init__(self, capacity: int, max_lag: int | None, stale: Stale, takes: int) -> None:
        self._queue = BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes)

    async def put(self, record: Any, version: int, timeout: float | None) -> bool:
        return await _within(self._queue.offer(record, version), timeout)

    async def get(self, timeout: float | None) -> Item:
        return await _within(self._queue.take(), timeout)

    async def advance(self, version: int) -> None:
        self._queue.advance(version)

    async def counts(self) -> Counts:
        return self._queue.counts

    async def close(self) -> None:
        self._queue.close()


class RayQueue:
    """A `Queue` on the host where Ray put it.

    Nobody confirms what was taken: a record that is given to an actor that died while it waited is
    lost, and counts as taken.
    """

    def __init__(self, shelf: Any) -> None:
        self.shelf = shelf

    def put(self, record: Any, /, *, version: int = 0, timeout: float | None = None) -> bool:
        """As the protocol says."""
        done: bool = _answer(self.shelf.put.remote(record, version, timeout))
        return done

    def get(self, timeout: float | None = None) -> Item:
        """As the protocol says."""
        item: Item = writable(_answer(self.shelf.get.remote(timeout)))
        return item

    def advance(self, version: int, /) -> None:
        """As the protocol says."""
        _answer(self.shelf.advance.remote(version))

    @property
    def counts(self) -> Counts:
        """As the protocol says."""
        counts: Counts = _answer(self.shelf.counts.remote())
        return counts

    def close(self) -> None:
        """As the protocol says."""
        _answer(self.shelf.close.remote())


async def _within(future: Future[R], timeout: float | None) -> R:
    """What the queue comes to in this time; later, it has not been asked."""
    await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout)
    if not future.done() and future.cancel():
        raise TimeoutError(f"the queue did not change for {timeout} seconds")
    return future.result()


def _answer(reference: Any) -> Any:
    """What a queue's actor answered; its errors are those that it raised."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise Closed("the queue is gone") from error
