"""What runs in an actor's process: it makes the object and does what it is called for."""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import socket
import threading
import traceback
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NoReturn

from cabochon.core.errors import Closed, DataError
from cabochon.runtime.actors import cause_of
from cabochon.runtime.channel import Channel
from cabochon.runtime.protocols import Counts, Item
from cabochon.runtime.records import named
from cabochon.runtime.shared_weights import SharedReader

__all__ = ["main"]


def main(main_descriptor: int, side_descriptor: int) -> None:
    """Serve the process at the other end of these two sockets until it says stop, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us
    faulthandler.enable()
    worker = _Worker(socket.socket(fileno=main_descriptor), socket.socket(fileno=side_descriptor))
    worker.live()


class _Worker:
    def __init__(self, main: socket.socket, side: socket.socket) -> None:
        self._channel = Channel(main, side, self._share, self._shared)
        self._inbox: SimpleQueue[tuple[dict[str, Any], Any] | None] = SimpleQueue()
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._queues: dict[int, _RemoteQueue] = {}
        self._ending = False

    def live(self) -> None:
        threading.Thread(target=self._receive, name="receive", daemon=True).start()
        try:
            first = self._inbox.get()
            if first is not None:
                factory, arguments = first[1]
                self._serve(named(factory)(*arguments))
        except BaseException as error:  # whatever ended it, SystemExit too, its callers hear of it
            self._report(cause_of(error))
        finally:
            self._ending = True
            self._channel.hang_up()

    def _serve(self, thing: Any) -> None:
        self._channel.send({"do": "made"})
        while (letter := self._inbox.get()) is not None:
            head, (arguments, by_name) = letter
            result = getattr(thing, head["method"])(*arguments, **by_name)
            self._channel.send({"do": "answer", "number": head["number"]}, result)
        if hasattr(thing, "close"):
            thing.close()

    def _receive(self) -> None:
        """Take in messages even while the object works, so that nobody who sends has to wait."""
        while True:
            try:
                head, record = self._channel.receive()
            except (EOFError, OSError):
                if self._ending:
                    return
                _vanish()  # whoever started us is gone, or has no more use for us
            except Exception as error:
                self._report(f"was given what cannot be read: {cause_of(error)}")
                _vanish()
            if head["do"] in ("make", "call"):
                self._inbox.put((head, record))
            elif head["do"] == "stop":
                self._inbox.put(None)
            else:
                self._settle(head, record)

    def _report(self, cause: str) -> None:
        """Say what this actor dies of, within the handling of the error."""
        with suppress(OSError):  # nobody is there to hear it
            self._channel.send({"do": "died", "cause": cause, "trace": traceback.format_exc()})

    def _settle(self, head: dict[str, Any], record: Any) -> None:
        future = self._asked.pop(head["number"])
        match head["do"]:
            case "closed":
                future.set_exception(Closed("the queue is closed"))
            case "failed":
                future.set_exception(DataError(head["cause"]))
            case "cancelled":
                future.set_exception(TimeoutError(head["cause"]))
            case "item":
                self._channel.send({"do": "got", "number": head["number"]})
                item = Item(record=record, version=head["version"], lag=head["lag"])
                future.set_result(item)
            case _:
                future.set_result(record)

    def ask(self, head: dict[str, Any], record: Any = None, timeout: float | None = None) -> Any:
        """The other side's answer; where it does not come in time, the question is withdrawn."""
        number = next(self._numbers)
        future: Future[Any] = Future()
        self._asked[number] = future
        self._channel.send({**head, "number": number}, record)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                raise
            self._channel.send({"do": "cancel", "number": number, "after": timeout})
            return future.result()

    def _share(self, thing: Any) -> Any:
        if isinstance(thing, _RemoteQueue):
            return {"what": "queue", "number": thing.number}
        return None

    def _shared(self, tree: Any) -> Any:
        if tree["what"] == "queue":
            number = tree["number"]
            return self._queues.setdefault(number, _RemoteQueue(self, number))
        memory = self._channel.receive_memory(tree["memory"], tree["size"])
        return SharedReader(memory, tree["layout"], tree["places"])


class _RemoteQueue:
    """A `Queue` that lives in the process which started this one."""

    def __init__(self, worker: _Worker, number: int) -> None:
        self._worker = worker
        self.number = number

    def put(self, record: Any, /, *, version: int = 0, timeout: float | None = None) -> bool:
        """As the protocol says."""
        head = {"do": "put", "queue": self.number, "version": version}
        return bool(self._worker.ask(head, record, timeout))

    def get(self, timeout: float | None = None) -> Item:
        """As the protocol says."""
        item: Item = self._worker.ask({"do": "get", "queue": self.number}, None, timeout)
        return item

    def advance(self, version: int, /) -> None:
        """As the protocol says."""
        self._worker.ask({"do": "advance", "queue": self.number, "version": version})

    @property
    def counts(self) -> Counts:
        """As the protocol says."""
        answer = self._worker.ask({"do": "counts", "queue": self.number})
        return Counts(**{**answer, "lags": {int(k): v for k, v in answer["lags"].items()}})

    def close(self) -> None:
        """As the protocol says."""
        self._worker.ask({"do": "close", "queue": self.number})


def _vanish() -> NoReturn:
    """End this process and whatever it started, which nobody would end otherwise."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)
