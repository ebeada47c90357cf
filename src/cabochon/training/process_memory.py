"""How much memory a process has held, and that it keeps what it will need again."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

__all__ = ["keep_freed_memory", "peak_memory"]

_TRIM_THRESHOLD, _MAP_THRESHOLD = -1, -3
"""glibc's names for two numbers of its allocator, mallopt(3)."""
_MAPPED = 32 * 2**20
"""Bytes of a block from which on it may have pages of its own: the most that glibc allows, and what
its own rule, which ends with setting either number, comes to as large blocks are freed."""
_KEPT = 2**31 - 1
"""Bytes that may lie free: the most that can be said."""


def keep_freed_memory() -> None:
    """From now on up to 2 GB that the process frees stay with it, to be used again.

    Every update needs the memory that the one before has freed. By default glibc gives it back to
    the system at the end of one, and in the next every page is asked for, and cleared, anew. The
    peak is nearly the same. Other allocators are left alone, and so is glibc where its environment
    variables say how it is to do.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    told = tuned or "MALLOC_TRIM_THRESHOLD_" in os.environ
    if told or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MAP_THRESHOLD, _MAPPED)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def peak_memory() -> int:
    """The most bytes of this process that were in memory at once.

    `getrusage` tells the peak of the process that started this one where that was larger, so on
    Linux the kernel's own figure for the program is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
