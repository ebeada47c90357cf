"""Calls of the binary in this process, and a small workshop on disk for them."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from cabochon.cli import main

SMALL = ("--model.layers", "2", "--model.width", "32", "--model.ffn-width", "64")
"""Makes gemma2-nano smaller still."""


@dataclass(frozen=True)
class Done:
    """What one call of the binary left."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The one JSON object on standard output."""
        (line,) = self.out.splitlines()
        return json.loads(line)


def call(*words: object) -> Done:
    """`cabochon WORDS`, in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Workshop:
    """Paths of what the tests share; none of them changes it."""

    corpus: Path
    chats: Path
    tokenizer: Path
    run: Path
    """A finished pre-training run."""

    @property
    def model(self) -> Path:
        """Its last model folder."""
        return self.run / "checkpoints" / "step-6" / "model"

    def train(self, *words: object, algorithm: str = "pretrain") -> Done:
        """A short training with one thread, on the shared text unless told otherwise."""
        given = [str(word) for word in words]
        data = self.chats if algorithm == "sft" else self.corpus
        for flag, value in (
            ("--data", data), ("--tokenizer", self.tokenizer), ("--steps", 6), ("--context", 64),
            ("--batch-size", 2), ("--threads", 1), ("--device", "cpu"), ("--checkpoint-every", 2),
        ):  # fmt: skip
            if flag not in given:
                given += [flag, str(value)]
        small = [] if "--model" in given else SMALL
        return call("train", algorithm, *given, *small)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts() -> list[str]:
    """Pieces of real source files, of unequal lengths."""
    folder = Path(json.__file__).parent
    whole = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return [whole[at : at + 150 + 7 * (at % 50)] for at in range(0, 12_000, 400)]
