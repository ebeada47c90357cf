"""What a run of agents is said to take, beside what processes really hold."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cabochon.rl.footprint import PROCESS_MB
from cabochon.runtime.memory import private_megabytes

ACTOR = (
    "import sys, cabochon.runtime.process_worker, cabochon.rl.server, gymnasium, torch; "
    "print('ready', flush=True); sys.stdin.read()"
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="measured with torch for the CPU")
def test_a_process_with_what_an_actor_imports_holds_what_is_planned_for_it() -> None:
    pytest.importorskip("gymnasium")
    with subprocess.Popen(
        [sys.executable, "-c", ACTOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        held = private_megabytes(process.pid)
        process.communicate()
    assert 0.75 * PROCESS_MB < held < 1.25 * PROCESS_MB
