"""`train reward_model`, `train dpo`, `run warm` and their evaluations, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import SMALL, Done, Workshop, call, write_jsonl

from cabochon import folders
from cabochon.models.reward_head import is_reward_model
from cabochon.rewards.records import replayed
from cabochon.training import checkpoint


def rows(first: int, last: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(first, last)
        for b in range(5)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows(0, 6))


def train(algorithm: str, pairs: Path, out: Path, *more: object) -> Done:
    return call(
        "train", algorithm, "--data", pairs, "--out", out, "--steps", 6, "--context", 64,
        "--batch-size", 4, "--threads", 1, "--device", "cpu", "--checkpoint-every", 2, *more,
    )  # fmt: skip


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.completed(run / "checkpoints")[step] / "model"
    read: Any = folders.load_reward if is_reward_model(folder) else folders.load
    model, _ = read(folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("algorithm", ["reward_model", "dpo"])
def test_a_run_that_is_cut_goes_on_to_the_same_bits(
    algorithm: str, workshop: Workshop, pairs: Path, tmp_path: Path
) -> None:
    begin: tuple[object, ...] = ("--model", workshop.model, "--learning-rate", 0.001)
    begin += ("--dropout", 0.2) if algorithm == "reward_model" else ("--strength", 0.5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(algorithm, pairs, whole, *begin).code == 0
    done = train(algorithm, pairs, cut, *begin)
    assert done.code == 0, done.err
    done = call("resume", cut, "--step", 4)
    assert done.code == 0, done.err
    for name, weight in weights(whole, 6).items():
        assert torch.equal(weight, weights(cut, 6)[name]), name


def test_a_new_reward_model_is_judged_with_an_interval_and_is_a_reward(
    workshop: Workshop, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "judge"
    done = train("reward_model", pairs, run, "--tokenizer", workshop.tokenizer, *SMALL)
    assert done.code == 0, done.err
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows(6, 9))
    found = call("evaluate", "preferences", run, held_out, "--json").answer
    assert found["pairs"] == 15
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(7, 9)]
    file = write_jsonl(tmp_path / "texts.jsonl", texts)
    scales = tmp_path / "scales.json"
    done = call(
        "evaluate", "rewards", file, "--tokenizer", run, "--reward", run, "length", "--save",
        scales, "--json",
    )  # fmt: skip
    assert done.answer["texts"] == 10
    assert set(done.answer["rewards"]) == {"total", str(run), "length"}
    assert json.loads(scales.read_text())["length"]["samples"] == 10
    done = call("generate", run, "--prompt", "2+2")
    assert done.code == 1
    assert "judges texts and writes none" in done.err
    done = call(
        "train", "rlhf", "--model", workshop.run, "--data", file, "--reward", run, "--steps", 2,
        "--max-new-tokens", 4, "--context", 48, "--batch-size", 2, "--threads", 1,
        "--out", tmp_path / "learned",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"reward_{run}" in (tmp_path / "learned" / "metrics.jsonl").read_text()
    (first, *_) = replayed(tmp_path / "learned" / "rollouts", 0)
    assert set(first.scores.parts) == {str(run)}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "1+1", "chosen": "2", "rejected": "2"}, "pairs.jsonl:2: both answers are the"),
        ({"prompt": "1+1", "chosen": "2", "rejected": ""}, "pairs.jsonl:2: the answer in 'rej"),
        ({"prompt": "1+1", "chosen": "2"}, "pairs.jsonl:2: no field 'rejected'"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_or_counted(
    bad: dict[str, str], said: str, workshop: Workshop, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [*rows(0, 1)[:1], bad, *rows(1, 3)])
    begin = ("--model", workshop.model)
    done = train("reward_model", file, tmp_path / "run", *begin)
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "run").exists()
    done = train("reward_model", file, tmp_path / "run", *begin, "--unusable", "drop")
    assert done.code == 0, done.err
    assert "left out 1 rows that are no pairs" in done.err


def test_an_odd_batch_and_packed_rows_are_refused(
    workshop: Workshop, pairs: Path, tmp_path: Path
) -> None:
    done = call(
        "train", "dpo", "--data", pairs, "--out", tmp_path / "a", "--model", workshop.model,
        "--context", 64, "--batch-size", 3,
    )  # fmt: skip
    assert "must be even" in done.err
    done = train("dpo", Path("stdlib"), tmp_path / "b", "--model", workshop.model)
    assert "files of pairs" in done.err


def test_doctor_and_plan_know_pairs(workshop: Workshop, pairs: Path) -> None:
    done = call("doctor", "dpo", "--model", workshop.model, "--data", pairs, "--context", 64,
                "--json")  # fmt: skip
    assert done.code == 0, done.err
    texts = " ".join(check["text"] for check in done.answer["checks"])
    assert "30 pairs" in texts
    assert "the preferred answer is the longer one in" in texts
    for algorithm in ("reward_model", "dpo"):
        done = call("plan", algorithm, "--model", workshop.model, "--data", pairs, "--context", 64,
                    "--batch-size", 4, "--json")  # fmt: skip
        assert done.code == 0, done.err
        assert done.answer["memory_bytes"]["peak"] > 0


def test_run_warm_averages_and_is_resumed(workshop: Workshop, pairs: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows(6, 9))
    starts = [workshop.run / "checkpoints" / f"step-{n}" / "model" for n in (4, 6)]
    out = tmp_path / "warm"
    done = call(
        "run", "warm", "--out", out, "--starts", *starts, "--data", pairs, "--held-out", held_out,
        "--members", 2, "--steps", 2, "--probe-steps", 2, "--batch-size", 4, "--context", 64,
        "--threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.answer["sets"]["held_out"]["pairs"] == 15
    again = call("resume", out, "--json")
    assert again.code == 0, again.err
    assert again.answer == done.answer
    assert call("evaluate", "preferences", out / "warm", held_out, "--json").code == 0
    alone = call(
        "run", "warm", "--out", tmp_path / "none", "--starts", starts[0], workshop.tokenizer,
        "--data", pairs, "--held-out", held_out,
    )  # fmt: skip
    assert alone.code == 1
    assert not (tmp_path / "none").exists()
