"""Actors for the tests of every runtime; processes find them by the name of this module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Pair:
    left: Any
    right: Any


class Member:
    """Counts, echoes, and dies in several ways."""

    def __init__(self, start: int = 0, born: float = 0.0) -> None:
        time.sleep(born)
        self.count = start
        self.life = uuid.uuid4().hex

    def add(self, number: int, times: int = 1) -> int:
        self.count += number * times
        return self.count

    def echo(self, record: Any) -> Any:
        return record

    def filled(self, size: int, value: int) -> Any:
        return np.full(size, value, np.uint8)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def pid(self) -> int:
        return os.getpid()

    def raises(self, text: str) -> None:
        raise ValueError(text)

    def exits(self, status: int) -> None:
        sys.stdout.flush()
        os._exit(status)

    def killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def child(self) -> int:
        """The id of a process that this one started and that would outlive it."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def put_all(self, queue: Any, versions: list[int], delay: float = 0.0) -> list[bool]:
        done = []
        for number, version in enumerate(versions):
            time.sleep(delay)
            record = {"who": self.count, "life": self.life, "number": number}
            record["data"] = np.full(9, number)
            done.append(queue.put(record, version=version))
        return done

    def take(self, queue: Any, many: int) -> list[Any]:
        return [queue.get().record for _ in range(many)]

    def wait_for_nothing(self, queue: Any, timeout: float) -> str:
        try:
            queue.get(timeout)
        except TimeoutError:
            return "nothing came"
        return "something came"

    def read(self, weights: Any) -> Any:
        return weights.newest()

    def read_often(self, weights: Any, seconds: float) -> tuple[int, int, int]:
        """How many readings were a mixture, how many were made, how many versions were seen."""
        mixed = readings = 0
        seen = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            version, tensors = weights.newest()
            values = {float(each) for tensor in tensors.values() for each in tensor.unique()}
            mixed += values != {float(version % 128)}
            readings += 1
            seen.add(version)
        return mixed, readings, len(seen)


def stillborn() -> None:
    raise OSError("no such world")


def slow_to_come(seconds: float) -> Member:
    return Member(born=seconds)
