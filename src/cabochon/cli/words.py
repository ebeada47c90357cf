"""Words that are nearly right: which known one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest", "unknown"]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`; None if none is like it."""
    found = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """One sentence: `word` is not known, what was probably meant, or all there is."""
    known = sorted(known)
    meant = nearest(word, known)
    hint = f"did you mean {meant!r}?" if meant else "known are: " + ", ".join(known)
    return f"unknown {kind} {word!r}: {hint}"
