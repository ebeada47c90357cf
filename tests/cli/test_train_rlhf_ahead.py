"""`train rlhf --lag`: a writer ahead of the learner, recorded, killed, resumed and replayed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from test_train_rlhf import STEPS, assert_same_run, folder, metrics, train, words
from workshop import call

from cabochon.rewards.records import replayed

__all__ = ["folder"]


def test_a_run_ahead_is_recorded_resumed_after_a_kill_and_replayed(
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    more = {"lag": 2, "correction": "truncate"}
    flags = map(str, words(folder, out, **more))
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "train", "rlhf", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(6000):
        if (out / "checkpoints" / "step-2").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = call("resume", out)
    assert done.code == 0, done.err
    assert max(line["lag"] for line in metrics(out)) <= 2.0
    found = list(replayed(out / "rollouts", 0))
    assert [each.number for each in found] == [*range(STEPS)]
    assert all(0 <= each.number - each.version <= 2 for each in found)
    more = {"replay": out, "reward": None, "data": None, "correction": "truncate"}
    again = train(folder, tmp_path / "again", **more)
    assert again.code == 0, again.err
    assert_same_run(tmp_path / "again", out)


def test_a_lag_needs_a_correction(folder: Path, tmp_path: Path) -> None:
    done = train(folder, tmp_path / "no", lag=1)
    assert done.code == 2
    assert "needs --correction truncate" in done.err
    done = train(folder, tmp_path / "no", lag=-1)
    assert done.code == 2
    assert "0 or more" in done.err
    assert not (tmp_path / "no").exists()
