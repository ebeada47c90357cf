"""A teacher on disk: what it says about every document of a text, read instead of computed.

    CACHE/
      manifest.json              what it was made of, every shard's SHA-256, and the error bounds
      shard-00000.safetensors    documents one behind the other

A document is found by the hash of its tokens, so neither packing, nor order, nor the shape of the
batch matters; what matters is how long documents were cut into pieces, since a piece is a document.
Beside each document stands which of its positions are stored: all of a text, of a conversation the
model's turns.

`data.teacher_cache_writing` makes such folders; `data.truncation` says what is kept and lost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError, FolderError, TokenizerMismatch
from cabochon.core.types import SampledTargets, TokenBatch, TopKTargets
from cabochon.data.batches import DIGEST_BYTES, Placed, digest, documents
from cabochon.data.mapped import mapped
from cabochon.data.packed import Packed
from cabochon.data.truncation import log_rest
from cabochon.files import sha256_of

__all__ = [
    "MAKING",
    "MANIFEST",
    "CacheIdentity",
    "CacheManifest",
    "Losses",
    "Shard",
    "TeacherCache",
    "content_sha256",
    "is_teacher_cache",
    "restored",
]

MANIFEST = "manifest.json"
MAKING = "making.json"
"""Stands there instead of the manifest while the cache is being made."""

AGAIN = "make it again: cabochon data cache-teacher"


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What a cache is made of and how; one that was interrupted goes on only if all is the same."""

    form: Literal["top_k", "sampled"]
    width: int
    """Tokens kept at a position: the k likeliest, or how many draws."""
    seed: int
    """Of the draws."""
    dtype: Literal["float32", "float16"]
    """Of the stored log-probabilities."""
    vocabulary: int
    """Tokens that the teacher predicts."""
    tokenizer: str
    """Fingerprint."""
    teacher: Mapping[str, str]
    """SHA-256 of its configuration and weights by file; of a server, its address and model."""
    text: str
    """SHA-256 over the tokens of all rows and which of them count."""
    making: Mapping[str, Any]
    """Sizes and precision that can change the last bits."""

    def __post_init__(self) -> None:
        most = self.vocabulary if self.form == "top_k" else 2**16 - 1
        if not 1 <= self.width <= most:
            what = "top_k" if self.form == "top_k" else "draws"
            raise ConfigError(f"{what} must lie in 1 to {most}, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What is lost, averaged over the stored positions; `data.truncation` derives it."""

    tail: float = 0.0
    """Probability of all tokens that are not stored. Twice it bounds the gradient's error."""
    largest_tail: float = 0.0
    """Of any position."""
    uneven: float = 0.0
    """Nats: KL that is lost at most against a student that is even among those tokens."""
    rounding: float = 0.0
    """Sum of |stored - exact| over the probabilities, from float16."""
    standard_error: float = 0.0
    """Nats: of a position's cross-entropy by draws, root mean square, where student = teacher."""
    gradient_noise: float = 0.0
    """Length of the error that draws make in a position's gradient by the logits, likewise."""

    def kl_bound(self, log_ratio: float = 0.0) -> float:
        """Nats a position by which the KL of a cut teacher is too low, at most.

        Args:
            log_ratio: log of how many times the student's least likely unstored token is below
                the average of them: 0 for an even student, at most 2 c under a soft-cap c.
        """
        return self.uneven + self.tail * log_ratio


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache."""

    file: str
    sha256: str
    bytes: int
    documents: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """What a finished cache holds."""

    identity: CacheIdentity
    documents: int
    positions: int
    """Positions of all documents that are stored."""
    losses: Losses
    shards: tuple[Shard, ...]
    note: str = field(default="", compare=False)
    """For people: what the teacher was called, where the text came from."""

    def text(self) -> str:
        """As the file holds it, with a hash of its own."""
        content = asdict(self)
        return json.dumps({**content, "sha256": content_sha256(content)}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> CacheManifest:
        """From the file.

        Raises:
            DataError: it is damaged, or not of this form.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            own = content.pop("sha256")
            found = CacheManifest(
                **content
                | {
                    "identity": CacheIdentity(**content["identity"]),
                    "losses": Losses(**content["losses"]),
                    "shards": tuple(Shard(**each) for each in content["shards"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from error
        if own != content_sha256(content):
            raise DataError(f"{path} is damaged: it is not what was written; {AGAIN}")
        return found


class TeacherCache:
    """A teacher that answers from a folder.

    It says the same about a document wherever the document stands. Of a cut teacher `tail` is NaN,
    and of a drawn one every share 0, where the batch asks for nothing.
    """

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        """The cache of a folder whose files are as the manifest says; `open` makes sure of it."""
        self.folder = folder
        self.manifest = manifest
        self._shards = [mapped(folder / each.file) for each in manifest.shards]
        counts = [len(each["lengths"]) for each in self._shards]
        every = np.concatenate([_digests(each) for each in self._shards])
        order = np.argsort(every, kind="stable")
        self._digests = every[order]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._record = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])[order]

    @staticmethod
    def open(folder: str | Path) -> TeacherCache:
        """The cache of a folder, mapped into memory rather than read; every byte is checked once.

        Raises:
            FolderError: it is no cache, an unfinished one, or lacks a shard.
            DataError: a file is damaged or cut short; it is named.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FolderError(
                f"the teacher cache {folder} is not finished; the command that began it goes on "
                "with it"
                if (folder / MAKING).is_file()
                else f"{folder} holds no {MANIFEST}; it is no teacher cache"
            )
        manifest = CacheManifest.read(folder / MANIFEST)
        for shard in manifest.shards:
            _check(folder / shard.file, shard)
        return TeacherCache(folder, manifest)

    def __call__(self, batch: TokenBatch, /) -> TopKTargets | SampledTargets:
        """What the teacher says at the counted positions of the batch.

        Raises:
            DataError: a document is not in the cache, or not at every position that counts.
        """
        rows, length = batch.shape
        sampled = self.manifest.identity.form == "sampled"
        width, size = self.manifest.identity.width, rows * length
        ids = np.full((size, width), -1, np.int64)
        value = np.full((size, width), 0.0 if sampled else -math.inf, np.float32)
        tail = np.full(size, math.nan, np.float32)
        for document in documents(batch):
            if document.counted.any():
                self._fill(document, ids, value, tail)
        device = batch.tokens.device

        def placed(array: NDArray[Any], *shape: int) -> Tensor:
            return torch.from_numpy(array).view(rows, length, *shape).to(device)

        if sampled:
            return SampledTargets(ids=placed(ids, width), share=placed(value, width))
        logprob, rest = placed(value, width), placed(tail)
        if self.manifest.identity.dtype == "float16":
            logprob = restored(logprob, rest)
        return TopKTargets(ids=placed(ids, width), logprob=logprob, tail=rest)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Make sure that its ids mean what those of the tokenizer of this fingerprint mean.

        Raises:
            TokenizerMismatch: they were made by another tokenizer.
        """
        made = self.manifest.identity.tokenizer
        if made != fingerprint:
            raise TokenizerMismatch(
                f"the teacher cache {self.folder} was made with tokenizer {made[:12]}, the "
                f"student's is {fingerprint[:12]}; train the student with the teacher's "
                "tokenizer, and cache the teacher on its tokens"
            )

    def check_teacher(self, teacher: Mapping[str, str], name: str) -> None:
        """Make sure that it was made from this very teacher.

        Args:
            teacher: SHA-256 of its files, as `CacheIdentity.teacher` holds them.
            name: what it is called, for the message.

        Raises:
            DataError: another file, or another content of one; it is named.
        """
        made = self.manifest.identity.teacher
        unlike = sorted(k for k in {*made, *teacher} if made.get(k) != teacher.get(k))
        if unlike:
            raise DataError(
                f"the teacher cache {self.folder} was made from another teacher than {name}: "
                f"{', '.join(unlike)} differ; {AGAIN}, or leave one of the two out"
            )

    def check_covers(self, rows: Packed, name: str = "the data") -> None:
        """Make sure that every document of the rows is there, at every position that counts.

        Raises:
            DataError: one is not; it is named by its row.
        """
        for start in range(0, rows.rows, 256):
            stop = min(start + 256, rows.rows)
            for document in documents(rows.batch(range(start, stop))):
                if document.counted.any():
                    self._find(document, f"in row {start + document.row} of {name}")

    def sha256(self) -> str:
        """Of the manifest, and with it of every byte of the cache."""
        return sha256_of(self.folder / MANIFEST)

    def _find(self, document: Placed, place: str) -> tuple[Mapping[str, NDArray[Any]], int]:
        """The shard and the record in it."""
        wanted = np.frombuffer(digest(document.tokens), f"S{DIGEST_BYTES}")[0]
        first = int(np.searchsorted(self._digests, wanted, side="left"))
        last = int(np.searchsorted(self._digests, wanted, side="right"))
        shown = ", ".join(map(str, document.tokens[:6]))
        what = f"a document of {len(document.tokens)} tokens ({shown}, ...) {place}"
        for at in range(first, last):
            shard, record = self._shards[self._shard[at]], int(self._record[at])
            begin, end = shard["first_token"][record : record + 2]
            if not (document.counted & ~shard["stored"][begin:end]).any():
                return shard, record
        if first < last:
            raise DataError(
                f"{what} is in the teacher cache {self.folder}, but not at every position that is "
                "to be learned; cache it with the same masks (--chat, or not)"
            )
        raise DataError(
            f"{what} is not in the teacher cache {self.folder}, which was made from other text, or "
            "from this text in rows of another length (--context splits documents); "
            f"{AGAIN} ... with this data"
        )

    def _fill(
        self,
        document: Placed,
        ids: NDArray[np.int64],
        value: NDArray[np.float32],
        tail: NDArray[np.float32],
    ) -> None:
        shard, record = self._find(document, f"in row {document.row} of the batch")
        begin, end = shard["first_token"][record : record + 2]
        stored = np.asarray(shard["stored"][begin:end])
        begin, end = shard["first_position"][record : record + 2]
        sizes = np.asarray(shard["sizes"][begin:end], np.int64)
        at = np.full(len(stored), -1)
        at[stored] = np.arange(len(sizes))
        asked = at[document.counted]
        flat = document.flat[document.counted]
        if "tail" in shard:
            tail[flat] = shard["tail"][begin:end][asked]
        begin, end = shard["first_entry"][record : record + 2]
        entries = np.asarray(shard["ids"][begin:end], np.int64)
        if "logprob" in shard:
            numbers = np.asarray(shard["logprob"][begin:end], np.float32)
        else:
            numbers = np.asarray(shard["counts"][begin:end], np.float32)
            numbers /= self.manifest.identity.width
        row = np.repeat(np.arange(len(sizes)), sizes)
        column = np.arange(len(entries)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept_ids = np.full((len(sizes), ids.shape[1]), -1)
        kept_ids[row, column] = entries
        kept = np.full(kept_ids.shape, -math.inf if "tail" in shard else 0.0, np.float32)
        kept[row, column] = numbers
        ids[flat], value[flat] = kept_ids[asked], kept[asked]


def is_teacher_cache(path: str | Path) -> bool:
    """True for a folder that `data cache-teacher` has made, or is making."""
    folder = Path(path)
    if (folder / MAKING).is_file():
        return True
    shards = folder.glob("shard-*.safetensors")
    return (folder / MANIFEST).is_file() and next(shards, None) is not None


def restored(logprob: Tensor, tail: Tensor) -> Tensor:
    """Rounded log-probabilities, scaled so that they and the exact tail make one again."""
    kept = logprob.logsumexp(-1)
    return logprob + (log_rest(tail) - kept).nan_to_num(nan=0.0, posinf=0.0).unsqueeze(-1)


def content_sha256(content: Mapping[str, Any]) -> str:
    """Of plain values, however a file spells them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(shard: Mapping[str, NDArray[Any]]) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(shard["digests"]).view(f"S{DIGEST_BYTES}").reshape(-1)


def _check(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise FolderError(f"{path.parent} lacks {path.name}, which its {MANIFEST} names; {AGAIN}")
    size = path.stat().st_size
    if size != shard.bytes:
        what = "cut short" if size < shard.bytes else "longer than it was"
        raise DataError(f"{path} is {what}: {size:,} bytes of {shard.bytes:,}; {AGAIN}")
    found = sha256_of(path)
    if found != shard.sha256:
        raise DataError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says "
            f"{shard.sha256[:12]}...; {AGAIN}"
        )
