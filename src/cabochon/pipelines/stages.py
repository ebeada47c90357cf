"""One training run of a pipeline: a run directory that is skipped, continued or begun.

What a pipeline does between its trainings is cheap and simply done again; the trainings are not,
so each is recorded in a run directory of its own and goes on from its newest checkpoint.
"""

from __future__ import annotations

import copy
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer

from cabochon import folders
from cabochon.core import Step, TokenBatch
from cabochon.core.errors import DataError, RunChanged
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import hashes_below, sha256_of
from cabochon.losses import cross_entropy
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel
from cabochon.training import checkpoint
from cabochon.training.checkpoint import TrainingState
from cabochon.training.metrics import Record
from cabochon.training.run_directory import Run, create
from cabochon.training.runs import Outcome, supervise

__all__ = [
    "Event",
    "Observe",
    "Stage",
    "hash_of",
    "model_of",
    "nobody",
    "opened",
    "probed",
    "torch_threads",
    "trained",
    "with_context",
]

SAVE_EVERY = 100
PROBES = 12
"""About how often in a training the held-out loss is measured; less often in a very short one."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to show to whoever is waiting."""

    stage: str
    """corpus, tokenizer, data, the name of a training, evaluation, samples, report."""
    steps: int
    """How many updates the stage makes in all; 0 if it does not train."""
    step: Step | None = None
    """The update just made; None when a stage begins, ends or is found complete."""
    tokens_per_second: float = 0.0
    note: str = ""
    """One plain sentence, or nothing."""


Observe = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Watches nothing."""
    del event


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training run of a pipeline, by its name and all that its result depends on."""

    name: str
    steps: int
    tokens: int
    """That each update reads, those that count in no loss included."""
    settings: Mapping[str, Any]
    """What goes into its config.yaml."""
    inputs: Mapping[str, Any]
    """Seed and hashes of data and weights, which must be the same when it is resumed."""


def opened(folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> Run:
    """The run directory `folder`, made if absent.

    Raises:
        RunChanged: it was begun with other settings or inputs.
        FolderError: there is something else.
    """
    config = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    if not (folder / "manifest.json").is_file():
        return create(folder, config=config, inputs=inputs)
    run = Run(folder)
    run.refuse_changes(config, inputs)
    return run


def trained(
    stage: Stage,
    folder: Path,
    model: Gemma | ForeignModel | RewardModel,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    updates: Callable[[int], Iterator[Step]],
    observe: Observe,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """The model folder that the stage leaves in `folder`, after the updates that are missing.

    Args:
        stage: its name is the folder's.
        folder: of the pipeline.
        model: as it begins; a complete stage leaves it so.
        tokenizer: saved beside the model.
        optimizer: of the model's parameters.
        updates: first update -> the updates from there to the last.
        observe: told of each update.
        extra: what else a checkpoint keeps and restores in place, see `TrainingState`.

    Raises:
        KeyboardInterrupt: SIGINT came; the stage was saved.
        SystemExit: SIGTERM came; the stage was saved.
        RunChanged: the stage was begun with other settings or inputs.
    """
    run = opened(folder / stage.name, stage.settings, stage.inputs)
    if (finished := checkpoint.completed(run.checkpoints).get(stage.steps)) is not None:
        checkpoint.verify(finished)
        observe(Event(stage=stage.name, steps=stage.steps, note="is complete"))
        return finished / "model"
    begun = max(checkpoint.completed(run.checkpoints), default=0)
    note = f"goes on after update {begun}" if begun else f"{stage.steps} updates"
    observe(Event(stage=stage.name, steps=stage.steps, note=note))

    def load(path: Path) -> None:
        if isinstance(model, RewardModel):
            model.load_state_dict(folders.load_reward(path)[0].state_dict())
        else:
            model.load_state_dict(folders.load_model(path).state_dict())

    outcome = supervise(
        run,
        updates,
        TrainingState(
            save_model=lambda path: folders.save(model, tokenizer, path),
            load_model=load,
            optimizer=optimizer,
            extra=extra or {},
        ),
        save_every=SAVE_EVERY,
        keep=1,
        observers=[_telling(stage, observe)],
    )
    _end_if_stopped(outcome, stage, observe)
    return checkpoint.completed(run.checkpoints)[outcome.steps] / "model"


def _end_if_stopped(outcome: Outcome, stage: Stage, observe: Observe) -> None:
    if outcome.stopped_by is None:
        return
    note = f"stopped after update {outcome.steps} and saved; run it again to go on"
    observe(Event(stage=stage.name, steps=stage.steps, note=note))
    if outcome.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + outcome.stopped_by)


def model_of(path: Path, device: str) -> Gemma:
    """The model of a stage's folder, which a pipeline always makes as a Gemma."""
    model = folders.load_model(path, device=device)
    if not isinstance(model, Gemma):
        raise RunChanged(f"{path} holds no Gemma any more; begin in another folder")
    return model


def with_context(model: Gemma, context: int) -> Gemma:
    """The same parameters (shared, not copied), meant for texts of up to `context` tokens."""
    other = copy.copy(model)
    other.config = replace(model.config, context=context)
    return other


def probed(updates: Iterator[Step], model: Gemma, rows: TokenBatch, *, of: int) -> Iterator[Step]:
    """The same updates, some of which also report `held_out`: nats per token of `rows`.

    Args:
        updates: of `model`.
        model: measured between two updates, which changes nothing.
        rows: held-out text, the same each time, on the model's device.
        of: how many updates there are in all; the last one is always measured.
    """
    every = max(10, of // PROBES)
    for step in updates:
        done = step.index + 1
        if done % every == 0 or done == of:
            with torch.no_grad():
                loss = cross_entropy(model(rows), rows)
            nats = (loss.total / loss.weight).item()
            yield replace(step, report={**step.report, "held_out": nats})
        else:
            yield step


def hash_of(path: str) -> str | dict[str, str]:
    """The SHA-256 of a file, or of every file of a folder.

    Raises:
        DataError: there is nothing.
    """
    if not Path(path).exists():
        raise DataError(f"{path} does not exist; name a file or folder that does")
    return hashes_below(Path(path)) if Path(path).is_dir() else sha256_of(Path(path))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch has so many threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _telling(stage: Stage, observe: Observe) -> Callable[[Record], None]:
    recent: deque[Record] = deque(maxlen=20)

    def tell(record: Record) -> None:
        recent.append(record)
        seconds = sum(each.seconds for each in recent)
        speed = stage.tokens * len(recent) / max(seconds, 1e-9)
        observe(
            Event(stage=stage.name, steps=stage.steps, step=record.step, tokens_per_second=speed)
        )

    return tell
