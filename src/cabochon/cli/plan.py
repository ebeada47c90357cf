"""`cabochon plan ALGORITHM`: what a run would take; it makes no update."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cabochon.cli import forecast
from cabochon.cli.configuration import read
from cabochon.cli.machine import DTYPES, model_folder, use_threads
from cabochon.cli.output import answer, bytes_text, console, duration_text, say
from cabochon.cli.recipe import AGENTS, Recipe, split_words
from cabochon.cli.rows import Rows
from cabochon.cli.session import begins_from_folder, config_for, load_tokenizer
from cabochon.cli.settings import RunSettings, shape
from cabochon.cli.teachers import judges_in, resident
from cabochon.cli.train import resolved
from cabochon.data.packed import Packed
from cabochon.models.gemma.config import GemmaConfig, parameter_counts
from cabochon.models.gemma.presets import preset

__all__ = ["main"]

METRICS_LINE = 250
"""Bytes of a line of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    per_update: int
    total: int
    data: int | None
    """In the data, markers included; None where the data is not named or is a mixture."""
    epochs: float | None


def main(argv: Sequence[str]) -> int:
    """Shows parameters, memory, tokens, disk and time."""
    if argv and argv[0] in AGENTS:
        return int(importlib.import_module("cabochon.cli.agent_plan").show(argv[0], argv[1:]))
    chosen = split_words("plan", argv)
    if chosen is None:
        return 0
    recipe, words = chosen
    invocation = read(
        recipe.settings,
        words,
        prog=f"cabochon plan {recipe.name}",
        description=f"What this run would take: {recipe.purpose}.",
        names={"algorithm": recipe.name},
    )
    settings = resolved(invocation.settings)
    run: RunSettings = settings.run
    use_threads(run.threads)
    config, rows = _config_and_rows(recipe, settings)
    sources = recipe.folders(settings)
    held = resident(sources)
    teacher = forecast.folder_config(held[0]) if held else None
    judges = sum(map(forecast.stored_bytes, judges_in(sources).values()))
    tokens = run.batch_size * run.context
    say(f"rehearsing an update of {tokens:,} tokens without contents; many tokens take minutes")
    memory, work = forecast.rehearse(recipe, settings, config, teacher)
    memory = replace(memory, judges=judges)
    accumulate, steps = int(settings.method.accumulate), int(settings.method.steps)
    speed = forecast.measured_speed(
        run.batch_size * run.context, config, DTYPES[run.precision], run.device
    )
    embedding, rest = parameter_counts(config)
    checkpoint = forecast.checkpoint_bytes(config, run)
    report = {
        "algorithm": recipe.name,
        "parameters": {"embedding": embedding, "rest": rest, "total": embedding + rest},
        "memory_bytes": {**asdict(memory), "peak": memory.peak},
        "tokens": asdict(_tokens(run, accumulate, steps, rows)),
        "disk_bytes": {
            "checkpoint": checkpoint,
            "peak": checkpoint * (run.keep + 1) + METRICS_LINE * steps,
        },
        "time": {
            "update": asdict(work),
            "measured": asdict(speed),
            "seconds": work.seconds(speed) * steps,
        },
        "not_counted": recipe.not_planned,
    }
    if invocation.json:
        answer(report)
    else:
        _print(report, run, steps)
    return 0


def _config_and_rows(recipe: Recipe[Any], settings: Any) -> tuple[GemmaConfig, Rows | None]:
    """The model's shape, and the packed data where data and tokenizer are named."""
    run: RunSettings = settings.run
    folder = model_folder(run.model.source) if begins_from_folder(run) else None
    known = folder is not None or bool(run.tokenizer)
    tokenizer = load_tokenizer(run) if known else None
    rows = recipe.pack(settings, tokenizer) if run.data and tokenizer is not None else None
    if folder is not None:
        return forecast.folder_config(folder), rows
    if tokenizer is not None:
        return config_for(run, tokenizer), rows
    return shape(run.model, preset(run.model.source)), rows


def _tokens(run: RunSettings, accumulate: int, steps: int, rows: Rows | None) -> _Tokens:
    per_update = run.batch_size * run.context * accumulate
    data = epochs = None
    if isinstance(rows, Packed):
        data = rows.manifest.tokens
        epochs = steps * run.batch_size * accumulate / rows.rows
    return _Tokens(per_update=per_update, total=per_update * steps, data=data, epochs=epochs)


def _print(report: dict[str, Any], run: RunSettings, steps: int) -> None:
    screen = console(stderr=False)
    counts, tokens = report["parameters"], report["tokens"]
    memory, disk, taken = report["memory_bytes"], report["disk_bytes"], report["time"]
    speed, work = taken["measured"], taken["update"]
    lines = [
        f"parameters  {counts['total']:,} ({counts['embedding']:,} in the embedding, "
        f"{counts['rest']:,} elsewhere)",
        f"memory      {bytes_text(memory['peak'])} at the peak"
        + (" of the GPU" if run.device.startswith("cuda") else ""),
        *(f"              {k:<12} {bytes_text(v)}" for k, v in memory.items() if k != "peak"),
        f"tokens      {tokens['total']:,} in {steps:,} updates of {tokens['per_update']:,}",
    ]
    if tokens["data"] is not None:
        lines.append(f"              {tokens['epochs']:.2f} times the data ({tokens['data']:,})")
    elif run.data:
        lines.append("              the data was not read: name a --tokenizer to count it")
    lines += [
        f"disk        {bytes_text(disk['peak'])} ({run.keep} checkpoints of "
        f"{bytes_text(disk['checkpoint'])} stay, one more while it is written)",
        f"time        about {duration_text(taken['seconds'])} at the speed measured just now",
        f"              products {speed['flops_per_second'] / 1e9:,.0f} GFLOP/s, results "
        f"{bytes_text(speed['written_bytes_per_second'])}/s, with {torch.get_num_threads()} "
        f"threads; an update: {work['flops']:.2e} operations in products, "
        f"{bytes_text(work['written_bytes'])} of results",
    ]
    if report["not_counted"]:
        lines.append(f"not counted {report['not_counted']}")
    for line in lines:
        screen.print(line, markup=False)
