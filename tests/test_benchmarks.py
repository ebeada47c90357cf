"""The measuring itself: rounds, ratios and memory, with workers whose figures are known."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import side_by_side  # noqa: E402

WORKER = """
import json, os, sys, time
_, side, setting = sys.argv[1:]
rounds = len(open(setting).readlines())
open(setting, "a").write(side + "\\n")
busy = 3.0 if rounds in (2, 3) else 1.0  # a neighbour disturbs the second round
print("noise on the way")
print(json.dumps({"seconds": busy * {"peer": 2.0, "ours": 0.5}[side], "memory_mb": 9.0}))
"""


def test_the_ratio_is_taken_within_rounds_and_sides_take_turns(tmp_path: Path) -> None:
    worker, log = tmp_path / "worker.py", tmp_path / "log"
    worker.write_text(WORKER)
    log.write_text("")
    result = side_by_side.compare(worker, str(log), rounds=3, threads=1)
    assert log.read_text().split() == ["peer", "ours", "ours", "peer", "peer", "ours"]
    assert result["ratios"] == [4.0, 4.0, 4.0]
    assert result["ratio"] == 4.0
    assert result["memory_ratio"] == 1.0
    assert result["peer"]["seconds"] == 2.0


def test_a_worker_that_fails_shows_its_error(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('no such peer')")
    with pytest.raises(RuntimeError, match="no such peer"):
        side_by_side.run_worker(worker, "peer", "x", threads=1)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("measure", ["measured_memory", "_sampled_memory"])
def test_memory_that_is_taken_and_given_back_is_seen(measure: str) -> None:
    def work() -> None:
        # Of the system, not of the allocator, which may have kept as much from earlier tests.
        with mmap.mmap(-1, 64 * 2**20) as block:
            for page in range(0, len(block), 4096):
                block[page] = 1
            time.sleep(0.5)  # held for long enough that a busy machine lets the watcher look

    assert 60 < getattr(side_by_side, measure)(work) < 80


def test_the_module_lists_the_benchmarks_beside_it() -> None:
    listed = subprocess.run(
        [sys.executable, str(FOLDER / "side_by_side.py"), "--list"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert str(FOLDER / "train_step.py") in listed
    assert not any(path.endswith("side_by_side.py") for path in listed)
