"""Two gloo processes on this machine against one process that sees all their batches."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import cross_entropy, ragged
from test_runs import Training, begin, go, metrics
from two_ranks import RANKS, bf16_loss, bigram, gemma, gemma_batch, gemma_loss, rows, values

from cabochon.training import OptimizerConfig, Run, adamw, fit, float32_weights

EXACT = 1e-12
"""Float64: what is left is the order of additions."""
SINGLE = 2e-6
"""Float32, after three updates by AdamW, which divides by the gradient's size."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [sys.executable, str(program), str(place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def seen(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{scenario}.{n}.json").read_text()) for n in range(RANKS)]


def assert_near(a: dict[str, list[float]], b: dict[str, list[float]], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=tolerance, rel=0), name


def test_two_ranks_make_the_updates_of_one_process_to_the_last_batch(folder: Path) -> None:
    batch = ragged()
    model = bigram()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    first, second = rows(batch, 0) * 2, rows(batch, 1)
    union = [[*first[0:2], *second[0:2]], first[2:4], first[4:6]]
    steps = [next(fit(model, cross_entropy, u, optimizer, accumulate=4)) for u in union]
    expected = values(dict(model.named_parameters()))
    for found in seen(folder, "equal_updates"):
        assert_near(found["weights"], expected, EXACT)
        assert [s["index"] for s in found["steps"]] == [0, 1, 2]
        for step, one in zip(found["steps"], steps, strict=True):
            assert step["loss"] == pytest.approx(one.loss, abs=EXACT)
            assert step["grad_norm"] == pytest.approx(one.grad_norm, abs=EXACT)
            assert step["weight"] == one.weight
            assert step["report"]["squares"] == pytest.approx(one.report["squares"], abs=EXACT)


def test_ranks_sum_their_masters_gradients(folder: Path) -> None:
    model = bigram().bfloat16()
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.01))
    batches = [*rows(ragged(), 0), *rows(ragged(), 1)]
    list(fit(model, bf16_loss, batches, optimizer, accumulate=5))
    first, second = seen(folder, "masters")
    assert first == second
    assert_near(first["weights"], values(float32_weights(model)), SINGLE)


def test_a_rank_without_targets_or_gradients_takes_the_others_update(folder: Path) -> None:
    model = bigram()
    list(fit(model, cross_entropy, [ragged()], torch.optim.SGD(model.parameters(), lr=0.1)))
    first, second = seen(folder, "silent_rank")
    assert first == second
    assert_near(first["weights"], values(dict(model.named_parameters())), EXACT)


def test_a_non_finite_loss_on_one_rank_stops_all_before_the_update(folder: Path) -> None:
    first, second = seen(folder, "poisoned_rank")
    assert first["error"].startswith("NonFinite: update 0: the loss summed over all ranks")
    assert second["error"].startswith("NonFinite: update 0: the loss of micro-batch 0")


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("unequal_start", "ConfigError: ranks . and . start from different weights"),
        (
            "unequal_reports",
            r"ConfigError: rank . reports \[.*\], rank 0 \[\]; all ranks must report",
        ),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused_on_every_rank(
    folder: Path, scenario: str, message: str
) -> None:
    for found in seen(folder, scenario):
        assert re.match(message, found["error"]), found["error"]


def test_a_signal_to_one_rank_stops_all_after_the_same_update(folder: Path, tmp_path: Path) -> None:
    first, second = seen(folder, "stopped_together")
    assert first["outcomes"] == second["outcomes"] == [[7, signal.SIGTERM], [12, None]]
    assert first["weights"] == second["weights"]
    run = begin(tmp_path / "alone")
    alone = Training()
    go(run, alone)
    # Both ranks bring the batches of the run alone: twice the sum over twice the weight.
    assert_near(first["weights"], values(alone.everything()), SINGLE)
    together = metrics(Run(folder / "run"))
    assert [line["step"] for line in together] == list(range(12))
    assert [line["weight"] for line in together] == [2 * line["weight"] for line in metrics(run)]


def test_a_sharded_gemma_makes_the_updates_of_the_whole_one(folder: Path) -> None:
    model = gemma()
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.01))
    batches = [gemma_batch(2 * i + number) for i in range(6) for number in range(RANKS)]
    steps = list(fit(model, gemma_loss, batches, optimizer, accumulate=4))
    first, second = seen(folder, "sharded")
    assert first == second
    assert_near(first["weights"], values(dict(model.named_parameters())), SINGLE)
    for step, one in zip(first["steps"], steps, strict=True):
        assert step["loss"] == pytest.approx(one.loss, rel=1e-6)
        assert step["grad_norm"] == pytest.approx(one.grad_norm, rel=1e-4)
    assert first["error"].startswith("ConfigError: checkpoints of sharded")
