"""Wrong guesses of someone new: each is answered before work is done or lost for it."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workshop import Done, Workshop, call, write_jsonl

from cabochon.core.errors import FolderError
from cabochon.data.packing import pack_tokens
from cabochon.training import checkpoint
from cabochon.training.metrics import read_metrics


def assert_refused(done: Done, *said: str, code: int = 1) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    for part in said:
        assert part in done.err


def process(*words: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cabochon", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def training(workshop: Workshop, out: Path, steps: int) -> tuple[object, ...]:
    return (
        "train", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--steps", steps, "--context", 64, "--batch-size", 2, "--threads", 1, "--device", "cpu",
        "--checkpoint-every", 1000, "--out", out,
    )  # fmt: skip


# -- places that cannot be written ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    workshop: Workshop, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("cabochon.cli.data_tokenizer.train_tokenizer", None)
    monkeypatch.setattr("cabochon.cli.data_pack.pack_document_sources", None)
    monkeypatch.setattr("cabochon.cli.train.prepare", None)
    out = tmp_path / place
    said = "cannot be written" if place.startswith("/") else "is a file, no folder"
    for words in (
        ("data", "tokenizer", "--data", workshop.corpus, "--out", out),
        (
            "data",
            "pack",
            "--data",
            workshop.corpus,
            "--tokenizer",
            workshop.tokenizer,
            "--out",
            out,
        ),
        training(workshop, out, 2),
        ("export", workshop.model, out),
    ):
        assert_refused(call(*words), said)
    assert (tmp_path / "file").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_gguf_file_by_its_name_is_not_made_a_folder(workshop: Workshop, tmp_path: Path) -> None:
    done = call("export", workshop.model, tmp_path / "model.gguf")
    assert_refused(done, "add --format gguf", code=2)
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_interrupted_leaves_nothing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cabochon.folders.write_json", interrupted)
    assert call("export", workshop.model, tmp_path / "out").code == 130
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert call("export", workshop.model, tmp_path / "out").code == 0


def test_rows_that_do_not_fit_on_the_disk_leave_nothing(tmp_path: Path) -> None:
    packed = pack_tokens([[2, *range(3, 300)]] * 500, 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FolderError, match="rows could not be written"):
            packed.save(tmp_path / "rows")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning-rate", "inf"), "learning_rate must be above 0 and finite, got inf"),
        (("--weight-decay", "inf"), "weight_decay must be finite"),
        (("--device", "mps"), "'mps' is no device that is used here"),
        (("--device", "meta"), "'meta' is no device that is used here"),
        (("--weights",), "--weights needs at least one value after it"),
        (("--batch_size", 2, "--batch-size", 2), "--batch-size is given twice"),
    ],
)
def test_a_value_that_cannot_be(
    workshop: Workshop, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    done = call(
        "train", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--out", tmp_path / "run", *words,
    )  # fmt: skip
    assert_refused(done, said, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 4\nseed: 1\nsteps: 5\n", "steps is given twice"),
        ("model: {source: gemma2-nano, layers: 2, layers: 3}\n", "layers is given twice"),
        ("steps: true\n", "steps: True cannot be used: neither true nor false has a place"),
        ("data: [true]\n", "data: [True] cannot be used"),
        ("checkpoint_activations: 7\n", "checkpoint_activations: 7 cannot be used"),
    ],
)
def test_a_settings_file_that_cannot_be_meant(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    done = call("train", "pretrain", "--config", file, "--out", tmp_path / "run")
    assert_refused(done, str(file), said, code=2)


def test_a_folder_for_a_settings_file(tmp_path: Path) -> None:
    done = call("train", "pretrain", "--config", tmp_path)
    assert_refused(done, "cannot be read as settings: Is a directory", code=2)


def test_data_named_twice(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--out", tmp_path / "rows")
    done = call("data", "pack", "--data", workshop.corpus, workshop.corpus, *words)
    assert_refused(done, "the same data is named twice", code=2)


@pytest.mark.parametrize("count", [0, -3])
def test_no_tokens_to_draw(workshop: Workshop, count: int) -> None:
    done = call("data", "inspect", workshop.corpus, "--tokens", count)
    assert_refused(done, f"tokens must be at least 1, got {count}", code=2)


def test_no_rows_at_a_time(workshop: Workshop) -> None:
    done = call("evaluate", "perplexity", workshop.model, workshop.corpus, "--batch-size", 0)
    assert_refused(done, "batch_size must be at least 1, got 0", code=2)


def test_nothing_on_standard_input_is_not_a_prompt(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under cron, or with a broken pipe in front."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = call("generate", workshop.model, "--max-new-tokens", 2)
    assert_refused(done, "standard input is empty", '--prompt ""', code=2)
    done = call("generate", workshop.model, "--max-new-tokens", 2, "--file", "-")
    assert_refused(done, "standard input holds no prompt")


@pytest.mark.parametrize(("name", "said"), [("none", "No such file"), (".", "Is a directory")])
def test_prompts_that_cannot_be_read(
    workshop: Workshop, tmp_path: Path, name: str, said: str
) -> None:
    done = call("generate", workshop.model, "--file", tmp_path / name)
    assert_refused(done, "cannot be read", said)


# -- folders that are something else --------------------------------------------------------------


def test_the_folder_of_a_pipeline_names_its_runs(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.run, tmp_path / "demo" / "teacher")
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(workshop.run / name, tmp_path / "demo" / name)
    done = call("generate", tmp_path / "demo", "--prompt", "x")
    assert_refused(done, "is the folder of a pipeline", str(tmp_path / "demo" / "teacher"))


def test_packed_rows_are_no_run(workshop: Workshop, tmp_path: Path) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--out", tmp_path / "rows")
    assert call("data", "pack", "--data", workshop.corpus, *words).code == 0
    done = call("generate", tmp_path / "rows", "--prompt", "x")
    assert_refused(done, "neither a model folder", "rows.safetensors")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_resuming_from_a_checkpoint_that_is_not_there(
    workshop: Workshop, words: tuple[str, ...]
) -> None:
    done = call("resume", workshop.run, "--step", 99, *words)
    assert_refused(done, "has no checkpoint of step 99; it has: 4, 6")


def test_resuming_a_run_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(call("resume", tmp_path / "none"), "there is no run at")


def test_a_complete_run_that_is_damaged_is_not_called_complete(
    workshop: Workshop, tmp_path: Path
) -> None:
    shutil.copytree(workshop.run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(call("resume", tmp_path / "run"), "optimizer.safetensors was changed")


# -- whoever watches may leave --------------------------------------------------------------------


def test_a_training_whose_display_breaks_goes_on_to_its_end(
    workshop: Workshop, tmp_path: Path
) -> None:
    """As behind `2>&1 | head -1`."""
    reading, writing = os.pipe()
    with process(*training(workshop, tmp_path / "run", 30), stderr=writing) as run:
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        run.wait(60)
    assert len(list(read_metrics(tmp_path / "run" / "metrics.jsonl"))) == 30
    assert list(checkpoint.completed(tmp_path / "run" / "checkpoints")) == [30]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_and_stops_unless_it_is_to_be_ignored(
    workshop: Workshop, tmp_path: Path, ignored: bool
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        run = process(*training(workshop, tmp_path / "run", 60))
    finally:
        signal.signal(signal.SIGHUP, before)
    lines = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (lines.exists() and lines.read_bytes()) and time.monotonic() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=60)
    (done,) = checkpoint.completed(tmp_path / "run" / "checkpoints")
    assert done == len(list(read_metrics(lines)))
    assert run.returncode == (0 if ignored else 128 + signal.SIGHUP)
    assert (done == 60) == ignored


def test_a_number_of_one_is_singular(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": json.dumps("a")}])
    assert call("doctor", tmp_path / "c.jsonl").out.endswith("1 thing is wrong\n")
