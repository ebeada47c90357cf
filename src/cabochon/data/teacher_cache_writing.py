"""Making a teacher cache: shard after shard, and on from the last whole one after a crash.

A shard is the rows from one number to another, computed in batches of one shape and written whole
or not at all, so that going on gives the same bytes as never having stopped. No more than one shard
is in memory. A document that comes twice, with the same mask, is stored once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError, FolderError
from cabochon.core.keys import Key
from cabochon.core.protocols import Prediction, Teacher
from cabochon.core.types import GroupTargets, SampledTargets, TopKTargets
from cabochon.data.batches import DIGEST_BYTES, Placed, digest, documents
from cabochon.data.mapped import mapped
from cabochon.data.packed import Packed
from cabochon.data.teacher_cache import (
    MAKING,
    MANIFEST,
    CacheIdentity,
    CacheManifest,
    Losses,
    Shard,
    content_sha256,
    restored,
)
from cabochon.data.truncation import draw, even_bound, likeliest, spans, uniforms
from cabochon.files import sha256_of, whole, write_whole

__all__ = ["SHARD_BYTES", "text_sha256", "write_cache"]

SHARD_BYTES = 2**25
"""About so many bytes of entries make a shard."""

_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


def text_sha256(parts: Sequence[Packed]) -> str:
    """SHA-256 over the documents of all rows, in order, and which of their tokens count."""
    found = hashlib.sha256()
    for part in parts:
        for start in range(0, part.rows, 256):
            batch = part.batch(range(start, min(start + 256, part.rows)))
            for document in documents(batch):
                found.update(len(document.tokens).to_bytes(8, "little"))
                found.update(document.tokens.astype("<i4").tobytes())
                found.update(np.packbits(document.counted).tobytes())
    return found.hexdigest()


def write_cache(
    folder: Path,
    identity: CacheIdentity,
    teacher: Teacher,
    parts: Sequence[Packed],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    note: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> CacheManifest:
    """Asks the teacher about every counted position of all rows, and stores what it says.

    A folder in which this was interrupted is gone on with, a finished one left as it is.

    Args:
        folder: new, empty, or one that was begun with the same `identity`.
        identity: what the cache is of; `making` gets the sizes below added.
        teacher: whole distributions, which are cut or drawn from here, or the likeliest tokens.
        parts: packed text.
        batch_size: rows that the teacher reads at a time.
        device: where.
        note: for people, in the manifest.
        shard_bytes: about so much of a shard.
        progress: told (rows done, rows in all).

    Raises:
        FolderError: the folder holds something else, or cannot be written.
        DataError: an unfinished cache is of another text, teacher, tokenizer or form.
        ConfigError: the teacher cannot give what is asked for.
    """
    rows_of = [_shard_rows(identity, part.context, batch_size, shard_bytes) for part in parts]
    sizes = {"batch_size": batch_size, "shard_rows": rows_of, "device": torch.device(device).type}
    identity = CacheIdentity(**vars(identity) | {"making": {**identity.making, **sizes}})
    finished = _begin(folder, identity)
    if finished is not None:
        return finished
    total = sum(part.rows for part in parts)
    work = _Work(identity=identity, teacher=teacher, batch_size=batch_size, device=device)
    done = 0
    for number, (part, rows) in enumerate(_plan(parts, rows_of)):
        path = folder / f"shard-{number:05d}.safetensors"
        if path.is_file():
            work.seen |= _seen(path)
        else:
            arrays, sums = work.shard(part, rows)
            _save(path, arrays, sums)
        done += len(rows)
        progress(done, total)
    return _finish(folder, identity, note)


@dataclass
class _Work:
    """What makes shards out of rows; `seen` is all that is remembered from one to the next."""

    identity: CacheIdentity
    teacher: Teacher
    batch_size: int
    device: torch.device | str
    seen: set[bytes] = field(default_factory=set)

    def shard(self, part: Packed, rows: range) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        kept: list[tuple[Placed, dict[str, NDArray[Any]]]] = []
        for start in range(rows.start, rows.stop, self.batch_size):
            batch = part.batch(range(start, min(start + self.batch_size, rows.stop)))
            fresh = [each for each in documents(batch) if self._is_new(each)]
            if fresh:
                with torch.no_grad():
                    said = self.teacher(batch.to(self.device))
                    kept += [(each, self._said(said, each)) for each in fresh]
        return _arrays(kept, self.identity), _sums(kept)

    def _is_new(self, document: Placed) -> bool:
        name = _name(digest(document.tokens), document.counted)
        if name in self.seen or not document.counted.any():
            return False
        self.seen.add(name)
        return True

    def _said(
        self, said: Prediction | TopKTargets | SampledTargets | GroupTargets, document: Placed
    ) -> dict[str, NDArray[Any]]:
        if isinstance(said, GroupTargets):
            raise ConfigError("what a teacher of another vocabulary says cannot be cached")
        rows = torch.from_numpy(document.flat[document.counted]).to(self.device)
        if self.identity.form == "sampled":
            if isinstance(said, TopKTargets | SampledTargets):
                raise ConfigError(
                    "this teacher does not say its whole distribution, so nothing can be drawn "
                    "from it; store its likeliest tokens (--top-k) instead of draws"
                )
            return _stored(self._draws(said, rows, document), self.identity)
        if isinstance(said, SampledTargets):
            raise ConfigError("this teacher gives draws; its likeliest tokens cannot be had")
        return _stored(self._likeliest(said, rows), self.identity)

    def _draws(self, said: Prediction, rows: Tensor, document: Placed) -> dict[str, Tensor]:
        key = Key(self.identity.seed, ("teacher",))
        uniform = uniforms(key, document, self.identity.width).to(rows.device)
        found, done = [], 0
        for some in spans(said, rows):
            logits = self._checked(said.logits(some))
            found.append(draw(logits, uniform[done : done + len(some)]))
            done += len(some)
        names = ("sizes", "ids", "counts", "variance", "spread")
        return {name: torch.cat([getattr(each, name) for each in found]) for name in names}

    def _likeliest(self, said: Prediction | TopKTargets, rows: Tensor) -> dict[str, Tensor]:
        width = self.identity.width
        if isinstance(said, TopKTargets):
            if said.ids.shape[-1] != width:
                raise ConfigError(f"the teacher says {said.ids.shape[-1]} tokens, not {width}")
            bound = even_bound(said, self.identity.vocabulary)
            named = {"ids": said.ids, "logprob": said.logprob, "tail": said.tail, "uneven": bound}
            every = {k: v.flatten(0, 1)[rows] for k, v in named.items()}
        else:
            found = [likeliest(self._checked(said.logits(s)), width) for s in spans(said, rows)]
            names = ("ids", "logprob", "tail", "uneven")
            every = {k: torch.cat([getattr(each, k) for each in found]) for k in names}
        rounding = torch.zeros_like(every["tail"])
        if self.identity.dtype == "float16":
            exact = every["logprob"]
            every["logprob"] = exact.half()
            back = restored(every["logprob"].float(), every["tail"])
            rounding = (back.exp() - exact.exp()).abs().sum(-1)
        return {**every, "rounding": rounding}

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != self.identity.vocabulary:
            raise DataError(
                f"the teacher predicts {logits.shape[-1]} tokens, the cache is for "
                f"{self.identity.vocabulary}"
            )
        return logits


def _arrays(
    kept: Sequence[tuple[Placed, dict[str, NDArray[Any]]]], identity: CacheIdentity
) -> dict[str, NDArray[Any]]:
    """What a shard's file holds; documents are behind one another in all of it."""
    cut = identity.form == "top_k"

    def joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)

    def every(name: str, dtype: Any) -> NDArray[Any]:
        return joined([said[name].reshape(-1) for _, said in kept], dtype)

    def starts(lengths: list[int]) -> NDArray[np.int64]:
        return np.cumsum([0, *lengths], dtype=np.int64)

    for _, said in kept:
        if cut:
            said["sizes"] = np.full(len(said["tail"]), said["ids"].shape[-1], np.int32)
    arrays = {
        "digests": joined(
            [np.frombuffer(digest(each.tokens), np.uint8) for each, _ in kept], np.uint8
        ).reshape(-1, DIGEST_BYTES),
        "lengths": np.array([len(each.tokens) for each, _ in kept], np.int32),
        "stored": joined([each.counted for each, _ in kept], np.bool_),
        "first_token": starts([len(each.tokens) for each, _ in kept]),
        "first_position": starts([len(said["sizes"]) for _, said in kept]),
        "first_entry": starts([said["ids"].size for _, said in kept]),
        "sizes": every("sizes", np.int32),
        "ids": every("ids", _id_type(identity)),
    }
    if cut:
        logprob = every("logprob", np.dtype(identity.dtype))
        return {**arrays, "logprob": logprob, "tail": every("tail", np.float32)}
    return {**arrays, "counts": every("counts", np.uint16)}


def _sums(kept: Sequence[tuple[Placed, dict[str, NDArray[Any]]]]) -> dict[str, float]:
    """Of what a shard loses, over its positions."""
    sums = {"positions": 0.0, "documents": float(len(kept)), "largest_tail": 0.0}
    for _, said in kept:
        sums["positions"] += len(said["sizes"])
        for name in ("uneven", "rounding", "variance", "spread"):
            if name in said:
                sums[name] = sums.get(name, 0.0) + float(said[name].sum(dtype=np.float64))
        if "tail" in said:
            mass = np.exp(said["tail"].astype(np.float64))
            sums["tail"] = sums.get("tail", 0.0) + float(mass.sum())
            sums["largest_tail"] = max(sums["largest_tail"], float(mass.max(initial=0.0)))
    return sums


def _finish(folder: Path, identity: CacheIdentity, note: str) -> CacheManifest:
    shards: list[Shard] = []
    totals: dict[str, float] = {}
    largest = 0.0
    for path in _shards(folder):
        sums = _sums_of(path)
        largest = max(largest, sums.pop("largest_tail"))
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
        shards.append(
            Shard(
                file=path.name,
                sha256=sha256_of(path),
                bytes=path.stat().st_size,
                documents=int(sums["documents"]),
                positions=int(sums["positions"]),
            )
        )
    positions = totals["positions"]
    if positions == 0:
        raise DataError("no position of this data counts, so there is nothing to cache")
    mean = {name: value / positions for name, value in totals.items()}
    losses = Losses(
        tail=mean.get("tail", 0.0),
        largest_tail=largest,
        uneven=mean.get("uneven", 0.0),
        rounding=mean.get("rounding", 0.0),
        standard_error=math.sqrt(mean.get("variance", 0.0) / identity.width),
        gradient_noise=math.sqrt(mean.get("spread", 0.0) / identity.width),
    )
    manifest = CacheManifest(
        identity=identity,
        documents=int(totals["documents"]),
        positions=int(positions),
        losses=losses,
        shards=tuple(shards),
        note=note,
    )
    try:
        write_whole(folder / MANIFEST, manifest.text())
        (folder / MAKING).unlink(missing_ok=True)
    except OSError as error:
        raise FolderError(f"{folder / MANIFEST} could not be written: {error}") from error
    return manifest


def _begin(folder: Path, identity: CacheIdentity) -> CacheManifest | None:
    """Makes the folder ready; the manifest where all is done already."""
    content = asdict(identity)
    if (folder / MANIFEST).is_file():
        manifest = CacheManifest.read(folder / MANIFEST)
        _refuse_other(folder, asdict(manifest.identity), content)
        return manifest
    if (folder / MAKING).is_file():
        try:
            begun = json.loads((folder / MAKING).read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{folder / MAKING} is damaged; remove {folder}") from error
        _refuse_other(folder, begun, content)
        return None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists already and is no teacher cache; choose another folder")
    try:
        write_whole(folder / MAKING, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FolderError(f"{folder} cannot be written: {error.strerror or error}") from error
    return None


def _refuse_other(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    if content_sha256(begun) == content_sha256(wanted):
        return
    plain = json.loads(json.dumps(wanted))
    unlike = [name for name in plain if begun.get(name) != plain[name]]
    shown = "; ".join(f"{name}: {begun.get(name)} there, {plain[name]} now" for name in unlike)
    raise DataError(
        f"{folder} was begun as another teacher cache ({shown}); give what it was begun with, or "
        "choose another folder"
    )


def _plan(parts: Sequence[Packed], rows_of: Sequence[int]) -> Iterator[tuple[Packed, range]]:
    for part, step in zip(parts, rows_of, strict=True):
        for start in range(0, part.rows, step):
            yield part, range(start, min(start + step, part.rows))


def _shard_rows(identity: CacheIdentity, context: int, batch_size: int, shard_bytes: int) -> int:
    entry = (2 if identity.vocabulary <= 2**16 else 4) + (4 if identity.dtype == "float32" else 2)
    batches = shard_bytes // (context * identity.width * entry * batch_size)
    return batch_size * max(1, batches)


def _save(path: Path, arrays: dict[str, NDArray[Any]], sums: dict[str, float]) -> None:
    try:
        with whole(path) as aside:
            save_file(arrays, aside, metadata={"sums": json.dumps(sums, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} could not be written: {error}") from error


def _shards(folder: Path) -> list[Path]:
    found = [each for each in folder.iterdir() if _NAME.fullmatch(each.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("shard-")))


def _sums_of(path: Path) -> dict[str, float]:
    try:
        with safe_open(path, framework="np") as file:
            found: dict[str, float] = json.loads(file.metadata()["sums"])
            return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged or cut short ({error}); delete it, and the same command makes it "
            "again"
        ) from error


def _seen(path: Path) -> set[bytes]:
    """The documents of a shard that is there already, by tokens and mask."""
    _sums_of(path)  # makes sure that it is whole
    arrays = mapped(path)
    first = arrays["first_token"]
    return {
        _name(digests.tobytes(), arrays["stored"][first[at] : first[at + 1]])
        for at, digests in enumerate(arrays["digests"])
    }


def _name(digest_: bytes, counted: NDArray[np.bool_]) -> bytes:
    return digest_ + hashlib.blake2b(np.packbits(counted).tobytes(), digest_size=8).digest()


def _stored(named: dict[str, Tensor], identity: CacheIdentity) -> dict[str, NDArray[Any]]:
    """In the types of the file: what is kept until a shard is full is no larger than the shard."""
    types = {"ids": _id_type(identity), "counts": np.uint16, "sizes": np.int32}
    found = {name: value.cpu().numpy() for name, value in named.items()}
    return {name: value.astype(types.get(name, value.dtype)) for name, value in found.items()}


def _id_type(identity: CacheIdentity) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if identity.vocabulary <= 2**16 else np.int32
