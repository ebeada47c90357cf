"""Kills a piece of work with SIGKILL, again and again, at random moments.

Run from a small program of its own that has imported torch once: each life is a fork of it, so a
hundred of them cost no more than their work. The program has one thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable


def live(work: Callable[[], None]) -> int:
    """The process id of a new life."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def import_what_it_needs(work: Callable[[], None]) -> None:
    """Imports here whatever `work` imports on its way, so that no life has to.

    It is run once in a fork: after a backward pass of its own a process may not fork learners.
    """
    reading, writing = os.pipe()
    before = set(sys.modules)

    def tell() -> None:
        work()
        names = sorted(set(sys.modules) - before)
        with os.fdopen(writing, "w") as pipe:
            pipe.write("\n".join(names))

    process = live(tell)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        names = pipe.read().split()
    _end(process)
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def timed(work: Callable[[], None]) -> float:
    """Seconds that one undisturbed life takes."""
    begun = time.perf_counter()
    _end(live(work))
    return time.perf_counter() - begun


def kill_often(
    work: Callable[[], None], *, kills: int, longest: float, seed: int, after: Callable[[], None]
) -> int:
    """Lives that are killed, each after at most `longest` seconds, then one that may end.

    Args:
        work: goes on where the life before it was killed.
        kills: how many lives to kill at most.
        longest: seconds; a life's length is uniform below it.
        seed: of those lengths.
        after: called after each death.

    Returns:
        How many were killed before the work was done.
    """
    lengths = random.Random(seed)
    for killed in range(kills):
        process = live(work)
        time.sleep(lengths.uniform(0.0, longest))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return killed
        after()
    _end(live(work))
    return kills


def _end(process: int) -> None:
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
