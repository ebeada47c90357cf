"""Training as a user does it: files in, a run directory out, and on again after any end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from workshop import SMALL, Workshop, call, write_jsonl

import cabochon
from cabochon.training.metrics import read_metrics


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_run_leaves_its_settings_metrics_and_a_model_folder(workshop: Workshop) -> None:
    config = yaml.safe_load((workshop.run / "config.yaml").read_text())
    assert config["algorithm"] == "pretrain"
    assert config["steps"] == 6
    assert config["data"] == [str(workshop.corpus)]
    assert config["model"]["width"] == 32
    lines = list(read_metrics(workshop.run / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(p.name for p in (workshop.run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    model, tokenizer = cabochon.load(workshop.model)
    assert model.config.vocab_size == tokenizer.vocab_size == 400


def test_the_answer_is_one_json_object_and_the_rest_goes_to_standard_error(
    workshop: Workshop, tmp_path: Path
) -> None:
    done = workshop.train("--out", tmp_path / "run", "--steps", 2, "--json")
    assert done.code == 0
    assert done.answer["complete"] is True
    assert done.answer["steps"] == 2
    assert Path(done.answer["checkpoint"]).is_dir()
    assert "tokens/s" in done.err


def test_the_settings_of_a_run_are_a_settings_file(workshop: Workshop, tmp_path: Path) -> None:
    """And the run they describe is the same run, bit for bit."""
    words = ("--config", workshop.run / "config.yaml", "--out", tmp_path / "again")
    assert call("train", "pretrain", *words).code == 0
    assert same(weights(workshop.run, 6), weights(tmp_path / "again", 6))
    wrong = call("train", "sft", *words[:2], "--out", tmp_path / "other")
    assert wrong.code == 2
    assert "its algorithm is not sft" in wrong.err


def start(workshop: Workshop, out: Path) -> subprocess.Popen[str]:
    """A run of 40 updates in a process of its own, a checkpoint after every second one."""
    words = (
        "train", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--steps", 40, "--context", 64, "--batch-size", 2, "--threads", 1, "--device", "cpu",
        "--checkpoint-every", 2, "--ema", 0.9, "--out", out, *SMALL,
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "cabochon", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = workshop.train("--out", out, "--steps", 40, "--ema", 0.9)
    assert done.code == 0, done.err
    return out


def assert_is_the_uninterrupted_run(run: Path, whole: Path) -> None:
    assert same(weights(run, 40), weights(whole, 40))
    for name in ("optimizer.safetensors", "ema.safetensors"):
        mine, other = (load_file(r / "checkpoints" / "step-40" / name) for r in (run, whole))
        assert same(mine, other)
    losses = [[line["loss"] for line in read_metrics(r / "metrics.jsonl")] for r in (run, whole)]
    assert losses[0] == losses[1]


def test_a_run_killed_without_warning_resumes_bit_for_bit(
    workshop: Workshop, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    process = start(workshop, out)
    wait_for(out / "checkpoints" / "step-6", process)
    process.kill()
    process.communicate()
    assert not (out / "checkpoints" / "step-40").exists()
    done = call("resume", out, "--json")
    assert done.code == 0, done.err
    assert done.answer["complete"] is True
    assert "going on after update" in done.err
    assert_is_the_uninterrupted_run(out, uninterrupted)


def test_sigterm_saves_then_stops_and_says_how_to_go_on(
    workshop: Workshop, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    process = start(workshop, out)
    wait_for(out / "checkpoints" / "step-4", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after" in said
    assert f"cabochon resume {out}" in said
    assert call("resume", out).code == 0
    assert_is_the_uninterrupted_run(out, uninterrupted)


def test_resuming_a_complete_run_says_so_and_changes_nothing(workshop: Workshop) -> None:
    before = {p: p.stat().st_mtime_ns for p in workshop.run.rglob("*") if p.is_file()}
    done = call("resume", workshop.run, "--json")
    assert done.code == 0
    assert "is complete: all 6 updates were made" in done.err
    assert done.answer["complete"] is True
    after = {p: p.stat().st_mtime_ns for p in workshop.run.rglob("*") if p.is_file()}
    assert before == after


@pytest.fixture
def begun(workshop: Workshop, tmp_path: Path) -> Path:
    """A run, its corpus and its tokenizer beside it, whose last checkpoint was taken away."""
    shutil.copy(workshop.corpus, tmp_path / "corpus.jsonl")
    shutil.copytree(workshop.tokenizer, tmp_path / "tok")
    words = ("--data", tmp_path / "corpus.jsonl", "--tokenizer", tmp_path / "tok")
    done = workshop.train(*words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "run/config.yaml",
            "learning_rate: 0.001",
            "learning_rate: 0.002",
            "+learning_rate: 0.002",
        ),
        ("corpus.jsonl", '"text"', '"text" ', "data."),
        ("tok/tokenizer.json", "<unused3>", "<unusedX>", "tokenizer: was"),
    ],
)
def test_resuming_with_something_changed_is_refused_and_shows_what(
    begun: Path, file: str, old: str, new: str, said: str
) -> None:
    edit(begun.parent / file, old, new)
    done = call("resume", begun)
    assert done.code == 1
    assert said in done.err
    assert "put them back as they were, or begin a new run" in done.err
    edit(begun.parent / file, new, old)
    assert call("resume", begun).code == 0


def test_a_teacher_whose_weights_changed_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    assert call("export", workshop.run, teacher).code == 0
    done = workshop.train("--teacher", teacher, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    model, tokenizer = cabochon.load(teacher)
    with torch.no_grad():
        model.final_norm += 1.0
    cabochon.save(model, tokenizer, teacher)
    done = call("resume", tmp_path / "run")
    assert done.code == 1
    assert "weights.teacher.model.safetensors: was" in done.err


def test_distillation_reports_the_divergence_to_its_teacher(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = ("--teacher", workshop.run, "--out", tmp_path / "run", "--steps", 3)
    assert workshop.train(*words).code == 0
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert all(0.0 <= line["kl"] < line["loss"] for line in lines)


def test_tuning_goes_on_from_a_model_and_learns_model_turns_alone(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = ("--model", workshop.run, "--out", tmp_path / "run", "--learning-rate", "1e-2")
    done = workshop.train(*words, "--steps", 12, algorithm="sft")
    assert done.code == 0, done.err
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert lines[-1]["loss"] < lines[0]["loss"]
    inspected = call("data", "inspect", tmp_path / "run", "--json").answer
    learned = zip(inspected["sample"]["ids"], inspected["sample"]["learned"], strict=True)
    _, tokenizer = cabochon.load(workshop.model)
    assert tokenizer.pieces([id_ for id_, counts in learned if counts]) == ["0", "<end_of_turn>"]


def test_packed_rows_train_the_same_model_as_their_text(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--context", 64, "--out", tmp_path / "rows")
    done = call("data", "pack", "--data", workshop.corpus, *words, "--json")
    assert done.code == 0, done.err
    assert done.answer["documents"] == 30
    assert workshop.train("--data", tmp_path / "rows", "--out", tmp_path / "run").code == 0
    assert same(weights(tmp_path / "run", 6), weights(workshop.run, 6))


def test_mixtures_have_weights_and_no_source_twice(workshop: Workshop, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"body": "x = 1\n" * 60}] * 4)
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "y = 2\n" * 60}] * 4)
    words = ("--steps", 1, "--data", workshop.corpus)
    mixed = workshop.train(*words, more, "--weights", 3, 1, "--out", tmp_path / "run")
    assert mixed.code == 0, mixed.err
    wrong = workshop.train(*words, other, "--out", tmp_path / "second")
    assert wrong.code == 1
    assert f"{other}:1" in wrong.err
    assert "no field 'text'" in wrong.err
    twice = workshop.train(*words, workshop.corpus, "--out", tmp_path / "third")
    assert twice.code == 2
    assert "named twice" in twice.err


def test_bf16_keeps_float32_masters_and_publishes_bf16(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--precision", "bf16", "--out", tmp_path / "run", "--steps", 2)
    assert workshop.train(*words).code == 0
    assert {w.dtype for w in weights(tmp_path / "run", 2).values()} == {torch.bfloat16}
    state = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "optimizer.safetensors")
    assert {t.dtype for name, t in state.items() if name.endswith("/master")} == {torch.float32}


def test_metrics_go_to_viewers_when_asked_which_do_not_speak_in_between(
    workshop: Workshop, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    words = ("--track", "tensorboard", "--steps", 2, "--out", tmp_path / "run", "--json")
    done = workshop.train(*words)
    assert done.answer["complete"] is True
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_nan_loss_names_the_update_and_the_last_good_checkpoint(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = ("--learning-rate", "1e30", "--checkpoint-every", 1, "--warmup", 0)
    done = workshop.train(*words, "--out", tmp_path / "run")
    assert done.code == 1
    assert "update 1" in done.err
    assert "last good checkpoint" in done.err
    assert "step-1" in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()


def test_two_writers_of_one_run_are_one_too_many(begun: Path) -> None:
    import fcntl

    with (begun / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"process {os.getpid()}")
        file.flush()
        done = call("resume", begun)
    assert done.code == 1
    assert "is being written by" in done.err


def test_ranks_train_together_and_the_first_alone_writes(
    workshop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "cabochon",
        "train", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--steps", 6, "--context", 64, "--batch-size", 2, "--threads", 1, "--device", "cpu",
        "--out", out, "--json", *SMALL,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert len(list(read_metrics(out / "metrics.jsonl"))) == 6
    alone, together = weights(workshop.run, 6), weights(out, 6)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-4)


def test_rows_are_as_long_as_the_model_allows_where_nobody_says(
    workshop: Workshop, tmp_path: Path
) -> None:
    """256 tokens, or what a smaller model was made for; what is said too long is refused."""
    small = shutil.copytree(workshop.model, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    words = (
        "--model", small, "--data", workshop.corpus, "--steps", 1, "--batch-size", 2,
        "--threads", 1, "--device", "cpu",
    )  # fmt: skip
    done = call("train", "pretrain", *words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["context"] == 40
    assert "longer than the 40 of a row" in call("doctor", "pretrain", *words).out
    planned = call("plan", "pretrain", *words, "--json").answer
    assert planned["tokens"]["per_update"] == 2 * 40
    done = call("train", "pretrain", *words, "--context", 41, "--out", tmp_path / "no")
    assert "give --context 40 or less" in done.err
    assert "context must be at least 2" in call("train", "pretrain", *words, "--context", 1).err
    fresh = ("--tokenizer", workshop.tokenizer, "--data", workshop.corpus, "--steps", 1, "--json")
    assert call("plan", "pretrain", *fresh).answer["tokens"]["per_update"] == 8 * 256
