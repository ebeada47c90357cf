"""`cabochon data tokenizer | pack | cache-teacher | inspect`: prepare text, and look at it."""

from __future__ import annotations

from collections.abc import Sequence

from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError

__all__ = ["KINDS", "main"]

KINDS = {
    "tokenizer": ("cabochon.cli.data_tokenizer", "train a tokenizer from text"),
    "pack": ("cabochon.cli.data_pack", "encode and pack text into rows, once for many runs"),
    "cache-teacher": (
        "cabochon.cli.data_cache_teacher",
        "store what a teacher says about a text, once for many runs",
    ),
    "inspect": ("cabochon.cli.data_inspect", "counts, a decoded sample and the loss mask"),
}
"""What to do -> the module that does it, and what it is for."""


def main(argv: Sequence[str]) -> int:
    """Dispatches on what to do."""
    if argv and argv[0] in {"-h", "--help"}:
        print("usage: cabochon data WHAT ...\n")
        for name, (_, purpose) in KINDS.items():
            print(f"  {name:<13}  {purpose}")
        print("\ncabochon data WHAT --help lists the options.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"do what with it? cabochon data {' | '.join(KINDS)} ...")
    if argv[0] not in KINDS:
        raise ConfigError(unknown("verb of data", argv[0], KINDS))
    import importlib

    code: int = importlib.import_module(KINDS[argv[0]][0]).main(argv[1:])
    return code
