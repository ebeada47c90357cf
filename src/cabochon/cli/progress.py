"""What a person sees of a training run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cabochon.cli.output import console, duration_text
from cabochon.core import Step
from cabochon.training.metrics import Record

__all__ = ["Pace", "Watcher", "watching"]

RECENT = 20
SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Pace:
    """Tokens per second over the last updates, and the time that the rest will take."""

    steps: int
    """Updates in all."""
    tokens: int
    """Tokens that each update reads, padding included."""
    clock: deque[float] = field(default_factory=lambda: deque([time.monotonic()], RECENT + 1))

    def tick(self) -> None:
        """An update has just ended."""
        self.clock.append(time.monotonic())

    @property
    def seconds_per_step(self) -> float:
        """Mean over the last updates; infinite before the first."""
        ticks = len(self.clock) - 1
        return (self.clock[-1] - self.clock[0]) / ticks if ticks else float("inf")

    @property
    def tokens_per_second(self) -> float:
        """Zero before the first update."""
        return self.tokens / max(self.seconds_per_step, 1e-9)

    def remaining(self, index: int) -> float:
        """Seconds from the end of update `index` to the end of the run."""
        return (self.steps - index - 1) * self.seconds_per_step


class Watcher:
    """Shows each update; on no terminal, a plain line now and then."""

    def __init__(
        self, pace: Pace, screen: Console, progress: Progress | None, unit: str = "tokens"
    ) -> None:
        self._pace = pace
        self._unit = unit
        self._screen = screen
        self._progress = progress
        self._task = progress.add_task("", total=pace.steps, text="") if progress else None
        self._said = float("-inf")

    def __call__(self, record: Record) -> None:
        """An update has just been made."""
        step = record.step
        self._pace.tick()
        text = self._text(step)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step.index + 1, text=text)
            return
        now = time.monotonic()
        last = step.index + 1 == self._pace.steps
        if last or now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self._screen.print(f"step {step.index + 1}/{self._pace.steps}  {text}", markup=False)

    def _text(self, step: Step) -> str:
        reports = "".join(f"  {name} {value:.3f}" for name, value in sorted(step.report.items()))
        return (
            f"loss {step.loss:.3f}{reports}  lr {step.learning_rate:.1e}  "
            f"{self._pace.tokens_per_second:,.0f} {self._unit}/s  "
            f"{duration_text(self._pace.remaining(step.index))} left"
        )


@contextmanager
def watching(steps: int, tokens: int, *, done: int = 0, unit: str = "tokens") -> Iterator[Watcher]:
    """A watcher for a run of `steps` updates of `tokens` each, of which `done` were made before."""
    screen = console()
    pace = Pace(steps=steps, tokens=tokens)
    if not screen.is_terminal:
        yield Watcher(pace, screen, None, unit)
        return
    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=screen, transient=False) as progress:
        watcher = Watcher(pace, screen, progress, unit)
        if done:
            progress.update(progress.task_ids[0], completed=done)
        yield watcher
