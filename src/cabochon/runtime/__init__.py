"""Where actors live, and the five verbs for them: spawn, call, wait, publish weights, queue.

`inline`, `threads`, `processes` and `ray` give a `Runtime` each; the same code runs on all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cabochon.core.errors import ConfigError
from cabochon.runtime.inline import inline
from cabochon.runtime.protocols import (
    Actor,
    Counts,
    Item,
    Publisher,
    Queue,
    Runtime,
    Stale,
    Subscriber,
)
from cabochon.runtime.threads import threads
from cabochon.runtime.waiting import wait

__all__ = [
    "RUNTIMES",
    "Actor",
    "Counts",
    "Item",
    "Publisher",
    "Queue",
    "Runtime",
    "Stale",
    "Subscriber",
    "inline",
    "processes",
    "ray",
    "runtime_called",
    "threads",
    "wait",
]


def processes() -> Runtime:
    """A runtime of processes on this host: arrays and weights in shared memory, JSON for the rest.

    Raises:
        ConfigError: the system has no Unix sockets that pass memory on.
    """
    from cabochon.runtime.process_actors import process_runtime

    return process_runtime()


def ray(address: str | None = None) -> Runtime:
    """A runtime of Ray's actors, on one host or on all of a cluster.

    Args:
        address: of a cluster ("auto": the one this host belongs to); None: what `ray.init` was
            told before, or else a cluster of this host alone, which ends with the runtime.

    Raises:
        MissingExtra: Ray is not installed.
    """
    from cabochon.runtime.ray_actors import ray_runtime

    return ray_runtime(address)


RUNTIMES: Mapping[str, Callable[[], Runtime]] = {
    "inline": inline,
    "threads": threads,
    "processes": processes,
    "ray": ray,
}
"""By the names that flags use."""


def runtime_called(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"there is no runtime {name!r}; use one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]()
