"""`cabochon train ALGORITHM`: one training run, from settings to a run directory."""

from __future__ import annotations

import dataclasses
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from cabochon.cli.configuration import dump, plain, read, replaced
from cabochon.cli.machine import device_of, use_threads
from cabochon.cli.output import answer, bytes_text, duration_text, say
from cabochon.cli.places import free
from cabochon.cli.progress import watching
from cabochon.cli.ranks import begun_by_first, joined
from cabochon.cli.recipe import AGENTS, Recipe, split_words
from cabochon.cli.rewards import located
from cabochon.cli.session import Session, begins_from_folder, prepare, with_context
from cabochon.cli.settings import RunSettings
from cabochon.cli.teachers import kind
from cabochon.cli.tracking import refuse_missing, trackers
from cabochon.core.errors import ConfigError, FolderError
from cabochon.training import parallel
from cabochon.training.metrics import Record
from cabochon.training.process_memory import peak_memory
from cabochon.training.run_directory import Run, create
from cabochon.training.runs import Outcome

__all__ = ["carry_out", "main", "resolved"]

PATHS = ("teacher", "teacher_cache", "teacher_tokenizer", "reference", "replay")
"""Settings beside those of the run that may name files."""


def main(argv: Sequence[str]) -> int:
    """Begins a run and records it to its end, or to a signal."""
    if argv and argv[0] in AGENTS:
        return int(importlib.import_module("cabochon.cli.agents").begin(argv[0], argv[1:]))
    chosen = split_words("train", argv)
    if chosen is None:
        return 0
    recipe, words = chosen
    invocation = read(
        recipe.settings,
        words,
        prog=f"cabochon train {recipe.name}",
        description=recipe.purpose,
        names={"algorithm": recipe.name},
    )
    settings = resolved(invocation.settings)
    folder = _new_folder(settings.run)
    refuse_missing(settings.run.track)
    use_threads(settings.run.threads)
    device = device_of(settings.run.device)
    with joined(device):
        say(f"reading and packing {', '.join(settings.run.data) or 'nothing'}")
        session = prepare(recipe, settings)
        config = dump(settings, algorithm=recipe.name)
        run = begun_by_first(
            lambda: create(folder, config=config, inputs=session.inputs), folder, device
        )
        return carry_out(recipe, session, run, done=0, as_json=invocation.json)


def resolved(settings: Any) -> Any:
    """The settings with every default that depends on this machine or folder written out."""
    run = with_context(settings.run)
    source = _absolute(run.model.source) if begins_from_folder(run) else run.model.source
    fixed = dataclasses.replace(
        run,
        out=_absolute(run.out) if run.out else "",
        model=dataclasses.replace(run.model, source=source),
        tokenizer=_absolute(run.tokenizer) if run.tokenizer else "",
        data=tuple(name if name == "stdlib" else _absolute(name) for name in run.data),
        device=device_of(run.device).type if run.device == "auto" else run.device,
        threads=use_threads(run.threads),
    )
    named = plain(settings)
    teachers = {k: named[k] for k in PATHS if named.get(k)}
    absolute: dict[str, Any] = {
        k: v if kind(v) == "server" else _absolute(v) for k, v in teachers.items()
    }
    if "reward" in named:
        absolute |= located(named["reward"], named["reward_normalise"])
    return replaced(dataclasses.replace(settings, run=fixed), absolute)


def carry_out(
    recipe: Recipe[Any],
    session: Session,
    run: Run,
    *,
    done: int,
    as_json: bool,
    at: int | None = None,
) -> int:
    """Makes the updates that are left and says how it ended; the exit code."""
    total = int(session.settings.method.steps)
    losses: list[float] = []

    def remember(record: Record) -> None:
        losses[:] = [record.step.loss]

    begin = time.monotonic()
    wanted = session.run.track if parallel.rank() == 0 else ()
    with (
        redirect_stdout(sys.stderr),  # trackio speaks
        watching(total, session.tokens_per_step, done=done) as watcher,
        trackers(wanted, run.folder, plain(session.settings), start=done) as views,
    ):
        outcome = session.record(run, [watcher, remember, *views], at=at)
    report = {
        "run": str(run.folder),
        "algorithm": recipe.name,
        "steps": outcome.steps,
        "complete": outcome.steps >= total,
        "stopped_by": outcome.stopped_by.name if outcome.stopped_by else None,
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "loss": losses[0] if losses else None,
        "seconds": round(time.monotonic() - begin, 3),
        "peak_memory_bytes": peak_memory(),
    }
    _tell(report, outcome, total, as_json=as_json)
    if outcome.stopped_by is not None and outcome.steps < total:
        return 128 + int(outcome.stopped_by)
    return 0


def _tell(report: dict[str, Any], outcome: Outcome, total: int, *, as_json: bool) -> None:
    run = report["run"]
    if outcome.stopped_by is not None and outcome.steps < total:
        name = signal.Signals(outcome.stopped_by).name
        say(f"stopped by {name} after {outcome.steps} of {total} updates; saved")
        say(f"go on with: cabochon resume {run}")
    else:
        say(
            f"done: {total} updates in {duration_text(report['seconds'])}, "
            f"peak memory {bytes_text(report['peak_memory_bytes'])}"
        )
    if as_json:
        answer(report)
    else:
        print(report["checkpoint"] or run)


def _new_folder(run: RunSettings) -> Path:
    if not run.out:
        raise ConfigError("where to? --out FOLDER names the run directory, which must be new")
    folder = Path(run.out)
    if (folder / "manifest.json").exists():
        raise FolderError(f"{folder} holds a run already; go on with: cabochon resume {folder}")
    return free(folder)


def _absolute(path: str) -> str:
    return str(Path(path).resolve())
