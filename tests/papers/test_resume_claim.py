"""Twenty kill -9 at random moments of a pre-training leave no trace in its weights.

Real parts throughout: a Gemma 2 on packed source code, the chunked loss, accumulation, a schedule,
a moving average, model folders. Run as a program, this file does one precision.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cabochon import folders
from cabochon.algorithms import pretrain
from cabochon.core import Key, Step
from cabochon.data.corpus import standard_library
from cabochon.data.packing import Packed, pack_documents
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.training import (
    OptimizerConfig,
    Run,
    TrainingState,
    adamw,
    checkpoint,
    create,
    float32_weights,
    supervise,
)
from cabochon.training.metrics import read_metrics
from cabochon.weights.ema import ema

KILLS = 20
STEPS, ACCUMULATE, BATCH, CONTEXT, SAVE_EVERY = 60, 2, 4, 48, 2
TIMES = ("seconds", "units_per_second")


class Life:
    """What a process builds when it is started: nothing comes from the one before it."""

    def __init__(self, dtype: torch.dtype, tokenizer: Tokenizer, rows: Packed) -> None:
        config = GemmaConfig(
            vocab_size=tokenizer.vocab_size,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_width=8,
            ffn_width=64,
            query_scalar=8,
            window=16,
            attention_cap=50.0,
            final_cap=30.0,
            post_norms=True,
            context=CONTEXT,
        )
        self.tokenizer, self.rows, self.dtype = tokenizer, rows, dtype
        self.model = Gemma.init(config, Key(0, ("weights",)), dtype)
        self.optimizer = adamw(self.model, OptimizerConfig(learning_rate=3e-3))
        self.average = {name: w.clone() for name, w in float32_weights(self.model).items()}

    def steps(self, start: int) -> Iterator[Step]:
        batches = self.rows.batches(Key(0, ("data",)), BATCH, start=start * ACCUMULATE)
        method = pretrain.Config(steps=STEPS, accumulate=ACCUMULATE, warmup=6)
        for step in pretrain.train(method, self.model, batches, self.optimizer, start=start):
            ema(self.average, float32_weights(self.model), 0.95, out=self.average)
            yield step

    def load(self, folder: Path) -> None:
        stored, _ = folders.load(folder, dtype=self.dtype)
        self.model.load_state_dict(stored.state_dict())

    def record(self, place: Path) -> None:
        run = Run(place) if place.exists() else create(place, config="a: 1\n", inputs={"seed": 0})
        state = TrainingState(
            save_model=lambda folder: folders.save(self.model, self.tokenizer, folder),
            load_model=self.load,
            optimizer=self.optimizer,
            ema=self.average,
        )
        supervise(run, self.steps, state, save_every=SAVE_EVERY)


def bits(place: Path) -> dict[str, torch.Tensor]:
    path = place / "checkpoints" / f"step-{STEPS}"
    checkpoint.verify(path)
    found = {}
    for file in sorted(path.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.relative_to(path)}:{name}"] = tensor
    return found


def metrics(place: Path) -> list[dict[str, object]]:
    lines = list(read_metrics(place / "metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def main(precision: str, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from lives import import_what_it_needs, kill_often, timed

    documents = list(islice(iter(standard_library().train), 30))
    tokenizer = train_tokenizer([document.text for document in documents], 512)
    rows = pack_documents(tokenizer, documents, CONTEXT)

    def run_at(place: Path):
        return lambda: Life(getattr(torch, precision), tokenizer, rows).record(place)

    whole, parts = folder / "whole", folder / "parts"
    import_what_it_needs(run_at(folder / "first"))
    seconds = timed(run_at(whole))
    reached: list[int] = []
    half_written = 0

    def look() -> None:
        nonlocal half_written
        half_written += any(parts.glob("checkpoints/.partial-*"))
        reached.append(len(metrics(parts)) if parts.exists() else 0)

    killed = runs = 0
    while killed < KILLS:  # a run that gets through before its last kill is followed by another
        shutil.rmtree(parts, ignore_errors=True)
        runs += 1
        killed += kill_often(
            run_at(parts), kills=KILLS - killed, longest=seconds / 6, seed=runs, after=look
        )
        expected, found = bits(whole), bits(parts)
        assert expected.keys() == found.keys()
        unequal = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert unequal == []
        assert metrics(whole) == metrics(parts)
    first, last = metrics(whole)[0], metrics(whole)[-1]
    sys.stdout.write(
        f"{precision}: {killed} kills in {runs} run(s), after {reached} updates, {half_written} "
        "while a checkpoint was "
        f"being written; {len(expected)} tensors bit-identical; uninterrupted run {seconds:.1f} s, "
        f"loss {first['loss']:.3f} -> {last['loss']:.3f}\n"
    )
    assert len(set(reached)) >= KILLS // 3, "the kills must be spread over the run"
    assert float(str(last["loss"])) < float(str(first["loss"])) - 0.5, "it must really have learned"


@pytest.mark.claim
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_after_twenty_kills_at_random_moments_the_weights_are_those_of_the_uninterrupted_run(
    tmp_path: Path, precision: str
) -> None:
    done = subprocess.run(
        [sys.executable, __file__, precision, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
