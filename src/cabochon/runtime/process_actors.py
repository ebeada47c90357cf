"""Actors in processes of this host: for work in Python, and for what may crash.

A process is started by its command line and gets two sockets. Factories go by name; everything
else by `channel`. The queues live here, in the process that made the runtime; actors ask for them
by message, so that one that dies leaves no lock behind. If this process is killed, its actors find
their sockets closed and end themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from cabochon.core.errors import CabochonError, ConfigError
from cabochon.runtime.actors import Ledger, Recipe, cause_of
from cabochon.runtime.channel import Channel, socket_pairs
from cabochon.runtime.crew import Crew
from cabochon.runtime.memory import private_megabytes, require_room
from cabochon.runtime.protocols import Item, Runtime, Stale
from cabochon.runtime.queues import BoundedQueue
from cabochon.runtime.records import path_of
from cabochon.runtime.shared_weights import SharedReader, SharedWriter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["process_runtime"]

GRACE_S = 2.0
"""Between the end of a process's socket and its own."""

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from cabochon.runtime.process_worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


def process_runtime() -> Runtime:
    """See `cabochon.runtime.processes`."""
    if not hasattr(os, "waitid"):
        raise ConfigError("processes need a system with waitid (Linux); use threads, or ray")
    return Crew(_Processes())


class _Processes:
    def __init__(self) -> None:
        self._actors: list[_Process] = []
        self._queues: list[BoundedQueue] = []
        self._closed = threading.Event()
        self._reaper: threading.Thread | None = None

    def start(self, recipe: Recipe, ledger: Ledger) -> _Process:
        factory = path_of(recipe.factory)
        self._actors = [actor for actor in self._actors if not actor.over]
        self._require_room(recipe.megabytes)
        actor = _Process(recipe, factory, ledger, self._queues)
        self._actors = [*self._actors, actor]
        if self._reaper is None:
            self._reaper = threading.Thread(target=self._reap, name="reaper", daemon=True)
            self._reaper.start()
        return actor

    def publisher(self, tensors: Mapping[str, Tensor]) -> SharedWriter:
        return SharedWriter(tensors)

    def queue(self, capacity: int, max_lag: int | None, stale: Stale, takes: int) -> BoundedQueue:
        queue = BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes)
        self._queues.append(queue)
        return queue

    def close(self) -> None:
        self._closed.set()
        if self._reaper is not None:
            self._reaper.join()

    def _require_room(self, megabytes: float) -> None:
        """One more takes what the biggest takes; those that are still growing will, too."""
        held = [private_megabytes(actor.process.pid) for actor in self._actors]
        each = max([megabytes, *held])
        growth = sum(each - megabytes for megabytes in held)
        if each > 0:
            require_room(1 + round(growth / each), each)

    def _reap(self) -> None:
        """Notice ended processes whose sockets are still held open by children of theirs."""
        while not self._closed.wait(0.2):
            for actor in self._actors:
                if not actor.over and actor.has_ended():
                    actor.kill()


class _Process:
    def __init__(
        self, recipe: Recipe, factory: str, ledger: Ledger, queues: list[BoundedQueue]
    ) -> None:
        self._ledger = ledger
        self._queues = queues
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._underway: dict[int, tuple[BoundedQueue, Item]] = {}
        self._cause: str | None = None
        self._source: BaseException | None = None
        self.over = False
        ours, theirs = socket_pairs()
        self._channel = Channel(*ours, self._share, self._shared)
        descriptors = [end.fileno() for end in theirs]
        path = json.dumps(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, path, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print must not come among the answers of a command
            # Actors are many: each computes in one thread unless told otherwise.
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # so that what it starts ends with it
        )
        for end in theirs:
            end.close()
        self._reader = threading.Thread(
            target=self._receive, name=f"{recipe.name} answers", daemon=True
        )
        self._reader.start()
        try:
            self._channel.send({"do": "make"}, (factory, recipe.arguments))
        except OSError:  # it ended at once; the reader finds out why
            return
        except CabochonError:
            self.kill()
            self._reader.join()
            raise

    def post(self, number: int, method: str, arguments: tuple[Any, ...], named: Any) -> None:
        with suppress(OSError):  # gone; the reader says so to whoever is owed an answer
            head = {"do": "call", "number": number, "method": method}
            self._channel.send(head, (arguments, named))

    def stop(self) -> None:
        with suppress(OSError):
            self._channel.send({"do": "stop"})

    def join(self, timeout: float) -> bool:
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def kill(self) -> None:
        self._end_all()
        self._channel.hang_up()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def has_ended(self) -> bool:
        """Whether the process has come to its end; its number is not given up yet."""
        with self._lock:
            if self.process.returncode is not None:
                return True
            how = os.WEXITED | os.WNOWAIT | os.WNOHANG
            return os.waitid(os.P_PID, self.process.pid, how) is not None

    def _end_all(self) -> None:
        """The process and those it started."""
        with self._lock, suppress(ProcessLookupError, PermissionError):
            if self.process.returncode is None:  # else the number may be another's
                os.killpg(self.process.pid, signal.SIGKILL)

    def _receive(self) -> None:
        try:
            while True:
                self._take_in(*self._channel.receive())
        except (EOFError, OSError):
            pass
        except Exception as error:  # an answer that cannot be read is the end of who gave it
            self._cause = f"answered what cannot be read: {cause_of(error)}"
            self._end_all()
        self._ledger.die(self._cause_of_death(), self._source)
        with self._lock:
            self.over = True
            asked = list(self._asked.values())
            underway = list(self._underway.values())
            self._asked.clear()
            self._underway.clear()
        for future in asked:
            future.cancel()
        for queue, item in reversed(underway):
            queue.give_back(item)
        self._channel.close()

    def _cause_of_death(self) -> str:
        deadline = time.monotonic() + GRACE_S
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.002)
        if not self.has_ended():
            self._cause = self._cause or "closed its socket and went on"
        self._end_all()
        with self._lock:
            status = self.process.wait()
        if self._cause is not None:
            return self._cause
        if status == -signal.SIGKILL:
            return "its process was killed (SIGKILL: kill -9, or the system was out of memory)"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    def _take_in(self, head: dict[str, Any], record: Any) -> None:
        match head["do"]:
            case "made":
                self._ledger.made()
            case "answer":
                self._ledger.answer(head["number"], record)
            case "died":
                self._cause = head["cause"]
                self._source = RuntimeError(f"in the actor's process:\n{head['trace']}")
            case "put":
                future = self._queues[head["queue"]].offer(record, head["version"])
                self._promise(head["number"], future, partial(self._was_put, head["number"]))
            case "get":
                queue = self._queues[head["queue"]]
                taken = partial(self._was_taken, head["number"], queue)
                self._promise(head["number"], queue.take(), taken)
            case "got":
                with self._lock:
                    self._underway.pop(head["number"], None)
            case "cancel":
                self._withdraw(head["number"], head["after"])
            case "advance":
                self._queues[head["queue"]].advance(head["version"])
                self._reply({"do": "done", "number": head["number"]})
            case "close":
                self._queues[head["queue"]].close()
                self._reply({"do": "done", "number": head["number"]})
            case "counts":
                counts = asdict(self._queues[head["queue"]].counts)
                counts["lags"] = {str(lag): count for lag, count in counts["lags"].items()}
                self._reply({"do": "done", "number": head["number"]}, counts)

    def _promise(self, number: int, future: Future[Any], then: Any) -> None:
        with self._lock:
            self._asked[number] = future
        future.add_done_callback(then)

    def _withdraw(self, number: int, seconds: float) -> None:
        with self._lock:
            future = self._asked.get(number)
        if future is not None and future.cancel():
            cause = f"the queue did not change for {seconds} seconds"
            self._reply({"do": "cancelled", "number": number, "cause": cause})

    def _was_put(self, number: int, future: Future[bool]) -> None:
        with self._lock:
            self._asked.pop(number, None)
        if future.cancelled():
            return
        if future.exception() is not None:
            self._reply({"do": "closed", "number": number})
        else:
            self._reply({"do": "done", "number": number}, future.result())

    def _was_taken(self, number: int, queue: BoundedQueue, future: Future[Item]) -> None:
        with self._lock:
            self._asked.pop(number, None)
        if future.cancelled():
            return
        if future.exception() is not None:
            self._reply({"do": "closed", "number": number})
            return
        item = future.result()
        with self._lock:
            gone = self.over
            if not gone:
                self._underway[number] = (queue, item)
        if gone:
            queue.give_back(item)
            return
        head = {"do": "item", "number": number, "version": item.version, "lag": item.lag}
        self._reply(head, item.record)

    def _reply(self, head: dict[str, Any], record: Any = None) -> None:
        try:
            self._channel.send(head, record)
        except OSError:  # gone: `_receive` gives back what was under way
            return
        except CabochonError as error:
            cause = f"the queue holds what no process can be given: {error}"
            self._channel.send({"do": "failed", "number": head["number"], "cause": cause})

    def _share(self, thing: Any) -> Any:
        if isinstance(thing, SharedReader):
            memory = self._channel.send_memory(thing.memory)
            size = thing.memory.bytes.size
            layout = {name: list(entry) for name, entry in thing.layout.items()}
            tree = {"what": "weights", "memory": memory, "size": size}
            return {**tree, "layout": layout, "places": thing.places}
        for number, queue in enumerate(self._queues):
            if queue is thing:
                return {"what": "queue", "number": number}
        return None

    def _shared(self, tree: Any) -> Any:
        return self._queues[tree["number"]]
