"""The standard library cut into pieces: many texts whose beginnings make different prompts."""

from __future__ import annotations

import json
from pathlib import Path

from cabochon.core import Key
from cabochon.data import corpus
from cabochon.data.order import Order
from cabochon.files import whole

__all__ = ["write_pieces"]

LINES = 12
LEAST_CHARACTERS = 200
MOST_PIECES = 8_000
"""Enough for every default, and few enough to be read in seconds."""
TABLES = frozenset({"encodings", "pydoc_data"})
"""Modules of tables and generated text, of which little is learned."""


def write_pieces(path: Path) -> None:
    """A .jsonl at `path` of {"text", "source"} rows: stretches of lines of the library's modules.

    Raises:
        FolderError: this Python keeps no source files.
    """
    pieces = []
    for document in corpus.standard_library(0.0).train:
        if corpus.module_of(document.source) in TABLES:
            continue
        lines = document.text.split("\n")
        for start in range(0, len(lines), LINES):
            text = "\n".join(lines[start : start + LINES])
            if len(text) >= LEAST_CHARACTERS:
                pieces.append({"text": text, "source": f"{document.source}:{start + 1}"})
    chosen = Order(Key(0, ("pieces",)), len(pieces)).take(min(MOST_PIECES, len(pieces)))
    with whole(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for number in sorted(chosen):
            file.write(json.dumps(pieces[number], ensure_ascii=False) + "\n")
