"""`cabochon data cache-teacher`: what a teacher says about a text, stored for many runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cabochon import folders
from cabochon.cli import teachers
from cabochon.cli.configuration import read
from cabochon.cli.machine import (
    DTYPES,
    device_of,
    model_folder,
    refuse_rows_beyond,
    tokenizer_of,
    use_threads,
)
from cabochon.cli.output import answer, bytes_text, console, say
from cabochon.cli.places import writable
from cabochon.cli.rows import (
    is_packed,
    pack_chat_sources,
    pack_document_sources,
    refuse_repeated,
)
from cabochon.cli.settings import TooLong
from cabochon.core import Policy, Teacher, TokenBatch
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.packed import Packed
from cabochon.data.teacher_cache import CacheIdentity, CacheManifest
from cabochon.data.teacher_cache_writing import text_sha256, write_cache
from cabochon.data.tokenizer import Tokenizer

__all__ = ["CacheSettings", "main"]

LIKELIEST = 64
"""Tokens of a position that are stored where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Which teacher, on which text, and how much of what it says."""

    teacher: Annotated[str, tyro.conf.Positional] = ""
    """A model folder or run, or a server's address (http://HOST:PORT)."""
    data: tuple[str, ...] = ()
    """Files or folders: .jsonl, .parquet, .txt, .md, .py, packed folders, or `stdlib`."""
    tokenizer: str = ""
    """A tokenizer or model folder; the teacher folder's own when absent."""
    context: int = 256
    """Tokens of a row; longer documents are split, and must be split alike in training."""
    chat: bool = False
    """The records are conversations; only the model's turns are stored."""
    too_long: TooLong = "refuse"
    """Conversations longer than a row: refuse the first, or drop them all and say how many."""
    field: str = "text"
    """The field of a record that holds its text."""
    out: str = ""
    """The folder of the cache; one in which this was interrupted is gone on with."""
    top_k: int | None = None
    """How many of the likeliest tokens of a position are stored, beside the mass of the others; 64
    when absent."""
    draws: int = 0
    """Store so many tokens drawn from the whole distribution instead of the likeliest."""
    seed: int = 0
    """Of the draws."""
    store: Literal["float32", "float16"] = "float32"
    """Of log-probabilities; what float16 rounds away is measured and said."""
    batch_size: int = 8
    """Rows that the teacher reads at a time."""
    precision: Literal["float32", "bf16"] = "float32"
    """In which the teacher computes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    teacher_model: str = ""
    """Which model of a server; its only one when absent."""

    def __post_init__(self) -> None:
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.draws < 0:
            raise ConfigError(f"draws must be 0 (none) or more, got {self.draws}")
        if self.draws and self.top_k is not None:
            raise ConfigError("--top-k stores the likeliest tokens, --draws drawn ones; give one")

    @property
    def width(self) -> int:
        """Tokens that are stored of a position."""
        return self.draws or (LIKELIEST if self.top_k is None else self.top_k)


class _Told(Protocol):
    """Is told (rows done, rows in all)."""

    def __call__(self, done: int, total: int, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A teacher and what is known of it."""

    teacher: Teacher
    vocabulary: int
    files: dict[str, str]


def main(argv: Sequence[str]) -> int:
    """Asks the teacher about every position that counts, stores what it says, and how much is lost.

    Bit for bit the same after any number of interruptions.
    """
    invocation = read(
        CacheSettings,
        argv,
        prog="cabochon data cache-teacher",
        description="Store what a teacher says about a text.",
    )
    settings = invocation.settings
    for name, what in (("teacher", "TEACHER"), ("data", "--data FILE"), ("out", "--out FOLDER")):
        if not getattr(settings, name):
            raise ConfigError(f"cabochon data cache-teacher needs {what}")
    if teachers.kind(settings.teacher) == "cache":
        raise ConfigError(f"{settings.teacher} is a teacher cache already")
    out = writable(Path(settings.out))
    use_threads(settings.threads)
    tokenizer = _tokenizer(settings)
    parts = _parts(settings, tokenizer)
    source = _source(settings, tokenizer, parts)
    try:
        with _progress() as tell:
            manifest = write_cache(
                out,
                _identity(settings, tokenizer, source, parts),
                source.teacher,
                parts,
                batch_size=settings.batch_size,
                device=device_of(settings.device),
                note=f"{settings.teacher} on {', '.join(settings.data)}",
                progress=tell,
            )
    except KeyboardInterrupt:
        say("stopped; the same command goes on with it")
        raise
    for line in _summary(manifest):
        say(line)
    if invocation.json:
        answer({"out": out.resolve(), **asdict(manifest)})
    else:
        print(out)
    return 0


def _tokenizer(settings: CacheSettings) -> Tokenizer:
    if settings.tokenizer:
        return tokenizer_of(settings.tokenizer)
    if teachers.kind(settings.teacher) == "server":
        raise ConfigError(
            "a server has no tokenizer folder: --tokenizer FOLDER names the student's"
        )
    return tokenizer_of(settings.teacher)


def _parts(settings: CacheSettings, tokenizer: Tokenizer) -> list[Packed]:
    refuse_repeated(settings.data)
    packed = [Packed.load(name) for name in settings.data if is_packed(name)]
    for part in packed:
        part.check_tokenizer(tokenizer.fingerprint())
    raw = [name for name in settings.data if not is_packed(name)]
    if raw and settings.chat:
        packed.append(pack_chat_sources(raw, tokenizer, settings.context, settings.too_long))
    elif raw:
        packed.append(pack_document_sources(raw, settings.field, tokenizer, settings.context))
    return packed


def _source(settings: CacheSettings, tokenizer: Tokenizer, parts: Sequence[Packed]) -> _Source:
    if teachers.kind(settings.teacher) == "server":
        if settings.draws:
            raise ConfigError("a server says its likeliest tokens; draws need the teacher's folder")
        teacher = teachers.load_served(
            settings.teacher, tokenizer, top_k=settings.width, model=settings.teacher_model
        )
        files = {"server": settings.teacher, "model": settings.teacher_model}
        return _Source(teacher=teacher, vocabulary=tokenizer.vocab_size, files=files)
    if settings.teacher_model:
        raise ConfigError("--teacher-model is for a server")
    folder = model_folder(settings.teacher)
    device = device_of(settings.device)
    model, own = folders.load(folder, dtype=DTYPES[settings.precision], device=device)
    unlike = tokenizer.difference(own)
    if unlike is not None:
        raise TokenizerMismatch(
            f"{settings.tokenizer} and the tokenizer of the teacher {settings.teacher} differ: "
            f"{unlike}; a cache is of the teacher's own tokens"
        )
    for part in parts:
        refuse_rows_beyond(model.context, part.context, f"the teacher {settings.teacher}")
    teacher = cast(Policy, model.requires_grad_(False))
    with torch.no_grad():
        tried = TokenBatch.of([[tokenizer.learnable_end()]]).to(device)
        vocabulary = teacher(tried).logits(slice(None)).shape[-1]
    return _Source(teacher=teacher, vocabulary=vocabulary, files=teachers.files_of(folder))


def _identity(
    settings: CacheSettings, tokenizer: Tokenizer, source: _Source, parts: Sequence[Packed]
) -> CacheIdentity:
    return CacheIdentity(
        form="sampled" if settings.draws else "top_k",
        width=settings.width,
        seed=settings.seed if settings.draws else 0,
        dtype=settings.store,
        vocabulary=source.vocabulary,
        tokenizer=tokenizer.fingerprint(),
        teacher=source.files,
        text=text_sha256(parts),
        making={"precision": settings.precision},
    )


def _summary(manifest: CacheManifest) -> list[str]:
    losses, shards = manifest.losses, manifest.shards
    lines = [
        f"{manifest.documents:,} documents, {manifest.positions:,} positions, "
        f"{bytes_text(sum(each.bytes for each in shards))} in {len(shards):,} file(s)"
    ]
    if manifest.identity.form == "sampled":
        return [
            *lines,
            f"draws are unbiased; the cross-entropy of n positions has a standard error of about "
            f"{losses.standard_error:.3g} / sqrt(n) nats, and a position's gradient by the logits "
            f"is off by {losses.gradient_noise:.3g} (root mean square)",
        ]
    lines.append(
        f"not stored: {losses.tail:.2%} of the probability on average, {losses.largest_tail:.2%} "
        f"at most; the KL of the rest is too low by no more than {losses.uneven:.3g} + "
        f"{losses.tail:.3g} log R nats a position (R: how far the student is from even there), "
        f"its gradient by the logits is off by no more than {2 * losses.tail + losses.rounding:.3g}"
    )
    if manifest.identity.dtype == "float16":
        lines.append(f"float16 moves {losses.rounding:.2g} of the probability on average")
    return lines


@contextmanager
def _progress() -> Iterator[_Told]:
    """A bar where there is a terminal."""
    screen = console()
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task: Any = bar.add_task("rows", total=None)

        def tell(done: int, total: int, /) -> None:
            bar.update(task, completed=done, total=total)

        yield tell
