"""`train r2d2`: a run that is killed goes on with its replay and its episodes, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workshop import call

from cabochon.training.metrics import read_metrics

pytest.importorskip("gymnasium")

COMMAND = (
    "train", "r2d2", "--env", "cabochon.rl.cue_recall:CueRecall-v0", "--env-options", "delay=3",
    "--runtime", "inline", "--actors", 2, "--environments", 2, "--hidden", 8, "--lstm", 6,
    "--burn-in", 2, "--unroll-length", 4, "--batch-size", 4, "--minimum", 6,
    "--target-every", 7, "--evaluation-episodes", 2, "--video-steps", 0, "--threads", 1,
)  # fmt: skip


def learned(run: Path) -> list[dict[str, Any]]:
    """The metrics but those of the clock and of the process."""
    apart = {"seconds", "units_per_second", "inference_batch"}
    return [
        {name: value for name, value in line.items() if name not in apart}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def kept(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((run / "checkpoints" / f"step-{step}").rglob("*.safetensors")):
        found |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def test_a_killed_run_goes_on_bit_for_bit_with_its_replay(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = (*COMMAND, "--capacity", 20, "--steps", 40, "--checkpoint-every", 5)
    done = call(*words, "--out", whole)
    assert done.code == 0, done.err
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", *map(str, words), "--out", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(killed.glob("checkpoints/step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert call("resume", killed).code == 0
    assert learned(killed) == learned(whole)
    one, other = kept(whole, 40), kept(killed, 40)
    assert one.keys() == other.keys()
    assert any(name.startswith("extra/replay.items.") for name in one)
    assert any(name.startswith("acting/") for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_more_episodes_are_played_with_drawn_actions_than_there_are_rates(tmp_path: Path) -> None:
    words = [5 if before == "--evaluation-episodes" else word
             for before, word in zip(("", *COMMAND), COMMAND, strict=False)]  # fmt: skip
    done = call(*words, "--evaluation-actions", "drawn", "--steps", 1, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "mean return of 5 episodes" in done.err


def test_a_learner_that_mostly_waits_is_told_of(tmp_path: Path) -> None:
    done = call(
        *COMMAND, "--steps", 6, "--replay-ratio", 0.05, "--capacity", 400, "--out", tmp_path / "run"
    )
    assert done.code == 0, done.err
    assert "the learner waited for new sequences" in done.err
    assert "each update takes 320 new actions" in done.err


def test_a_replay_that_cannot_be_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    done = call(*COMMAND, "--capacity", 5, "--out", tmp_path / "run")
    assert done.code != 0
    assert "the replay must hold its minimum" in done.err
    assert not (tmp_path / "run").exists()
