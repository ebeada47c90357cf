"""Training and held-out sides that depend on content alone.

A document's side is decided by a hash of its text: not by its place, its file or the documents
around it. So duplicates land on one side, and a corpus that grows moves nothing across.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cabochon.core.errors import ConfigError
from cabochon.data.documents import Document

__all__ = ["is_held_out", "split_by_document"]


def is_held_out(content: str, fraction: float, *, salt: str = "") -> bool:
    """True for about `fraction` of all contents; never at 0, always at 1.

    Args:
        content: what decides.
        fraction: the held-out share, in [0, 1]. A larger one holds out the same and more.
        salt: another salt makes another, independent split.

    Raises:
        ConfigError: `fraction` lies outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"the held-out fraction must lie in [0, 1], got {fraction}")
    digest = hashlib.blake2b(
        content.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()[:64]
    ).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def split_by_document(
    documents: Iterable[Document], held_out_fraction: float, *, salt: str = ""
) -> tuple[list[Document], list[Document]]:
    """Training documents and held-out ones, each in their order of coming.

    Raises:
        ConfigError: the fraction lies outside [0, 1].
    """
    train: list[Document] = []
    held_out: list[Document] = []
    is_held_out("", held_out_fraction)  # a wrong fraction is an error without documents too
    for document in documents:
        side = held_out if is_held_out(document.text, held_out_fraction, salt=salt) else train
        side.append(document)
    return train, held_out
