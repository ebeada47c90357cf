"""Two processes that train together; run as a program by test_parallel.py.

Each scenario writes what a rank saw as `folder/SCENARIO.RANK.json` (weights as lists).
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lives import live
from test_fit import Bigram, cross_entropy, ragged
from test_runs import Training, begin
from torch import nn

from cabochon.core import Key, Loss, Step, TokenBatch
from cabochon.core.errors import CabochonError
from cabochon.losses.linear import cross_entropy as linear_cross_entropy
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.training import (
    OptimizerConfig,
    Run,
    TrainingState,
    adamw,
    fit,
    float32_weights,
    parallel,
    supervise,
)

RANKS = 2


def rows(batch: TokenBatch, number: int) -> list[TokenBatch]:
    """Micro-batches of rank `number`: ragged, of different sizes and numbers on the two ranks."""
    bounds = {0: [(0, 2), (2, 3), (3, 7)], 1: [(7, 8), (8, 12)]}[number]
    return [batch.rows(a, b) for a, b in bounds]


def numbers(steps: list[Step]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(step) for step in steps]


def values(weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.detach().double().flatten().tolist() for name, tensor in weights.items()}


def bigram() -> Bigram:
    torch.manual_seed(3)
    return Bigram()


def equal_updates(number: int, _: Path) -> dict[str, Any]:
    """Rank 1 runs out in the second update and has nothing for the third."""
    model = bigram()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    micro_batches = rows(ragged(), number) * (2 if number == 0 else 1)
    steps = list(fit(model, cross_entropy, micro_batches, optimizer, accumulate=2))
    return {"steps": numbers(steps), "weights": values(dict(model.named_parameters()))}


def masters(number: int, _: Path) -> dict[str, Any]:
    model = bigram().bfloat16()
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.01))
    steps = list(fit(model, bf16_loss, rows(ragged(), number), optimizer, accumulate=3))
    return {"steps": numbers(steps), "weights": values(float32_weights(model))}


def bf16_loss(model: nn.Module, batch: TokenBatch) -> Loss:
    logprob = model(batch).float().log_softmax(-1)
    nll = -logprob.gather(-1, batch.targets[..., None]).squeeze(-1)[batch.mask]
    return Loss(total=nll.sum(), weight=batch.mask.sum())


def silent_rank(number: int, _: Path) -> dict[str, Any]:
    """The targets of rank 1 are masked out, and its loss has no gradient."""
    model = bigram()
    batch = ragged()
    if number == 1:
        batch.mask.zero_()

    def objective(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = cross_entropy(model, batch)
        return loss if number == 0 else dataclasses.replace(loss, total=loss.total.detach())

    steps = list(fit(model, objective, [batch], torch.optim.SGD(model.parameters(), lr=0.1)))
    return {"steps": [s.loss for s in steps], "weights": values(dict(model.named_parameters()))}


def poisoned_rank(number: int, _: Path) -> dict[str, Any]:
    model = bigram()

    def objective(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = cross_entropy(model, batch)
        return Loss(total=loss.total * (float("nan") if number else 1.0), weight=loss.weight)

    steps = fit(model, objective, [ragged()], torch.optim.SGD(model.parameters(), lr=0.1))
    return {"error": error_of(lambda: next(steps))}


def unequal_start(number: int, _: Path) -> dict[str, Any]:
    model = bigram()
    with torch.no_grad():
        model.head.bias[0] += number * 1e-9
    steps = fit(model, cross_entropy, [ragged()], torch.optim.SGD(model.parameters(), lr=0.1))
    return {"error": error_of(lambda: next(steps))}


def unequal_reports(number: int, _: Path) -> dict[str, Any]:
    model = bigram()

    def objective(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = cross_entropy(model, batch)
        return Loss(total=loss.total, weight=loss.weight, report=loss.report if number else {})

    steps = fit(model, objective, [ragged()], torch.optim.SGD(model.parameters(), lr=0.1))
    return {"error": error_of(lambda: next(steps))}


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except CabochonError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def stopped_together(number: int, folder: Path) -> dict[str, Any]:
    """A SIGTERM to rank 1 alone; then both go on from the checkpoint that rank 0 wrote."""
    outcomes = []
    if number == 0:
        begin(folder / "run")
    dist.barrier()
    run = Run(folder / "run")
    for _ in range(2):
        training = Training()

        def steps(start: int, training: Training = training) -> Iterator[Step]:
            for step in training.train(start):
                if number == 1 and start == 0 and step.index == 6:
                    signal.raise_signal(signal.SIGTERM)
                yield step

        outcome = supervise(run, steps, training.state, save_every=5)
        outcomes.append([outcome.steps, outcome.stopped_by])
    return {"outcomes": outcomes, "weights": values(training.everything())}


def gemma() -> Gemma:
    config = GemmaConfig(
        vocab_size=64,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=8,
        ffn_width=32,
        query_scalar=8,
        window=4,
        attention_cap=50.0,
        final_cap=30.0,
        post_norms=True,
        context=16,
    )
    return Gemma.init(config, Key(0))


def gemma_batch(i: int) -> TokenBatch:
    generator = Key(1).fold(i).generator()
    lengths = torch.randint(3, 12, (3 + i % 2,), generator=generator).tolist()
    return TokenBatch.of([torch.randint(64, (n,), generator=generator) for n in lengths])


def gemma_loss(model: Gemma, batch: TokenBatch) -> Loss:
    return linear_cross_entropy(model(batch), batch)


def sharded(number: int, folder: Path) -> dict[str, Any]:
    """FSDP2 says that Gemma's output is a view; nobody writes into it."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    model = gemma()
    parallel.shard(model, model.blocks)
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.01))
    batches = [gemma_batch(2 * i + number) for i in range(6)]
    steps = list(fit(model, gemma_loss, batches, optimizer, accumulate=2))
    state = TrainingState(save_model=print, load_model=print, optimizer=optimizer)
    run = Run(folder / "run")
    refused = error_of(lambda: supervise(run, lambda _: iter(()), state, save_every=1))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    return {"steps": numbers(steps), "weights": values(whole), "error": refused}


SCENARIOS = (
    equal_updates,
    masters,
    silent_rank,
    poisoned_rank,
    unequal_start,
    unequal_reports,
    stopped_together,
    sharded,
)


def rank(number: int, folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=number, world_size=RANKS
    )
    for scenario in SCENARIOS:
        found = scenario(number, folder)
        (folder / f"{scenario.__name__}.{number}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = [live(lambda number=number: rank(number, folder)) for number in range(RANKS)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
