"""What a person sees of a run: a live line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from cabochon.cli import progress, stages
from cabochon.cli.output import bytes_text, duration_text
from cabochon.cli.progress import Pace, watching
from cabochon.core import Step
from cabochon.pipelines.stages import Event
from cabochon.training.metrics import Record


def step(index: int) -> Step:
    return Step(
        index=index, loss=2.5, grad_norm=1.0, weight=64.0, learning_rate=1e-3, report={"kl": 0.25}
    )


def record(index: int) -> Record:
    return Record(step=step(index), seconds=0.1)


def screen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> StringIO:
    out = StringIO()
    drawn = Console(file=out, force_terminal=terminal, width=120, soft_wrap=True)
    for module in (progress, stages):
        monkeypatch.setattr(module, "console", lambda: drawn)
    return out


def test_the_pace_is_that_of_the_last_updates() -> None:
    pace = Pace(steps=10, tokens=100)
    assert pace.tokens_per_second == 0.0
    pace.clock.clear()
    pace.clock.extend([0.0, 2.0, 4.0])
    assert pace.seconds_per_step == 2.0
    assert pace.tokens_per_second == 50.0
    assert pace.remaining(3) == 12.0
    assert pace.remaining(9) == 0.0


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = screen(monkeypatch, terminal=False)
    with watching(50, 64) as watcher:
        for index in range(50):
            watcher(record(index))
    first, last = out.getvalue().splitlines()
    assert first.startswith("step 1/50  loss 2.500  kl 0.250  lr 1.0e-03")
    assert last.startswith("step 50/50")
    assert "tokens/s" in last
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_there_is_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = screen(monkeypatch, terminal=True)
    with watching(50, 64, done=20) as watcher:
        for index in range(20, 50):
            watcher(record(index))
    assert "\x1b" in out.getvalue()
    assert "50/50" in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_stages_of_a_pipeline_each_have_their_line(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    out = screen(monkeypatch, terminal=terminal)
    with stages.showing_stages() as observe:
        observe(Event(stage="tokenizer", steps=0, note="counts the text"))
        for index in range(3):
            observe(Event(stage="teacher", steps=3, step=step(index), tokens_per_second=1234.0))
        observe(Event(stage="scratch", steps=3, note="is complete"))
    said = out.getvalue()
    for part in ("tokenizer", "counts the text", "teacher", "3/3", "1,234 tokens/s", "is complete"):
        assert part in said


def test_sizes_and_times_are_readable() -> None:
    assert [bytes_text(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == [
        "12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip
    assert [duration_text(s) for s in (0.25, 42, 600, 3700)] == [
        "0.25 s", "42 s", "10 min", "1 h 02 min",
    ]  # fmt: skip
