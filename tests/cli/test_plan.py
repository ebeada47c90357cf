"""`plan` against what really happens: a run of the same settings in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import Workshop, call

from cabochon import load
from cabochon.algorithms import pretrain
from cabochon.cli.memory import AllocationMeter
from cabochon.core import Key, TokenBatch
from cabochon.models.gemma import Gemma, preset

NEAR = 0.25
"""What the memory may be off by."""


def cabochon(*words: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "cabochon", *map(str, words), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_peak_memory_of_a_real_run_is_what_was_planned(
    workshop: Workshop, tmp_path: Path, precision: str
) -> None:
    """Activations and weights are a good part of it: half as much again as the libraries."""
    words = (
        "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer, "--steps", 2,
        "--model", "gemma2-mini", "--context", 256, "--batch-size", 6, "--threads", 1,
        "--device", "cpu", "--precision", precision,
    )  # fmt: skip
    planned = cabochon("plan", *words)
    real = cabochon("train", *words, "--out", tmp_path / "run")
    ratio = planned["memory_bytes"]["peak"] / real["peak_memory_bytes"]
    assert abs(ratio - 1.0) < NEAR, planned["memory_bytes"]
    checkpoint = Path(real["checkpoint"])
    written = sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors"))
    assert abs(planned["disk_bytes"]["checkpoint"] / written - 1.0) < 0.01
    assert planned["tokens"]["total"] == 2 * 6 * 256
    assert planned["time"]["seconds"] > 0


def rows(device: str) -> TokenBatch:
    return TokenBatch(  # no two tokens alike, which an update would compute once
        tokens=torch.arange(64, device=device).view(2, 32),
        positions=torch.arange(32, device=device).expand(2, 32).contiguous(),
        documents=torch.zeros(2, 32, dtype=torch.int64, device=device),
        targets=torch.ones(2, 32, dtype=torch.int64, device=device),
        mask=torch.ones(2, 32, dtype=torch.bool, device=device),
    )


@pytest.mark.parametrize("again", [False, True])
def test_a_rehearsal_without_contents_allocates_what_the_update_does(again: bool) -> None:
    def metered(device: str) -> tuple[int, int]:
        with AllocationMeter() as meter:
            model = Gemma(preset("gemma2-nano"), checkpoint_activations=again, device=device)
            pretrain.objective(model, rows(device)).total.backward()
        return meter.peak, meter.operations

    rehearsed, real = metered("meta"), metered("cpu")
    assert abs(rehearsed[0] / real[0] - 1.0) < 0.01
    assert abs(rehearsed[1] / real[1] - 1.0) < 0.05


def test_keeping_fewer_activations_is_seen_in_the_plan() -> None:
    words = ("plan", "pretrain", "--model", "gemma2-micro", "--json")
    much = call(*words).answer["memory_bytes"]["activations"]
    little = call(*words, "--checkpoint-activations").answer["memory_bytes"]["activations"]
    assert little < 0.7 * much


def test_the_published_sizes_are_planned_without_building_them() -> None:
    words = ("--model", "gemma2-2b", "--batch-size", 1, "--context", 8)
    answer = call("plan", "pretrain", *words, "--json").answer
    assert answer["parameters"]["rest"] == 2_024_517_888
    assert answer["memory_bytes"]["weights"] > 9 * 2**30


def test_a_plan_counts_the_data_and_the_teacher(workshop: Workshop) -> None:
    words = (
        "plan", "pretrain", "--data", workshop.corpus, "--tokenizer", workshop.tokenizer,
        "--context", 64, "--teacher", workshop.run,
    )  # fmt: skip
    answer = call(*words, "--json").answer
    _, tokenizer = load(workshop.model)
    assert answer["tokens"]["data"] == sum(
        len(tokenizer.encode(json.loads(line)["text"], bos=True, eos=True))
        for line in workshop.corpus.read_text().splitlines()
    )
    weights = Gemma.init(preset("gemma2-nano"), Key(0))
    assert 0 < answer["memory_bytes"]["teacher"] < sum(p.nbytes for p in weights.parameters())
    readable = call(*words).out
    for part in ("parameters", "at the peak", "tokens", "disk", "at the speed measured just now"):
        assert part in readable
