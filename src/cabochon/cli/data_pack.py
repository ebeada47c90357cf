"""`cabochon data pack`: encode and pack text once, for many runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cabochon.cli.configuration import read
from cabochon.cli.machine import tokenizer_of
from cabochon.cli.output import answer, say
from cabochon.cli.places import free
from cabochon.cli.rows import pack_chat_sources, pack_document_sources, refuse_repeated
from cabochon.cli.settings import TooLong
from cabochon.core.errors import ConfigError
from cabochon.data.packed import Packed

__all__ = ["PackSettings", "main", "summary"]


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Which text, by which tokenizer, in rows of which length."""

    data: tuple[str, ...] = ()
    """Files or folders, or `stdlib`."""
    tokenizer: str = ""
    """A tokenizer or model folder."""
    context: int = 256
    """Tokens of a row."""
    chat: bool = False
    """The records are conversations; only the model's turns are to be learned."""
    too_long: TooLong = "refuse"
    """Conversations longer than a row: refuse the first, or drop them all and say how many."""
    field: str = "text"
    """The field of a record that holds its text."""
    out: str = ""
    """The folder of the rows, which must be new."""


def main(argv: Sequence[str]) -> int:
    """Packs, saves, and says what came of it."""
    invocation = read(
        PackSettings, argv, prog="cabochon data pack", description="Encode and pack text once."
    )
    settings = invocation.settings
    for name, what in (("data", "FILE ..."), ("tokenizer", "FOLDER"), ("out", "FOLDER")):
        if not getattr(settings, name):
            raise ConfigError(f"cabochon data pack needs --{name} {what}")
    refuse_repeated(settings.data)
    out = free(Path(settings.out))
    tokenizer = tokenizer_of(settings.tokenizer)
    if settings.chat:
        packed = pack_chat_sources(settings.data, tokenizer, settings.context, settings.too_long)
    else:
        packed = pack_document_sources(settings.data, settings.field, tokenizer, settings.context)
    packed.save(out)
    say(summary(packed))
    if invocation.json:
        answer({"out": out.resolve(), **asdict(packed.manifest), "padding": packed.waste})
    else:
        print(out)
    return 0


def summary(packed: Packed) -> str:
    """One line about packed rows."""
    manifest = packed.manifest
    return (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.targets:,} "
        f"learned) in {manifest.rows:,} rows of {manifest.context}; {packed.waste:.1%} padding"
    )
