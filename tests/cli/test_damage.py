"""What was damaged after it was written, averages beside weights, and rows a model cannot read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workshop import Workshop, call

from cabochon.models.gemma.convert import read_gemma


def flip(path: Path) -> None:
    """Changes the last byte, which safetensors by itself cannot notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(workshop: Workshop, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop.run, tmp_path / "run"))


def test_a_flipped_byte_is_found_by_whoever_uses_the_checkpoint(run: Path, tmp_path: Path) -> None:
    saved = run / "checkpoints" / "step-6"
    flip(saved / "model" / "model.safetensors")
    for path in (run, saved, saved / "model"):
        done = call("generate", path, "--prompt", "import", "--max-new-tokens", 1)
        assert done.code == 1
        assert "model/model.safetensors was changed" in done.err
    assert call("export", run, tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_newest_checkpoint_names_the_step_to_resume_from(
    workshop: Workshop, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert workshop.train("--out", run).code == 0
    whole = load_file(run / "checkpoints" / "step-6" / "model" / "model.safetensors")
    flip(run / "checkpoints" / "step-6" / "optimizer.safetensors")
    edited = run / "config.yaml"
    assert "steps: 6\n" in edited.read_text()
    done = call("resume", run, "--step", 4)
    assert done.code == 0, done.err
    again = load_file(run / "checkpoints" / "step-6" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert "has no checkpoint of step 5" in call("resume", run, "--step", 5).err


def test_the_moving_average_of_a_run_can_be_exported(workshop: Workshop, tmp_path: Path) -> None:
    """With a decay of 0 the average is the weights; with 0.5 it lies between them."""
    for decay, equal in (("1e-9", True), ("0.5", False)):
        run, out = tmp_path / f"run{decay}", tmp_path / f"out{decay}"
        assert workshop.train("--out", run, "--ema", decay).code == 0
        assert call("export", run, out, "--average").code == 0
        weights = read_gemma(run / "checkpoints" / "step-6" / "model").embedding
        assert torch.allclose(read_gemma(out).embedding, weights, atol=1e-7) is equal
    done = call("export", workshop.run, tmp_path / "none", "--average")
    assert done.code == 2
    assert "holds no moving average" in done.err


def test_rows_longer_than_the_context_of_model_or_teacher_are_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    model = ("--model", workshop.model, "--context", 4096, "--out", tmp_path / "run")
    done = workshop.train(*model)
    assert done.code == 2
    assert "rows of 4096 tokens are longer than the 256" in done.err
    teacher = ("--teacher", workshop.model, "--context", 512, "--out", tmp_path / "run")
    done = workshop.train(*teacher)
    assert done.code == 2
    assert f"that the teacher {workshop.model} was made for" in done.err
    assert not (tmp_path / "run").exists()
