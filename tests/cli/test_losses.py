"""Training with another loss than cross-entropy, through the binary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from workshop import Workshop, call


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("algorithm", ["pretrain", "sft"])
@pytest.mark.parametrize(
    "flags",
    [("alpha", "--loss-parameter", 1.5), ("chi_square",), ("jsd", "--loss-parameter", 0.5),
     ("reverse_kl",)],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_a_run_learns_by_the_loss_it_names(
    workshop: Workshop, tmp_path: Path, algorithm: str, flags: tuple
) -> None:
    out = tmp_path / "run"
    done = workshop.train(
        "--out", out, "--loss", *flags, "--learning-rate", 0.01, "--steps", 8, algorithm=algorithm
    )
    assert done.code == 0, done.err
    rows = metrics(out)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert 0.0 <= rows[-1]["accuracy"] <= 1.0
    assert ("support" in rows[-1]) == (flags[0] in ("alpha", "chi_square"))
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["loss"] == flags[0]


def test_a_run_goes_on_by_the_same_loss(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert workshop.train("--out", out, "--loss", "alpha", "--loss-parameter", 1.5).code == 0
    first = metrics(out)
    shutil.rmtree(out / "checkpoints" / "step-6")
    done = call("resume", out)
    assert done.code == 0, done.err
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in first]


def test_a_run_with_another_loss_is_planned(workshop: Workshop, tmp_path: Path) -> None:
    flags = ("--data", workshop.corpus, "--tokenizer", workshop.tokenizer, "--context", 64)
    plain = call("plan", "pretrain", *flags, "--json")
    sparse = call("plan", "pretrain", *flags, "--loss", "alpha", "--loss-parameter", 1.5, "--json")
    assert sparse.code == 0, sparse.err
    assert sparse.answer.keys() == plain.answer.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("alpha",), "alpha needs its parameter"),
        (("jsd", "--loss-parameter", 1.5), "beta must lie in [0, 1]"),
        (("jsd_paper", "--loss-parameter", 0), "forward KL there"),
        (("chi_square", "--loss-parameter", 2), "chi_square takes no parameter"),
        (("cross_entropy", "--loss-parameter", 2), "cross_entropy takes no loss_parameter"),
        (("alhpa",), "alpha"),
    ],
)
@pytest.mark.parametrize("algorithm", ["pretrain", "sft"])
def test_losses_that_cannot_be_are_refused(
    workshop: Workshop, tmp_path: Path, algorithm: str, flags: tuple, message: str
) -> None:
    done = workshop.train("--out", tmp_path / "run", "--loss", *flags, algorithm=algorithm)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_learned_by_cross_entropy_alone(workshop: Workshop, tmp_path: Path) -> None:
    done = workshop.train(
        "--out", tmp_path / "run", "--loss", "chi_square", "--teacher", workshop.model
    )
    assert done.code == 2
    assert "learned by cross-entropy, not by loss chi_square" in done.err
