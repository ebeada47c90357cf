"""A text and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Document", "content_hash"]


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    source: str
    """Where it came from, for messages: a file, and a line or row where there is one."""


def content_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over the texts in order, whatever their sources are called."""
    whole = hashlib.sha256()
    for document in documents:
        encoded = document.text.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "little"))
        whole.update(encoded)
    return whole.hexdigest()
