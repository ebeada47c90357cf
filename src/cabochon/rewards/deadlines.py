"""A call that may take only so long: a reward that hangs must not hang a training.

In the main thread a timer interrupts the call, whatever it computes (a regular expression that
backtracks for ever included). Elsewhere, and where the system has no such timer, the call is left
behind in a thread of its own, which ends with the process. That needs a call which lets others run
meanwhile; a regular expression does not, and must be judged in the main thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from cabochon.core.errors import ConfigError

__all__ = ["LONGEST", "Overdue", "within"]

LONGEST = threading.TIMEOUT_MAX
"""Seconds that a timer can be set to: some centuries."""

T = TypeVar("T")


class Overdue(BaseException):
    """The call did not return in time.

    No `Exception`: a reward that answers 0 to whatever goes wrong would make it an answer.
    """


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns.

    Raises:
        Overdue: it took longer.
        ConfigError: `seconds` is not above 0, or above `LONGEST`.
    """
    if not 0.0 < seconds <= LONGEST:
        raise ConfigError(f"a time limit is above 0 and at most {LONGEST:.0f} s, got {seconds}")
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "setitimer"):
        return _interrupted(seconds, call)
    return _left_behind(seconds, call)


def _interrupted(seconds: float, call: Callable[[], T]) -> T:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Overdue(f"it took longer than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)  # somebody else's, or none
        signal.signal(signal.SIGALRM, handler)


def _left_behind(seconds: float, call: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # it is raised again where the call was asked for
            raised.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Overdue(f"it took longer than {seconds:g} s")
    if raised:
        raise raised[0]
    return returned[0]
