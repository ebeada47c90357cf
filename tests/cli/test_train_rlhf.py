"""`train rlhf` as a user meets it: prompts and a reward in; rollouts, metrics and a model out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workshop import Done, Workshop, call, write_jsonl

from cabochon.rewards.records import replayed
from cabochon.training.metrics import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that had some tuning, and prompts."""
    place = tmp_path_factory.mktemp("rlhf")
    words = ("--model", workshop.run, "--learning-rate", "1e-2", "--steps", 2)
    done = workshop.train(*words, "--out", place / "policy", algorithm="sft")
    assert done.code == 0, done.err
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"{a}+1"} for a in range(6)])
    return place


def words(folder: Path, out: Path, **more: object) -> list[object]:
    given = {
        "model": folder / "policy", "reward": "length:3", "data": folder / "prompts.jsonl",
        "out": out, "steps": STEPS, "context": 48, "max-new-tokens": 6, "batch-size": 2,
        "samples": 3, "threads": 1, "device": "cpu", "checkpoint-every": 2, "anchor": "ema",
        "anchor-rate": 0.2, "learning-rate": 1e-3, **more,
    }  # fmt: skip
    flags: list[object] = []
    for name, value in given.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", value]
    return flags


def train(folder: Path, out: Path, **more: object) -> Done:
    return call("train", "rlhf", *words(folder, out, **more))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    done = train(folder, folder / "whole")
    assert done.code == 0, done.err
    return folder / "whole"


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    times = ("seconds", "units_per_second")
    return [
        {name: value for name, value in line.items() if name not in times}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def assert_same_run(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert metrics(run) == metrics(other)


def test_a_run_leaves_metrics_rollouts_and_a_model(folder: Path, whole: Path) -> None:
    lines = metrics(whole)
    assert len(lines) == STEPS
    for line in lines:
        assert -1.0 <= line["reward"] <= 0.0
        assert line["reward_length:3"] == pytest.approx(line["reward"])
        assert line["kl_k3"] >= 0.0
        assert line["logprob_gap"] < 1e-5
        assert line["entropy"] > 0.0
        assert line["lag"] == 0.0
    assert lines[0]["kl_k1"] == pytest.approx(0.0, abs=1e-4)
    found = list(replayed(whole / "rollouts", 0))
    assert [each.number for each in found] == [each.version for each in found] == [*range(STEPS)]
    for each, line in zip(found, lines, strict=True):
        assert len(each.groups) == 2
        assert all(len(group.completions) == 3 for group in each.groups)
        assert float(each.scores.total.mean()) == pytest.approx(line["reward"], abs=1e-6)
        assert list(each.scores.parts) == ["length:3"]
    done = call("data", "inspect", whole / "rollouts", "--json")
    assert done.code == 0, done.err
    assert '"episodes": 36' in json.dumps(done.answer)


def test_records_are_learned_from_again_without_sampler_reward_and_data(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cabochon.models.gemma import Gemma

    monkeypatch.setattr(Gemma, "new_cache", None)  # no sampler can do without
    done = train(folder, tmp_path / "again", replay=whole, reward=None, data=None)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "again", whole)
    assert not (tmp_path / "again" / "rollouts").exists()
    longer = train(folder, tmp_path / "no", replay=whole, reward=None, data=None, steps=9)
    assert longer.code == 2
    assert "holds 6 micro-batches, the run would learn from 9" in longer.err
    assert train(folder, tmp_path / "no", replay=folder / "gone", data=None).code == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("more", [{"batch-size": 3}, {"max-new-tokens": 2}])
def test_records_that_other_settings_drew_are_not_replayed(
    folder: Path, whole: Path, tmp_path: Path, more: dict[str, int]
) -> None:
    kept = {"replay": whole, "reward": None, "data": None}
    done = train(folder, tmp_path / "again", **kept, **more)
    assert done.code == 2
    assert "is of 2 prompts, with completions of up to" in done.err
    assert not (tmp_path / "again").exists()


def test_a_run_that_was_moved_is_resumed_where_it_is(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "old").code == 0
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "checkpoints" / f"step-{STEPS}")
    done = call("resume", tmp_path / "new")
    assert done.code == 0, done.err
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "new" / "checkpoints" / f"step-{STEPS}").is_dir()


@pytest.mark.parametrize("more", [{}, {"baseline": "value", "updates": 2, "correction": "clip"}])
def test_a_run_killed_without_warning_resumes_bit_for_bit(
    folder: Path, whole: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    if more:
        whole = tmp_path / "whole"
        assert train(folder, whole, **more).code == 0
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "train", "rlhf", *map(str, words(folder, out, **more))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        if (out / "checkpoints" / "step-2").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert (out / "checkpoints").is_dir(), said
    done = call("resume", out)
    assert done.code == 0, done.err
    assert_same_run(out, whole)
    mine, theirs = (list(replayed(each / "rollouts", 0)) for each in (out, whole))
    assert [each.number for each in mine] == [*range(STEPS)]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.scores.total, other.scores.total)
    carried = out / "checkpoints" / f"step-{STEPS}" / "extra.safetensors"
    assert any(name.startswith("critic.") for name in load_file(carried)) == bool(more)


def test_a_policy_that_explodes_is_stopped_and_the_last_good_checkpoint_named(
    folder: Path, tmp_path: Path
) -> None:
    done = train(folder, tmp_path / "run", **{
        "learning-rate": 3.0, "max-kl": 0.5, "kl-weight": 0.0, "steps": 40, "checkpoint-every": 1,
        "warmup": 0, "anchor": "frozen",
    })  # fmt: skip
    assert done.code != 0
    assert "KL to the anchor is" in done.err
    assert "last good checkpoint" in done.err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_what_is_missing_is_said_before_there_is_a_run(folder: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"reward": None}, "what is good? --reward"),
        ({"reward": "parse"}, "parses"),
        ({"data": None}, "rlhf needs data"),
        ({"samples": 1}, "compares samples of a prompt"),
        ({"max-new-tokens": 48}, "leaves no room"),
        ({"baseline": "batch", "samples": 1, "batch-size": 1}, "no others to be compared with"),
    ):
        done = train(folder, tmp_path / "run", **more)
        assert done.code in (1, 2), (more, done.err)
        assert said in done.err, done.err
        assert not (tmp_path / "run").exists()


def test_what_a_run_would_take_is_told(folder: Path, tmp_path: Path) -> None:
    done = call("plan", "rlhf", *words(folder, tmp_path / "run"), "--json")
    assert done.code == 0, done.err
    assert "anchor" in done.answer["not_counted"]
