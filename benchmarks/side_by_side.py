"""Times two programs in turn, each in a fresh process, and compares them round by round.

A benchmark script is its own worker: called with ``--worker NAME SETTING`` it does one side's work
and prints one JSON object as its last line; called without arguments it runs `compare` on both
sides. Neighbours on the machine slow both sides of a round alike, so the figure is the median over
rounds of the ratio within a round, not the ratio of two medians.

Called itself, this file lists the benchmarks beside it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "compare",
    "measured_memory",
    "megabytes_in_use",
    "report",
    "run_worker",
    "seconds_each",
    "worker_arguments",
]

MEGABYTE = 2**20


def worker_arguments() -> list[str] | None:
    """What follows ``--worker`` on the command line; None in the process that compares."""
    return sys.argv[2:] if sys.argv[1:2] == ["--worker"] else None


def run_worker(script: str | Path, *arguments: str, threads: int | None = None) -> dict:
    """The JSON object that ``script --worker arguments`` prints last, from a fresh process."""
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    environment["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    # As cabochon's commands have it: threads that wait for one another sleep. Spinning, they keep
    # from the cores, beside any neighbour, the very threads that they are waiting for.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(
        [sys.executable, str(script), "--worker", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
    script: str | Path,
    setting: str,
    *,
    rounds: int = 5,
    sides: tuple[str, str] = ("peer", "ours"),
    threads: int | None = None,
) -> dict:
    """Runs both sides in turn; who goes first changes from round to round.

    A worker called with (side, setting) gives at least ``seconds`` (for one and the same work) and
    may give ``memory_mb``.

    Returns:
        ``ratio``: the peer's time over ours (above 1 we are faster), ``ratios`` of every round,
        ``memory_ratio`` the peer's memory over ours where given, and the medians of every number
        that the workers gave, under each side's name.
    """
    peer, ours = sides
    results: dict[str, list[dict]] = {peer: [], ours: []}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            results[side].append(run_worker(script, side, setting, threads=threads))
    pairs = list(zip(results[peer], results[ours], strict=True))
    ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
    summary: dict = {
        "setting": setting,
        "rounds": rounds,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    if all("memory_mb" in result for pair in pairs for result in pair):
        memory = [theirs["memory_mb"] / own["memory_mb"] for theirs, own in pairs]
        summary["memory_ratio"] = round(statistics.median(memory), 3)
    for side in sides:
        summary[side] = {
            name: round(statistics.median(result[name] for result in results[side]), 4)
            for name, value in results[side][0].items()
            if isinstance(value, int | float)
        }
    return summary


def report(**result: object) -> None:
    """Prints the figures of a benchmark, or of a worker, as the last line: one JSON object."""
    print(json.dumps(dict(result, load_average=os.getloadavg()[0])), flush=True)


def seconds_each(work: Callable[[], object], *, warm_up: int = 1, times: int = 5) -> list[float]:
    """Seconds of each of `times` calls, after `warm_up` calls that are not counted."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds


def megabytes_in_use() -> float:
    """This process's resident memory now."""
    return _status("VmRSS")


def measured_memory(work: Callable[[], object]) -> float:
    """Megabytes by which resident memory rises above where it stands, at most, during `work`.

    Freed memory is handed back to the system first (gc, malloc_trim), and the kernel's high-water
    mark is reset, so that what stood there before does not hide what the work needs. Where the
    mark cannot be reset, memory is looked at every few milliseconds instead.
    """
    if sys.platform != "linux":
        raise RuntimeError("memory is read from /proc, which only Linux has")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _sampled_memory(work)
    before = megabytes_in_use()
    work()
    return _status("VmHWM") - before


def _sampled_memory(work: Callable[[], object]) -> float:
    before = highest = megabytes_in_use()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.003):
            highest = max(highest, megabytes_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(highest, megabytes_in_use()) - before


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MEGABYTE
    raise RuntimeError(f"/proc/self/status has no {name}")


def benchmarks() -> list[Path]:
    """The scripts beside this file that time something."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path != Path(__file__))


if __name__ == "__main__":
    print(*benchmarks(), sep="\n")
