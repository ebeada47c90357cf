"""The loop that records a training run into its directory, and goes on where it was interrupted.

After kill -9 or a power cut a run goes on from its newest checkpoint. On a CPU with the same number
of threads its weights and metrics are then those of the run without the interruption, bit for bit:
batches, schedule and randomness are functions of the step alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cabochon.core import Step
from cabochon.core.errors import CheckpointError, ConfigError, NonFinite
from cabochon.training import checkpoint, parallel
from cabochon.training.checkpoint import TrainingState
from cabochon.training.interruption import StopRequest, stop_requests
from cabochon.training.metrics import MetricsFile, Record, read_metrics
from cabochon.training.process_memory import keep_freed_memory
from cabochon.training.run_directory import Run, create

__all__ = ["Outcome", "Record", "Run", "TrainingState", "create", "read_metrics", "supervise"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a supervised run ended."""

    steps: int
    """Updates made since the run began, those before a resumption included."""
    stopped_by: signal.Signals | None
    """The signal that asked for the end; None when the run is complete."""
    checkpoint: Path | None
    """The newest; None when a run of no updates left none, and on ranks other than 0."""


@dataclass(frozen=True, kw_only=True)
class _Saving:
    """When and where checkpoints are written, and which stay."""

    folder: Path
    state: TrainingState
    every: int
    keep: int
    keep_every: int


def supervise(
    run: Run,
    train: Callable[[int], Iterator[Step]],
    state: TrainingState,
    *,
    save_every: int,
    keep: int = 2,
    keep_every: int = 0,
    observers: Sequence[Callable[[Record], None]] = (),
    at: int | None = None,
) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end; records every update.

    SIGINT and SIGTERM end the run after the present update and a checkpoint; a second SIGINT ends
    it at once, and then it resumes from the checkpoint before. Under torch.distributed every rank
    calls this; rank 0 alone writes, and a signal to any rank ends all of them together. The process
    keeps memory that it frees from then on, see `keep_freed_memory`.

    Args:
        run: not being written by another process.
        train: first update -> the steps from there on, to the end of training; called after
            `state` was restored. Whatever happens between updates, a moving average for one,
            happens in there.
        state: what checkpoints hold.
        save_every: updates between checkpoints; one more is written at the end.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints at multiples of it stay too; 0 for none.
        observers: called with each update after it was recorded.
        at: resume from this checkpoint and remove the later ones; the newest when absent.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged (named), or one could not be
            written; earlier checkpoints stay.
        NonFinite: from `train`, with the last good checkpoint named.
        FolderError: the run is being written by another process, or its metrics cannot be written.
    """
    if save_every < 1 or keep < 1 or keep_every < 0:
        raise ConfigError(
            "save_every and keep must be at least 1 and keep_every at least 0, "
            f"got {save_every}, {keep} and {keep_every}"
        )
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    parallel.refuse_sharded(parameters)
    keep_freed_memory()
    saving = _Saving(
        folder=run.checkpoints, state=state, every=save_every, keep=keep, keep_every=keep_every
    )
    if parallel.rank() > 0:
        parallel.wait_for_all(parameters[0].device)  # until rank 0 has tidied up
        start = _restore(run, state, at)
        return _accompany(train(start), start, saving)
    with run.locked():
        checkpoint.clean(run.checkpoints)
        start = _restore(run, state, at)
        checkpoint.discard_after(run.checkpoints, start)
        parallel.wait_for_all(parameters[0].device)
        with closing(MetricsFile(run.metrics, start=start)) as metrics:
            return _lead(train(start), start, saving, metrics, observers)


def _lead(
    steps: Iterator[Step],
    start: int,
    saving: _Saving,
    metrics: MetricsFile,
    observers: Sequence[Callable[[Record], None]],
) -> Outcome:
    """The process, or the rank of several, that writes the run."""
    done = saved = start
    stopped_by = None
    with _ended(steps, saving), stop_requests() as request:
        since = time.perf_counter()
        while (stopped_by := _agreed(request, saving)) is None:
            step = next(steps, None)
            if step is None:
                break
            record = Record(step=step, seconds=time.perf_counter() - since)
            metrics.append(record)
            done = step.index + 1
            for observe in observers:
                observe(record)
            if done % saving.every == 0:
                _save(done, saving, metrics)
                saved = done
            since = time.perf_counter()
        if saved != done:
            _save(done, saving, metrics)
    newest = checkpoint.completed(saving.folder).get(done)
    return Outcome(steps=done, stopped_by=stopped_by, checkpoint=newest)


def _accompany(steps: Iterator[Step], start: int, saving: _Saving) -> Outcome:
    """A rank that trains with the one that writes: the same updates, and the same end."""
    done = start
    stopped_by = None
    with _ended(steps, saving), stop_requests() as request:
        while (stopped_by := _agreed(request, saving)) is None:
            step = next(steps, None)
            if step is None:
                break
            done = step.index + 1
    return Outcome(steps=done, stopped_by=stopped_by, checkpoint=None)


@contextmanager
def _ended(steps: Iterator[Step], saving: _Saving) -> Iterator[None]:
    """Closes a generator of steps after use, and says what is left after a non-finite update."""
    try:
        yield
    except NonFinite as error:
        found = checkpoint.completed(saving.folder)
        last = list(found.values())[-1] if found else "none: nothing was saved yet"
        raise NonFinite(f"{error}; last good checkpoint: {last}") from error
    finally:
        if isinstance(steps, Generator):
            steps.close()


def _agreed(request: StopRequest, saving: _Saving) -> signal.Signals | None:
    """The signal that any rank was sent: all of them stop after the same update."""
    device = saving.state.optimizer.param_groups[0]["params"][0].device
    number = parallel.on_any_rank(request.signal or 0, device)
    return signal.Signals(number) if number else None


def _save(done: int, saving: _Saving, metrics: MetricsFile) -> None:
    # First the metrics, so that no checkpoint can be ahead of them after a power cut.
    metrics.make_durable()
    checkpoint.write(saving.folder, done, saving.state)
    checkpoint.prune(saving.folder, keep=saving.keep, keep_every=saving.keep_every)


def _restore(run: Run, state: TrainingState, at: int | None) -> int:
    """The number of updates already in the weights, after reading the checkpoint that has them."""
    if at is None:
        return checkpoint.read_newest(run.checkpoints, state)
    found = checkpoint.completed(run.checkpoints)
    if at not in found:
        listing = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{run.folder} has no checkpoint of step {at}; it has: {listing}")
    return checkpoint.read(found[at], state)
