"""What a person sees of a pipeline: one live line for each stage, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cabochon.cli.output import answer, console, say
from cabochon.pipelines.gemma2 import Event, Observe

__all__ = ["carry_out", "showing_stages"]

SECONDS_BETWEEN_LINES = 10.0


def carry_out(
    pipeline: Callable[[Observe], dict[str, object]], folder: Path, *, as_json: bool
) -> int:
    """Runs a pipeline under a live display; prints its results or where its report is."""
    try:
        with showing_stages() as observe:
            results = pipeline(observe)
    except KeyboardInterrupt:
        say(f"stopped; go on with: cabochon resume {folder}")
        raise
    if as_json:
        answer(results)
        return 0
    page = folder / "report.html"
    if page.is_file():
        say("the report:")
        print(page)
    else:
        print(folder)
    return 0


@contextmanager
def showing_stages() -> Iterator[Observe]:
    """An observer that draws on standard error."""
    screen = console()
    if not screen.is_terminal:
        yield _Lines(screen)
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=screen) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.note:
            self._progress.console.print(f"{event.stage:<12} {event.note}", markup=False)
        if event.step is None:
            return
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._progress.add_task(
                event.stage, total=event.steps, text=""
            )
        self._progress.update(
            self._tasks[event.stage], completed=event.step.index + 1, text=_text(event)
        )


class _Lines:
    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._said: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.note:
            self._screen.print(f"{event.stage}: {event.note}", markup=False)
        if event.step is None:
            return
        now = time.monotonic()
        last = event.step.index + 1 == event.steps
        if last or now - self._said.get(event.stage, float("-inf")) >= SECONDS_BETWEEN_LINES:
            self._said[event.stage] = now
            count = f"step {event.step.index + 1}/{event.steps}"
            self._screen.print(f"{event.stage}: {count}  {_text(event)}", markup=False)


def _text(event: Event) -> str:
    if event.step is None:
        return ""
    report = event.step.report
    if "reward" in report:  # the loss of a policy gradient says nothing
        return f"reward {report['reward']:.3f}  {report['completion_tokens']:.0f} tokens each"
    return f"loss {event.step.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
