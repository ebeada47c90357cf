"""The main job on text that every machine has: the source of the Python standard library.

A tokenizer, a teacher, a student distilled from it beside the same student from scratch, and the
distilled one tuned to say in a sentence what a function does, as its docstring did. The distilled
one is then tuned the other way round, to write functions from signatures, and learns from a reward
for such as parse (see `functions`). Modules that are held out are read by no model before they
judge all of them.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cabochon.core.errors import ConfigError
from cabochon.data import corpus
from cabochon.files import whole
from cabochon.pipelines import functions, gemma2
from cabochon.pipelines.recipe import Phase, Shape
from cabochon.pipelines.stages import Event, Observe, nobody, opened
from cabochon.pipelines.texts import Texts
from cabochon.pipelines.timing import timed

__all__ = ["Config", "Event", "Observe", "alignment", "recipe", "run"]

HELD_OUT_FRACTION = 0.2
"""Of the modules: enough documents for an interval, and far more text is left than is read."""
TABLES = frozenset({"encodings", "pydoc_data"})
"""Modules of tables and generated text, a fifth of the library; little is learned from them."""
QUESTION = "Say in one sentence what this function does.\n\n"
FULL_MINUTES = 7.0

TEACH = Phase(steps=1200, rows=4, learning_rate=1e-2)
LEARN = Phase(steps=560, rows=4, learning_rate=1e-2)
TUNE = Phase(steps=200, rows=4, learning_rate=3e-3)
WRITE = Phase(steps=200, rows=16, learning_rate=3e-3)
BOND = Phase(steps=60, rows=32, learning_rate=2e-3)
MEMBER = Phase(steps=20, rows=16, learning_rate=1e-3)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a user of the demo may want to change."""

    seed: int = 0
    """Of every first weight, every order of reading and every draw."""
    minutes: float = FULL_MINUTES
    """About how long it takes on two cores; scales the numbers of updates, by arithmetic alone."""
    threads: int = 1
    """Of torch; part of the result, because the order of a sum is. For models as small as these two
    are a tenth faster on an idle machine, and several times slower on one that does anything else.
    """

    def __post_init__(self) -> None:
        if not 0.0 < self.minutes < float("inf"):
            raise ConfigError(f"minutes must be above 0, got {self.minutes}")
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")


def recipe(config: Config, folder: Path) -> gemma2.Config:
    """The Gemma 2 recipe sized for `config.minutes`, with its texts in `folder/corpus`."""
    texts = folder / "corpus"
    scale = config.minutes / FULL_MINUTES
    return gemma2.Config(
        train=str(texts / "train.jsonl"),
        held_out=str(texts / "held_out.jsonl"),
        chats=str(texts / "chats.jsonl"),
        held_out_chats=str(texts / "held_out_chats.jsonl"),
        teacher=Shape(
            width=128, layers=4, heads=4, kv_heads=2, head_width=32, ffn_width=384, window=64
        ),
        student=Shape(
            width=96, layers=2, heads=3, kv_heads=1, head_width=32, ffn_width=256, window=64
        ),
        teach=_scaled(TEACH, scale),
        learn=_scaled(LEARN, scale),
        tune=_scaled(TUNE, scale),
        vocab_size=2048,
        context=128,
        tune_context=256,
        held_out_tokens=max(4_000, min(100_000, round(40_000 * scale))),
        held_out_chat_count=max(20, min(400, round(200 * scale))),
        samples=8,
        seed=config.seed,
        threads=config.threads,
    )


def alignment(config: Config) -> functions.Config:
    """The alignment sized for `config.minutes`."""
    scale = config.minutes / FULL_MINUTES
    return functions.Config(
        write=_scaled(WRITE, scale),
        bond=_scaled(BOND, scale, least=2),
        member=_scaled(MEMBER, scale, least=2),
        held_out=max(20, min(400, round(200 * scale))),
        seed=config.seed,
    )


def run(config: Config, folder: Path, observe: Observe = nobody) -> dict[str, object]:
    """The results of the demo, which are also in `folder/results.json` and `folder/report.html`.

    Interrupted and called again it goes on, and ends with the same results, bit for bit.

    Args:
        config: seed, length, threads.
        folder: where everything goes; made if absent.
        observe: called with every event.

    Returns:
        The results (their schema is in `evaluation.report`).

    Raises:
        RunChanged: `folder` was begun with another seed, length or Python.
        KeyboardInterrupt: SIGINT came and everything was saved.
    """
    inputs = {"library": f"Python {platform.python_version()}"}
    with opened(folder, {"pipeline": "demo", **asdict(config)}, inputs).locked():
        _write_corpus(folder, observe)
        about: dict[str, object] = {
            "pipeline": "demo",
            "title": "A small model family from the Python standard library",
            "text": "source of the standard library of " + inputs["library"],
            "repeat": _command(config),
        }

        def align(texts: Texts, models: Mapping[str, Path]) -> dict[str, Any]:
            how, student, place = alignment(config), models["distilled"], folder / "corpus"
            found = functions.aligned(how, folder, texts.tokenizer, student, place, observe)
            return {"alignment": found}

        return gemma2.build(recipe(config, folder), folder, observe, about, align)


def _scaled(phase: Phase, scale: float, least: int = 10) -> Phase:
    return replace(phase, steps=max(least, round(phase.steps * scale)))


def _command(config: Config) -> str:
    """What to type for the same result."""
    flags = {f"--{name}": value for name, value in asdict(config).items()}
    return " ".join(["cabochon demo", *(f"{flag} {value:g}" for flag, value in flags.items())])


def _write_corpus(folder: Path, observe: Observe) -> None:
    """The library as the files that the recipe reads, in `folder/corpus`."""
    place = folder / "corpus"
    if place.exists():
        return
    observe(Event(stage="corpus", steps=0, note="reads the standard library"))
    with timed(folder, "corpus"), whole(place) as aside:
        aside.mkdir()
        library = corpus.standard_library(HELD_OUT_FRACTION)
        found = corpus.summaries(HELD_OUT_FRACTION)
        for name, documents in (("train", library.train), ("held_out", library.held_out)):
            kept = [each for each in documents if corpus.module_of(each.source) not in TABLES]
            rows = ({"text": each.text, "source": each.source} for each in kept)
            _write_lines(aside / f"{name}.jsonl", rows)
        for before, summaries in (("", found.train), ("held_out_", found.held_out)):
            _write_lines(aside / f"{before}chats.jsonl", map(_conversation, summaries))
            written = filter(None, map(functions.conversation_of, summaries))
            _write_lines(aside / f"{before}functions.jsonl", written)


def _conversation(found: corpus.Summary) -> dict[str, str]:
    return {
        "prompt": QUESTION + found.function,
        "completion": found.summary,
        "source": found.source,
    }


def _write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
