"""Rows of packed documents, in memory or on disk, read in a keyed and seekable order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cabochon.core.errors import ConfigError, DataError, FolderError, TokenizerMismatch
from cabochon.core.keys import Key
from cabochon.core.types import TokenBatch
from cabochon.data.mapped import mapped
from cabochon.data.order import Order
from cabochon.files import sha256_of, whole

__all__ = ["Packed", "PackedManifest", "shard"]

_MANIFEST = "manifest.json"
_ROWS = "rows.safetensors"


@dataclass(frozen=True, kw_only=True)
class PackedManifest:
    """What packed rows were made of."""

    context: int
    """Slots of a row, in tokens."""
    rows: int
    documents: int
    """Documents before long ones were split."""
    tokens: int
    """Tokens in all rows, padding not counted."""
    targets: int
    """Tokens that count in the loss."""
    tokenizer: str = ""
    """The tokenizer's fingerprint; empty where it is not known."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what went in, by name."""


class Packed:
    """Rows of `context` slots, each filled with whole documents or pieces of long ones.

    A document sees only itself and its positions begin at 0. The last token of a piece still has
    its target, the first token of the next piece: splitting loses no target.
    """

    def __init__(self, manifest: PackedManifest, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Rows as `pack_tokens` and `pack_chats` make them.

        Args:
            manifest: what they were made of.
            arrays: "tokens" R T; "learned" R T bool, True where the slot's target counts;
                "row_starts" R + 1, the first piece of each row; "lengths" and "following", for
                each piece its tokens and the token that follows it (-1 for none).
        """
        self.manifest = manifest
        self._arrays = arrays

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.manifest.rows

    @property
    def context(self) -> int:
        """Slots of a row, in tokens."""
        return self.manifest.context

    @property
    def waste(self) -> float:
        """Fraction of all slots that is padding."""
        return 1.0 - self.manifest.tokens / (self.rows * self.context)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> TokenBatch:
        """The chosen rows, B T, in the order of `indices`.

        Raises:
            IndexError: a row number lies outside the rows.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.rows:
            raise IndexError(f"rows go from 0 to {self.rows - 1}, got {chosen.tolist()}")
        tokens = self._arrays["tokens"][chosen].astype(np.int64)
        targets = np.zeros_like(tokens)
        positions = np.zeros_like(tokens)
        documents = np.full_like(tokens, -1)
        for place, row in enumerate(chosen):
            first, last = self._arrays["row_starts"][row : row + 2]
            lengths = self._arrays["lengths"][first:last].astype(np.int64)
            following = self._arrays["following"][first:last]
            ends = np.cumsum(lengths)
            filled = int(ends[-1])
            documents[place, :filled] = np.repeat(np.arange(len(lengths)), lengths)
            positions[place, :filled] = np.arange(filled) - np.repeat(ends - lengths, lengths)
            targets[place, : filled - 1] = tokens[place, 1:filled]
            targets[place, ends - 1] = np.maximum(following, 0)
        return TokenBatch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            documents=torch.from_numpy(documents),
            targets=torch.from_numpy(targets),
            mask=torch.from_numpy(self._arrays["learned"][chosen]),
        )

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """Endless batches, epoch after epoch in keyed orders; nothing is dropped between epochs.

        Args:
            key: names the order.
            batch_size: rows of a batch of all ranks together.
            start: batches already taken; the rest is the same as without stopping.
            rank: which of `ranks` equal parts of each batch to give out; the parts in the order
                of their ranks are the batch that a single process would see.
            ranks: how many processes share each batch.

        Raises:
            ConfigError: the batch cannot be shared equally, or a number is out of range.
        """
        own = shard(batch_size, start, rank, ranks)
        order = Order(key, self.rows, start * batch_size)
        return (self.batch(order.take(batch_size)[own]) for _ in iter(int, 1))

    def check_tokenizer(self, fingerprint: str) -> None:
        """Make sure that the rows were made with the tokenizer of this fingerprint.

        Raises:
            TokenizerMismatch: they were made with another one, or it is not known.
        """
        if self.manifest.tokenizer != fingerprint:
            raise TokenizerMismatch(
                f"the rows were packed with tokenizer {self.manifest.tokenizer[:12] or 'unknown'}, "
                f"the model's is {fingerprint[:12]}; pack the text again with the model's tokenizer"
            )

    def save(self, folder: str | Path) -> None:
        """Write a new folder: the rows as safetensors, and a manifest with their SHA-256.

        The folder appears whole or not at all.

        Raises:
            FolderError: there is something at `folder` already, or it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FolderError(f"{folder} exists already; remove it or choose another folder")
        try:
            with whole(folder) as aside:
                aside.mkdir()
                save_file(dict(self._arrays), aside / _ROWS)
                content = asdict(self.manifest) | {"sha256": {_ROWS: sha256_of(aside / _ROWS)}}
                content["sha256"][_MANIFEST] = _content_sha256(content)
                (aside / _MANIFEST).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        except (OSError, SafetensorError) as error:
            raise FolderError(f"the rows could not be written to {folder}: {error}") from error

    @staticmethod
    def load(folder: str | Path) -> Packed:
        """The rows of a folder, mapped into memory rather than read; every byte is checked once.

        Raises:
            FolderError: the folder or one of its files is absent.
            DataError: a file is damaged, cut short, or not of this form.
        """
        folder = Path(folder)
        for name in (_MANIFEST, _ROWS):
            if not (folder / name).is_file():
                raise FolderError(f"{folder} holds no {name}; it is no folder of packed rows")
        try:
            content = json.loads((folder / _MANIFEST).read_text("utf-8"))
            own, expected = content["sha256"].pop(_MANIFEST), content["sha256"][_ROWS]
            manifest = PackedManifest(
                **{each.name: content[each.name] for each in fields(PackedManifest)}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _MANIFEST} is damaged: {error!r}; pack again") from error
        if own != _content_sha256(content):
            raise DataError(
                f"{folder / _MANIFEST} is damaged: it is not what was written; pack again"
            )
        found = sha256_of(folder / _ROWS)
        if found != expected:
            raise DataError(
                f"{folder / _ROWS} is damaged: its SHA-256 is {found[:12]}..., the manifest says "
                f"{expected[:12]}...; pack again"
            )
        return Packed(manifest, mapped(folder / _ROWS))


def shard(batch_size: int, start: int, rank: int, ranks: int) -> slice:
    """The rows of a batch that belong to `rank`.

    Raises:
        ConfigError: a number is out of range or the batch does not divide.
    """
    if batch_size < 1 or start < 0:
        raise ConfigError(f"need batch_size >= 1 and start >= 0, got {batch_size} and {start}")
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank must lie in 0 to {ranks - 1}, got {rank}")
    if batch_size % ranks:
        raise ConfigError(f"batch_size {batch_size} cannot be shared equally by {ranks} ranks")
    own = batch_size // ranks
    return slice(rank * own, (rank + 1) * own)


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
