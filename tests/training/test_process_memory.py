"""A process's peak is its own, not that of the one that started it."""

from __future__ import annotations

import subprocess
import sys

import torch

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
