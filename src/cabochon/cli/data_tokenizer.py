"""`cabochon data tokenizer`: train a tokenizer from text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cabochon.cli.configuration import read
from cabochon.cli.output import answer, duration_text, say
from cabochon.cli.places import writable
from cabochon.cli.rows import documents_of
from cabochon.core.errors import ConfigError, FolderError
from cabochon.data.tokenizer import train_tokenizer

__all__ = ["TokenizerSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """From which text, how large, where to."""

    data: tuple[str, ...] = ()
    """Files or folders of text, or `stdlib`."""
    field: str = "text"
    """The field of a record that holds its text."""
    vocab_size: int = 8192
    """Entries, the 16 control tokens and the 256 bytes included."""
    coverage: float = 0.9995
    """Fraction of the characters that get an entry of their own; others are written in bytes."""
    out: str = ""
    """The tokenizer folder, made or replaced."""


def main(argv: Sequence[str]) -> int:
    """Trains and saves it; says how many tokens the text now has."""
    invocation = read(
        TokenizerSettings,
        argv,
        prog="cabochon data tokenizer",
        description="Train a tokenizer from text.",
    )
    settings = invocation.settings
    if not settings.data:
        raise ConfigError("from which text? --data FILE ... (or stdlib)")
    if not settings.out:
        raise ConfigError("where to? --out FOLDER names the tokenizer folder")
    out = Path(settings.out)
    if (out / "config.json").exists():
        raise FolderError(f"{out} is a model folder; its tokenizer is the model's own")
    writable(out)
    begin = time.monotonic()
    documents = chain.from_iterable(documents_of(name, settings.field) for name in settings.data)
    texts = [each.text for each in documents]
    tokenizer = train_tokenizer(texts, settings.vocab_size, coverage=settings.coverage)
    tokenizer.save(out)
    characters = sum(map(len, texts))
    tokens = sum(map(len, tokenizer.encode_all(texts)))
    seconds = time.monotonic() - begin
    say(
        f"{tokenizer.vocab_size:,} entries; {len(texts):,} documents, {characters:,} characters, "
        f"{tokens:,} tokens ({characters / tokens:.2f} characters a token) in "
        f"{duration_text(seconds)}"
    )
    if invocation.json:
        answer(
            {
                "out": out.resolve(),
                "vocab_size": tokenizer.vocab_size,
                "documents": len(texts),
                "characters": characters,
                "tokens": tokens,
                "fingerprint": tokenizer.fingerprint(),
            }
        )
    else:
        print(out)
    return 0
