"""A process's peak is its own, not that of the one that started it; and what it frees, it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from cabochon.training import process_memory
from cabochon.training.process_memory import peak_memory

MIB = 1024**2


def test_a_small_process_of_a_large_one_is_small() -> None:
    ballast = torch.ones(512 * MIB, dtype=torch.uint8)
    code = "from cabochon.training.process_memory import peak_memory; print(peak_memory())"
    # A fork, as `preexec_fn` asks for, is what carries the parent's figure over.
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: None,
    )  # fmt: skip
    assert peak_memory() > len(ballast)
    assert int(ended.stdout) < 400 * MIB


FAULTS = """
import resource, runpy
keep_freed_memory = runpy.run_path({path!r})["keep_freed_memory"]
if {keeps}:
    keep_freed_memory()
def update():
    kept = [b"x" * 2**24 for _ in range(8)]
for _ in range(4):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    update()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Ten times 128 MB, which are 32,768 pages."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is glibc's")
def test_what_was_freed_is_used_again() -> None:
    def faults(*, keeps: bool, **told: str) -> int:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_")
        }
        code = FAULTS.format(path=process_memory.__file__, keeps=keeps)
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=environment | told,
        )  # fmt: skip
        return int(ended.stdout)

    assert faults(keeps=True) < 100
    assert faults(keeps=False) > 20_000
    # Whoever said how it is to be is not overruled.
    assert faults(keeps=True, MALLOC_TRIM_THRESHOLD_="131072") > 20_000
