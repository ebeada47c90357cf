"""`train bond` as a user meets it: prompts and a reward in, rollouts, metrics and a model out."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workshop import Done, Workshop, call, write_jsonl

from cabochon.rewards.experience import Experience
from cabochon.rewards.records import replayed
from cabochon.training.metrics import read_metrics

STEPS = 8


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bond")
    done = workshop.train(
        "--model", workshop.run, "--learning-rate", "1e-2", "--steps", 4, "--out", place / "model",
        algorithm="sft",
    )  # fmt: skip
    assert done.code == 0, done.err
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"{a}+1"} for a in range(6)])
    return place


def words(folder: Path, out: Path, **more: object) -> list[object]:
    given = {
        "model": folder / "model", "data": folder / "prompts.jsonl", "out": out, "steps": STEPS,
        "context": 48, "max-new-tokens": 6, "batch-size": 3, "threads": 1, "device": "cpu",
        "checkpoint-every": 2, "learning-rate": 1e-3, "reward": "length", **more,
    }  # fmt: skip
    flags: list[object] = []
    for name, value in given.items():
        if value is not None:
            flags += [f"--{name}", *([] if value is True else [value])]
    return flags


def train(folder: Path, out: Path, **more: object) -> Done:
    return call("train", "bond", *words(folder, out, **more))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    done = train(folder, folder / "whole")
    assert done.code == 0, done.err
    return folder / "whole"


def bits(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Of the model, the optimizer and the anchor."""
    found = {}
    for path in sorted((run / "checkpoints" / f"step-{step}").rglob("*.safetensors")):
        found |= {f"{path.name}:{name}": each for name, each in load_file(path).items()}
    return found


def lines(run: Path) -> list[dict[str, object]]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "units_per_second")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def recorded(run: Path) -> list[tuple[object, ...]]:
    return [told(each) for each in replayed(run / "rollouts", 0)]


def told(each: Experience) -> tuple[object, ...]:
    tokens = [[c.tokens.tolist() for c in g.completions] for g in each.groups]
    return each.writer, each.number, each.version, tokens, each.scores.total.tolist()


def assert_same_run(run: Path, other: Path, *, rollouts: bool = True) -> None:
    mine, theirs = bits(run), bits(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert lines(run) == lines(other)
    if rollouts:
        assert recorded(run) == recorded(other)


def test_a_run_leaves_metrics_rollouts_an_anchor_and_a_model(whole: Path) -> None:
    found = lines(whole)
    assert len(found) == STEPS
    for line in found:
        assert line["logprob_gap"] < 1e-5
        assert {"reward", "anchor_reward", "reward_length", "kl_anchor", "kl_start", "forward_kl",
                "backward_kl", "quantile", "log_quantile", "entropy", "no_signal",
                "stopped"} <= line.keys()  # fmt: skip
        assert line["reward"] == pytest.approx(line["completion_tokens"])
    assert any(name.startswith("extra.safetensors:") for name in bits(whole))
    rollouts = recorded(whole)
    assert [(writer, number) for writer, number, *_ in rollouts] == [
        (writer, number) for number in range(STEPS) for writer in ("policy", "anchor")
    ]
    done = call("data", "inspect", whole / "rollouts")
    assert done.code == 0, done.err


def test_a_run_killed_without_warning_resumes_bit_for_bit(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "train", "bond", *map(str, words(folder, out))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        if (out / "checkpoints" / "step-4").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert (out / "checkpoints").exists(), said
    done = call("resume", out, "--json")
    assert done.code == 0, done.err
    assert_same_run(out, whole)


def test_a_run_is_replayed_to_the_same_bits(folder: Path, whole: Path, tmp_path: Path) -> None:
    done = train(folder, tmp_path / "run", replay=whole, reward=None, data=None)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "run", whole, rollouts=False)
    assert not (tmp_path / "run" / "rollouts").exists()


def test_quantiles_of_more_draws_and_an_anchor_that_is_copied(folder: Path, tmp_path: Path) -> None:
    more = {"n": 4, "quantile": "floor", "anchor-samples": 6, "samples": 2, "baseline": "prompt",
            "anchor": "copy", "anchor-every": 3, "ties": "hash", "no-start-kl": True,
            "no-rollouts": True, "steps": 4}  # fmt: skip
    done = train(folder, tmp_path / "run", **more)
    assert done.code == 0, done.err
    (*_, last) = lines(tmp_path / "run")
    assert "kl_start" not in last
    assert last["no_signal"] == 0.0
    assert not (tmp_path / "run" / "rollouts").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"quantile": "learned"},
        {"quantile": "learned", "quantile-model": "network", "backward": 1.0, "n": 4,
         "anchor-samples": 1},
    ],
)  # fmt: skip
def test_learned_quantiles_are_in_the_checkpoints_and_a_resumed_run_is_the_same(
    folder: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    whole = tmp_path / "whole"
    done = train(folder, whole, **more)
    assert done.code == 0, done.err
    assert any(name.startswith("extra.safetensors:critic.head") for name in bits(whole))
    (first, *_, last) = lines(whole)
    assert first["quantile_loss"] == pytest.approx(math.log(2.0), abs=1e-4)
    assert last["quantile_loss"] != first["quantile_loss"]
    part = shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / f"step-{STEPS}")
    done = call("resume", part)
    assert done.code == 0, done.err
    assert_same_run(part, whole)
    replay = train(folder, tmp_path / "again", replay=whole, reward=None, data=None, **more)
    assert replay.code == 0, replay.err
    assert_same_run(tmp_path / "again", whole, rollouts=False)


def test_plan_and_doctor_know_it(folder: Path, tmp_path: Path) -> None:
    done = call("plan", "bond", *words(folder, tmp_path / "run"), "--json")
    assert done.code == 0, done.err
    assert "anchor" in done.answer["not_counted"]
    done = call("doctor", "bond", *words(folder, tmp_path / "run"))
    assert done.code == 0, done.err + done.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "what is good? --reward"),
        ({"reward": "parse"}, "parses"),
        ({"replay": "nowhere"}, "there is no such run"),
        ({"batch-size": 1}, "no others to be compared with"),
        ({"n": 4}, "2 <= n <= anchor_samples"),
        ({"max-new-tokens": 60}, "leaves no room for 60 new ones"),
    ],
)
def test_what_cannot_be_is_said_before_a_run_directory_exists(
    folder: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    done = train(folder, tmp_path / "run", **changes)
    assert done.code in (1, 2)
    assert message in done.err
    assert not (tmp_path / "run").exists()


def test_a_policy_that_leaves_its_anchor_is_stopped_and_the_last_checkpoint_stays(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train(folder, run, **{"learning-rate": 30.0, "max-kl": 0.5, "warmup": 0,
                                 "checkpoint-every": 1, "anchor": "frozen"})  # fmt: skip
    assert done.code != 0
    assert re.search(r"update \d: KL to the anchor is .* above max_kl 0.5", done.err)
    assert any((run / "checkpoints").iterdir())
