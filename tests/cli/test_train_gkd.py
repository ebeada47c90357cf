"""`train gkd` as a user meets it: prompts and conversations in, samples and metrics out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from workshop import Done, Workshop, call, write_jsonl

import cabochon
from cabochon.rewards.records import replayed
from cabochon.training.metrics import read_metrics

sys.path.append(str(Path(__file__).parents[1] / "generation"))
import local_server

STEPS = 8


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher that both had some tuning, and prompts."""
    place = tmp_path_factory.mktemp("gkd")
    for name, steps in (("student", 2), ("teacher", 20)):
        words = ("--model", workshop.run, "--learning-rate", "1e-2", "--steps", steps)
        done = workshop.train(*words, "--out", place / name, algorithm="sft")
        assert done.code == 0, done.err
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"{a}+1"} for a in range(6)])
    return place


def words(folder: Path, out: Path, **more: object) -> list[object]:
    given = {
        "student": folder / "student", "teacher": folder / "teacher",
        "data": folder / "prompts.jsonl", "out": out, "steps": STEPS, "context": 48,
        "max-new-tokens": 6, "batch-size": 2, "threads": 1, "device": "cpu",
        "checkpoint-every": 2, "sample-every": 3, **more,
    }  # fmt: skip
    flags: list[object] = []
    for name, value in given.items():
        if value is not None:
            flags += [f"--{name}", value]
    return flags


def train(folder: Path, out: Path, **more: object) -> Done:
    return call("train", "gkd", *words(folder, out, **more))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    done = train(folder, folder / "whole")
    assert done.code == 0, done.err
    return folder / "whole"


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "units_per_second")}
            for line in read_metrics(each / "metrics.jsonl")
        ]
        for each in (run, other)
    ]
    assert lines[0] == lines[1]
    texts = [
        {path.name: path.read_text() for path in (each / "samples").iterdir()}
        for each in (run, other)
    ]
    assert texts[0] == texts[1]


def test_a_run_leaves_metrics_samples_and_a_model(folder: Path, whole: Path) -> None:
    lines = list(read_metrics(whole / "metrics.jsonl"))
    assert len(lines) == STEPS
    for line in lines:
        assert line["loss"] == pytest.approx(line["divergence"])
        assert line["on_policy"] == 1.0
        assert 1.0 <= line["completion_tokens"] <= 6.0
        assert 0.0 <= line["stopped"] <= 1.0
        assert line["logprob_gap"] < 1e-5
        assert "reward" not in line
    assert {path.name for path in (whole / "samples").iterdir()} == {
        "step-0.jsonl", "step-3.jsonl", "step-6.jsonl",
    }  # fmt: skip
    recorded = (whole / "samples" / "step-3.jsonl").read_text()
    samples = [json.loads(line) for line in recorded.splitlines()]
    assert len(samples) == 2
    _, tokenizer = cabochon.load(whole / "checkpoints" / f"step-{STEPS}" / "model")
    for sample in samples:
        assert "+1" in sample["prompt"]
        assert sample["completion"] == tokenizer.decode(sample["tokens"])
        assert len(sample["logprobs"]) == len(sample["tokens"])
    drawn = list(replayed(whole / "rollouts", 0))
    assert [each.number for each in drawn] == [*range(STEPS)]
    texts = [tokenizer.decode(g.completions[0].tokens.tolist()) for g in drawn[3].groups]
    assert texts == [sample["completion"] for sample in samples]
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["algorithm"] == "gkd"
    assert config["model"]["source"] == str(folder / "student")


def test_a_reward_beside_the_teacher(folder: Path, tmp_path: Path) -> None:
    more = {"distillation-weight": 0.5, "samples": 2, "reward": "length:3", "steps": 2}
    done = train(folder, tmp_path / "run", **more)
    assert done.code == 0, done.err
    assert all(
        -1.0 <= line["reward"] <= 0.0 for line in read_metrics(tmp_path / "run/metrics.jsonl")
    )
    assert [each.judged for each in replayed(tmp_path / "run" / "rollouts", 0)] == [True, True]


def test_a_settings_file_says_the_same_as_flags(folder: Path, whole: Path, tmp_path: Path) -> None:
    given = words(folder, tmp_path / "run")
    content = {
        str(flag)[2:].replace("-", "_"): value if isinstance(value, int) else str(value)
        for flag, value in zip(given[::2], given[1::2], strict=True)
    }
    path = tmp_path / "gkd.yaml"
    path.write_text(yaml.safe_dump(content))
    done = call("train", "gkd", "--config", path, "--json")
    assert done.code == 0, done.err
    assert done.answer["complete"] is True
    assert_same_run(tmp_path / "run", whole)


def test_a_run_killed_without_warning_resumes_bit_for_bit(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "train", "gkd", *map(str, words(folder, out))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3000):
        if (out / "checkpoints" / "step-4").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert (out / "checkpoints").exists(), said
    done = call("resume", out, "--json")
    assert done.code == 0, done.err
    assert_same_run(out, whole)


def test_resuming_from_an_earlier_checkpoint_writes_the_same_samples(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    assert train(folder, tmp_path / "run", keep=4).code == 0
    assert call("resume", tmp_path / "run", "--step", 2).code == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_student_that_writes_by_a_coin_resumes_where_it_wrote_nothing(
    workshop: Workshop, folder: Path, tmp_path: Path
) -> None:
    """Of micro-batches that it did not write there is no record; this one's coin says so often."""
    more: dict[str, object] = {"preset": "imit_kd", "seed": 1, "data": workshop.chats}
    assert train(folder, tmp_path / "whole", **more).code == 0
    assert train(folder, tmp_path / "run", keep=4, **more).code == 0
    done = call("resume", tmp_path / "run", "--step", 2)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("preset", "on_policy"),
    [("sft", 0.0), ("seq_kd", 0.0), ("supervised_kd", 0.0), ("imit_kd", None)],
)
def test_every_preset_trains(
    workshop: Workshop, folder: Path, tmp_path: Path, preset: str, on_policy: float | None
) -> None:
    more = {"teacher": None} if preset == "sft" else {}
    data = folder / "prompts.jsonl" if preset == "seq_kd" else workshop.chats
    done = train(folder, tmp_path / "run", preset=preset, data=data, draw="sequence",
                 divergence="forward_kl", **more)  # fmt: skip
    assert done.code == 0, done.err
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    shares = {line["on_policy"] for line in lines}
    assert shares == {on_policy} if on_policy is not None else len(shares) > 1


def test_a_cached_teacher_serves_where_the_student_does_not_write(
    workshop: Workshop, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    done = call(
        "data", "cache-teacher", folder / "teacher", "--data", workshop.chats,
        "--chat", "--context", 48, "--top-k", 400, "--out", cache, "--threads", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    losses = []
    for teacher in (folder / "teacher", cache):
        run = tmp_path / f"run-{teacher.name}"
        done = train(folder, run, teacher=teacher, preset="supervised_kd", data=workshop.chats)
        assert done.code == 0, done.err
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    own = train(folder, tmp_path / "own", teacher=cache)
    assert own.code == 2
    assert "what a student writes is new" in own.err
    new = write_jsonl(tmp_path / "new.jsonl", [{"prompt": "9+9", "completion": "18"}])
    other = train(folder, tmp_path / "other", teacher=cache, preset="supervised_kd", data=new)
    assert other.code == 1
    assert "a document of" in other.err


def test_a_served_teacher_judges_what_the_student_writes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    newest = max((folder / "teacher" / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    model, tokenizer = cabochon.load(newest / "model")
    world = local_server.World(model=model, tokenizer=tokenizer, max_logprobs=400)
    found = {}
    with local_server.serving(world) as transport:
        for name, teacher in (("served", transport.url), ("resident", folder / "teacher")):
            more = {"teacher-top-k": 400, "divergence": "reverse_kl", "steps": 3}
            done = train(folder, tmp_path / name, teacher=teacher, **more)
            assert done.code == 0, done.err
            found[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert found["served"] == pytest.approx(found["resident"], abs=1e-3)


def test_plain_texts_begin_with_bos_and_end_with_eos(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "def ", "completion": "f(x):\n    return x\n"}] * 3
    data = write_jsonl(tmp_path / "plain.jsonl", rows)
    run = tmp_path / "run"
    done = call("train", "gkd", *words(folder, run, data=data, preset="supervised_kd"), "--plain")
    assert done.code == 0, done.err
    turns = write_jsonl(tmp_path / "turns.jsonl", [{"messages": [
        {"role": "user", "content": "a"}, {"role": "model", "content": "b"},
        {"role": "user", "content": "c"},
    ]}])  # fmt: skip
    done = call("train", "gkd", *words(folder, tmp_path / "second", data=turns), "--plain")
    assert done.code == 1
    assert f"{turns}:1: a plain text is a prompt and perhaps its completion" in done.err


def test_plan_and_doctor_know_it(folder: Path, tmp_path: Path) -> None:
    plan = call("plan", "gkd", *words(folder, tmp_path / "run"), "--json")
    assert plan.code == 0, plan.err
    assert plan.answer["memory_bytes"]["teacher"] > 0
    assert "drawing the completions" in plan.answer["not_counted"]
    found = call("doctor", "gkd", *words(folder, tmp_path / "run"), "--json")
    assert found.code == 0, found.out
    names = {check["name"] for check in found.answer["checks"]}
    assert any("prompts of" in name for name in names)
    assert found.answer["well"] is True
    tight = call("doctor", "gkd", *words(folder, tmp_path / "run", context=16), "--json")
    assert tight.code == 1


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"teacher": None}, 2, "on_policy needs --teacher"),
        ({"preset": "sft"}, 2, "leave --teacher out"),
        ({"divergence": "jsd", "divergence-parameter": 1.5}, 2, "beta must lie in [0, 1]"),
        ({"distillation-weight": 0.5, "samples": 2}, 2, "--reward goes with"),
        ({"reward": "length"}, 2, "--reward goes with"),
        ({"preset": "supervised_kd"}, 1, "prompts.jsonl:1: nothing is said after the last prompt"),
        ({"context": 12}, 1, "leaves no room for 6 new ones in a row of 12"),
        ({"weights": 1.0}, 2, "prompts come from files of prompts"),
        ({"context": 100_000}, 2, "rows of 100000 tokens are longer than"),
        ({"sample-every": -1}, 2, "sample_every must be at least 0"),
        ({"student": "nowhere"}, 2, "there is no model folder or run at nowhere"),
        ({"student": "gemma2-nano", "model": "gemma2-mini"}, 2, "--student and --model name"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run_begins(
    folder: Path, tmp_path: Path, more: dict[str, object], code: int, said: str
) -> None:
    done = train(folder, tmp_path / "run", **more)
    assert done.code == code, done.err
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_prompts_too_long_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1"}, {"prompt": "1+" * 100}]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows)
    done = train(folder, tmp_path / "run", data=data, **{"too-long": "drop"})
    assert done.code == 0, done.err
    assert "left out 1 prompts" in done.err


def test_a_teacher_with_another_tokenizer_is_refused(
    workshop: Workshop, folder: Path, tmp_path: Path
) -> None:
    words_ = ("--data", workshop.corpus, "--vocab-size", 390, "--out", tmp_path / "tok")
    assert call("data", "tokenizer", *words_).code == 0
    done = workshop.train(
        "--tokenizer", tmp_path / "tok", "--out", tmp_path / "other", "--steps", 1
    )
    assert done.code == 0, done.err
    done = train(folder, tmp_path / "run", teacher=tmp_path / "other")
    assert done.code == 1
    assert "do not share a vocabulary" in done.err
