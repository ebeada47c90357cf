"""Memory that processes share, and how much of it there is for more of them."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from cabochon.core.errors import ConfigError
from cabochon.runtime.records import Bytes

__all__ = ["RESERVE_MB", "Memory", "available_megabytes", "private_megabytes", "require_room"]

MEGABYTE = 2**20

RESERVE_MB = 256.0
"""What actors leave to everything else."""


class Memory:
    """Bytes that several processes see. They have no name: the system frees them with the last.

    Whoever is killed, and however, nothing is left behind in /dev/shm.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        """New memory of zeros; or, with a descriptor (which it then owns), what that stands for."""
        if descriptor is None:
            descriptor = _anonymous()
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self.bytes: Bytes = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)

    def __del__(self) -> None:
        descriptor, self.descriptor = getattr(self, "descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


def _anonymous() -> int:
    if hasattr(os, "memfd_create"):  # not bounded by the size of /dev/shm, as in containers
        return os.memfd_create("cabochon", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def available_megabytes() -> float | None:
    """What can be had without swapping, the control group's limit respected; None: unknown."""
    figures = [
        int(line.split()[1]) * 1024
        for line in _lines(Path("/proc/meminfo"))
        if line.startswith("MemAvailable:")
    ]
    group = Path("/sys/fs/cgroup")
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0].isdecimal():
        figures.append(int(limit[0]) - int(used[0]))
    return min(figures) / MEGABYTE if figures else None


def private_megabytes(process: int) -> float:
    """What a process holds for itself alone; 0 where the system does not tell."""
    for line in _lines(Path(f"/proc/{process}/status")):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / MEGABYTE
    return 0.0


def require_room(actors: int, megabytes_each: float, *, available: float | None = None) -> None:
    """Refuse more actors than there is memory for, before any is started.

    Args:
        actors: how many more.
        megabytes_each: of memory of its own.
        available: megabytes that there are; None: as the system says (where it does not say,
            nothing is refused).

    Raises:
        ConfigError: not all fit; says how many do.
    """
    there = available_megabytes() if available is None else available
    if there is None or megabytes_each <= 0:
        return
    fit = max(0, int((there - RESERVE_MB) // megabytes_each))
    if actors > fit:
        raise ConfigError(
            f"{actors} more actors of {megabytes_each:.0f} MB each need "
            f"{actors * megabytes_each:.0f} MB; {there:.0f} MB are available, of which "
            f"{RESERVE_MB:.0f} are left to the rest: {fit} fit. Ask for fewer, with more "
            "environments in each"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
