"""`train vtrace_agent`: from the command to agent, episodes, film and page; killed and resumed."""

from __future__ import annotations

import json
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

from cabochon.cli.vtrace_agent import RECIPE, HeadSettings, VtraceAgentSettings
from cabochon.data.rlds.reader import Episodes
from cabochon.models.agents.networks import NetworkConfig, Signature
from cabochon.training.metrics import read_metrics

pytest.importorskip("gymnasium")

SMALL = (
    "train", "vtrace_agent", "--env", "CartPole-v1", "--actors", 2, "--environments", 2,
    "--batch-size", 4, "--unroll-length", 5, "--own-layers", 16, "--threads", 1,
)  # fmt: skip


def learned(run: Path) -> list[dict[str, Any]]:
    """The metrics but those of the clock."""
    apart = {"seconds", "units_per_second"}
    return [
        {name: value for name, value in line.items() if name not in apart}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def kept(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((run / "checkpoints" / f"step-{step}").rglob("*.safetensors")):
        found |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize("runtime", ["threads", "processes"])
def test_a_run_learns_plays_records_and_reports(tmp_path: Path, runtime: str) -> None:
    run = tmp_path / "run"
    done = call(
        *SMALL, "--runtime", runtime, "--steps", 30, "--record", "--evaluation-episodes", 3,
        "--max-episode-steps", 60, "--out", run, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["complete"]
    assert answer["steps"] == 30
    assert answer["frames"] >= 600
    assert len(answer["evaluation"]["returns"]) == 3
    assert json.loads((run / "evaluation.json").read_text()) == answer["evaluation"]
    episodes = Episodes(run / "episodes")
    assert len(episodes) >= 5
    for episode in episodes:
        assert episode.total_reward() == episode.transitions <= 60
        assert episode.terminated == (episode.transitions < 60) or episode.terminated
    assert call("data", "inspect", run / "episodes").code == 0
    assert call("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "vtrace_agent on CartPole-v1" in page
    assert "mean return of the last 100 episodes" in page
    again = call("resume", run)
    assert again.code == 0
    assert "complete" in again.err


def test_an_inline_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = (
        *SMALL, "--runtime", "inline", "--lag", 2, "--lstm", 8, "--previous", "--steps", 60,
        "--checkpoint-every", 5, "--evaluation-episodes", 0, "--max-episode-steps", 9, "--record",
    )  # fmt: skip
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
    one, other = kept(whole, 60), kept(killed, 60)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    names = [str(each.metadata["episode_id"]) for each in Episodes(killed / "episodes")]
    assert len(names) == len(set(names)) > 10  # none was recorded twice


def test_a_run_beside_its_actors_stops_at_a_signal_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (*SMALL, "--steps", 100_000, "--evaluation-episodes", 0, "--out", run)
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = run / "metrics.jsonl"
    while process.poll() is None and (not lines.is_file() or lines.stat().st_size < 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "go on with: cabochon resume" in err
    config = run / "config.yaml"
    saved = int(next(run.glob("checkpoints/step-*")).name.removeprefix("step-"))
    assert saved >= 3
    assert "steps: 100000" in config.read_text()


def test_what_cannot_work_is_said_before_there_is_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for words, said in (
        ((), "--env CartPole-v1"),
        (("--env", "CartPol-v1"), "Did you mean: `CartPole`"),
        (("--env", "CartPole-v1", "--lag", 3), "--runtime inline alone"),
        (("--env", "CartPole-v1", "--env-options", "colour"), "different names with values"),
        (("--env", "CartPole-v1", "--env-options", "colour=1"), "colour"),
        (("--env", "CartPole-v1", "--torso", "nature"), "take mlp"),
        (("--env", "CartPole-v1", "--inference-batch", 99), "never be full"),
        (("--env", "MountainCarContinuous-v0"), "Discrete"),
        (("--env", "CartPole-v1", "--runtime", "processes", "--actors", 90_000), "fit. Ask for"),
    ):
        done = call("train", "vtrace_agent", *words, "--out", out)
        assert done.code == 2, (words, done.err)
        assert said in done.err, done.err
        assert not out.exists()
    done = call("train", "vtrace_agnet", "--env", "CartPole-v1")
    assert done.code == 2
    assert "vtrace_agent" in done.err


def test_a_plan_says_what_fits(tmp_path: Path) -> None:
    done = call("plan", *SMALL[1:], "--steps", 50, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["frames"] == {"per_update": 20, "total": 1000}
    assert plan["fits"]
    assert plan["time"]["seconds"] > 0
    many = ("--env", "CartPole-v1", "--runtime", "processes", "--actors", 90_000)
    done = call("plan", "vtrace_agent", *many)
    assert done.code == 1
    assert "does not fit" in done.out


def test_policy_and_value_have_layers_of_their_own_where_nothing_else_is_said() -> None:
    vector = Signature(shape=(4,), dtype="float32", actions=2)
    picture = Signature(shape=(8, 8), dtype="uint8", actions=2)
    shared, own = NetworkConfig(hidden=(32,)), HeadSettings(own_layers=(8,))
    for settings, seen, widths in (
        (VtraceAgentSettings(), vector, [64, 64]),
        (VtraceAgentSettings(), picture, []),
        (VtraceAgentSettings(network=shared), vector, []),
        (VtraceAgentSettings(network=shared, heads=own), vector, [8]),
        (VtraceAgentSettings(heads=own), picture, [8]),
    ):
        assert RECIPE.head_settings(settings, seen) == {"hidden": widths}
