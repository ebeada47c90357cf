"""Waiting for some of several calls."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from typing import Any

__all__ = ["wait"]


def wait(
    calls: Sequence[Future[Any]], *, count: int | None = None, timeout: float | None = None
) -> tuple[list[Future[Any]], list[Future[Any]]]:
    """Those calls that are answered (or failed) and those that are not, both in their order.

    Args:
        calls: futures of any runtime's actors.
        count: return as soon as so many are done; None: all of them.
        timeout: seconds after which to return in any case: what is done by then is a partial batch.
    """
    enough = len(calls) if count is None else min(count, len(calls))
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = {call for call in calls if not call.done()}
    while len(calls) - len(pending) < enough:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        pending = concurrent.futures.wait(
            pending, timeout=left, return_when=FIRST_COMPLETED
        ).not_done
    done = [call for call in calls if call not in pending]
    return done, [call for call in calls if call in pending]
