"""Teachers by name: a model folder or run, a teacher cache, or the address of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from cabochon import folders
from cabochon.cli.machine import (
    DTYPES,
    device_of,
    model_folder,
    refuse_rows_beyond,
    tokenizer_of,
)
from cabochon.cli.output import say
from cabochon.cli.rows import Rows
from cabochon.cli.settings import RunSettings
from cabochon.core import Policy, Teacher
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.cross_tokenizer import cross_tokenizer, target_logprob
from cabochon.data.mixtures import Mixture
from cabochon.data.packed import Packed
from cabochon.data.teacher_cache import TeacherCache, is_teacher_cache
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import sha256_of

if TYPE_CHECKING:
    from cabochon.generation.remote import Endpoint

__all__ = [
    "TOKENIZER",
    "Kind",
    "TeacherSettings",
    "check_covers",
    "compare",
    "files_of",
    "identities",
    "judges_in",
    "kind",
    "load_policy",
    "load_served",
    "load_teacher",
    "models_in",
    "open_cache",
    "resident",
]

Kind = Literal["model", "cache", "server"]

TOKENIZER = "teacher_tokenizer"
"""The setting that names a tokenizer, not a teacher."""

JUDGE = "reward_"
"""How the names of rewards begin among the sources of a run."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Who teaches; nobody where neither teacher nor cache is named."""

    teacher: str = ""
    """A model folder or run, a teacher cache, or a server's address (http://HOST:PORT)."""
    teacher_cache: str = ""
    """A cache that stands in for the teacher named beside it, once it is sure to be of it."""
    teacher_top_k: int = 20
    """How many of its likeliest tokens a server is asked for."""
    teacher_model: str = ""
    """Which model of a server; its only one when absent."""
    cross_tokenizer: bool = False
    """The teacher has another tokenizer: compare groups of tokens that cover the same bytes."""
    teacher_tokenizer: str = ""
    """With cross_tokenizer: its tokenizer folder; the teacher folder's own when absent."""

    def __post_init__(self) -> None:
        if self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k must be at least 1, got {self.teacher_top_k}")
        if self.teacher_cache and kind(self.teacher_cache) != "cache":
            raise ConfigError(
                f"--teacher-cache {self.teacher_cache} is no teacher cache; make one: cabochon "
                "data cache-teacher"
            )
        if self.teacher_model and kind(self.teacher) != "server":
            raise ConfigError("--teacher-model is for a server: --teacher http://HOST:PORT")
        if self.teacher_tokenizer and not self.cross_tokenizer:
            raise ConfigError("--teacher-tokenizer goes with --cross-tokenizer")
        if self.cross_tokenizer and (not self.teacher or kind(self.named) == "cache"):
            raise ConfigError(
                "--cross-tokenizer needs a --teacher folder or server: a cache holds tokens of the "
                "student's own vocabulary"
            )
        if self.cross_tokenizer and kind(self.teacher) == "server" and not self.teacher_tokenizer:
            raise ConfigError(
                "a server has no tokenizer folder: --teacher-tokenizer FOLDER names the teacher's"
            )

    @property
    def named(self) -> str:
        """Where its distributions come from; empty for nobody."""
        return self.teacher_cache or self.teacher

    def sources(self) -> dict[str, str]:
        """Everything that the result depends on, by the name of its setting."""
        named = {"teacher": self.teacher, "teacher_cache": self.teacher_cache}
        if self.cross_tokenizer:
            named[TOKENIZER] = self.teacher_tokenizer or self.teacher
        return {name: value for name, value in named.items() if value}


def kind(spec: str) -> Kind:
    """What a name of a teacher means."""
    if spec.startswith(("http://", "https://")):
        return "server"
    return "cache" if is_teacher_cache(spec) else "model"


def models_in(sources: Mapping[str, str]) -> dict[str, Path]:
    """The model folders among the sources of a run, by the name of their setting."""
    return {
        name: model_folder(value)
        for name, value in sources.items()
        if name != TOKENIZER and kind(value) == "model"
    }


def resident(sources: Mapping[str, str]) -> list[Path]:
    """The model folders of teachers among the sources of a run that it holds in memory."""
    if any(kind(value) == "cache" for value in sources.values()):
        return []
    found = models_in(sources)
    return [folder for name, folder in found.items() if not name.startswith(JUDGE)]


def judges_in(sources: Mapping[str, str]) -> dict[str, Path]:
    """The reward models among the sources of a run, by the name of their setting."""
    return {name: folder for name, folder in models_in(sources).items() if name.startswith(JUDGE)}


def identities(sources: Mapping[str, str]) -> dict[str, str]:
    """What a run's manifest keeps of those that are no model folders, and of judges' tokenizers.

    A reward model's weights alone do not decide its scores where it reads texts.
    """
    found = {}
    for name, value in sources.items():
        if name == TOKENIZER:
            found[name] = tokenizer_of(value).fingerprint()
        elif name.startswith(JUDGE) and kind(value) == "model":
            own = tokenizer_of(value)
            both = f"{own.fingerprint()} {own.chat_template}"
            found[f"{name}_tokenizer"] = sha256(both.encode()).hexdigest()
        elif kind(value) == "cache":
            found[name] = open_cache(value).sha256()
        elif kind(value) == "server":
            found[name] = f"the server at {value}"
    return found


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of what decides what a model folder computes: its configuration and its weights.

    Raises:
        FolderError: a file is absent.
    """
    return {"config.json": sha256_of(folder / "config.json"), **folders.fingerprint(folder)}


def load_teacher(settings: TeacherSettings, run: RunSettings, tokenizer: Tokenizer) -> Teacher:
    """The teacher that the settings name, in the precision and on the device of the run.

    Args:
        settings: which name one.
        run: of the student.
        tokenizer: the student's.

    Raises:
        TokenizerMismatch: its ids mean something else than the student's.
        ConfigError: rows are longer than its context; a setting does not fit.
        DataError: a cache is damaged, or of another teacher than the one named beside it.
        FolderError: a folder is absent or incomplete.
        ServerError: a server cannot be reached, or does not return what a teacher needs.
    """
    source = settings.named
    if settings.cross_tokenizer:
        return _load_crossing(settings, run, tokenizer)
    if kind(source) == "server":
        return load_served(
            source, tokenizer, top_k=settings.teacher_top_k, model=settings.teacher_model
        )
    if kind(source) == "model":
        return load_policy(source, run, tokenizer)
    cache = open_cache(source)
    cache.check_tokenizer(tokenizer.fingerprint())
    if settings.teacher_cache and settings.teacher:
        compare(cache, settings.teacher)
    return cache


def compare(cache: TeacherCache, teacher: str) -> None:
    """Make sure that a cache was made from the teacher that is named beside it.

    Raises:
        DataError: it was made from another.
        ConfigError: the teacher is no folder, whose files could be compared.
    """
    if kind(teacher) != "model":
        raise ConfigError(
            f"--teacher-cache beside --teacher {teacher}: only a model folder or run can be "
            "compared with a cache; leave one of the two out"
        )
    cache.check_teacher(files_of(model_folder(teacher)), teacher)


def load_policy(spec: str, run: RunSettings, tokenizer: Tokenizer) -> Policy:
    """A frozen teacher from a model folder or run.

    Raises:
        TokenizerMismatch: its vocabulary is not the student's, entry by entry.
        ConfigError: rows are longer than its context.
    """
    teacher, own = folders.load(
        model_folder(spec), dtype=DTYPES[run.precision], device=device_of(run.device)
    )
    unlike = tokenizer.difference(own)
    if unlike is not None:
        raise TokenizerMismatch(
            f"student and teacher {spec} do not share a vocabulary (student against teacher): "
            f"{unlike}; train the student with the teacher's tokenizer, or compare groups of "
            "tokens that cover the same bytes: --cross-tokenizer"
        )
    refuse_rows_beyond(teacher.context, run.context, f"the teacher {spec}")
    return cast(Policy, teacher.requires_grad_(False))


def _load_crossing(settings: TeacherSettings, run: RunSettings, tokenizer: Tokenizer) -> Teacher:
    """A teacher of another tokenizer, in process or served."""
    own = tokenizer_of(settings.teacher_tokenizer or settings.teacher)
    if tokenizer.difference(own) is None:
        say(
            "note: teacher and student have one tokenizer; more is learned without "
            "--cross-tokenizer"
        )
    if kind(settings.teacher) == "server":
        from cabochon.generation.teacher import served_logprob

        endpoint = _endpoint(settings.teacher, own, settings.teacher_model)
        return cross_tokenizer(served_logprob(endpoint), tokenizer, own, context=endpoint.context)
    teacher, found = folders.load(
        model_folder(settings.teacher),
        dtype=DTYPES[run.precision],
        device=device_of(run.device),
    )
    unlike = own.difference(found)
    if unlike is not None:
        raise TokenizerMismatch(
            f"--teacher-tokenizer {settings.teacher_tokenizer} is not that of the teacher: {unlike}"
        )
    policy = cast(Policy, teacher.requires_grad_(False))
    return cross_tokenizer(target_logprob(policy), tokenizer, own, context=teacher.context)


def load_served(url: str, tokenizer: Tokenizer, *, top_k: int, model: str = "") -> Teacher:
    """A teacher on a server; a key that the server wants is in the environment: VLLM_API_KEY.

    Raises:
        TokenizerMismatch: it reads text as other tokens.
        ServerError: it cannot be reached, or returns no log-probabilities of prompts.
        MissingExtra: httpx2 or tenacity is not installed.
    """
    from cabochon.generation.teacher import served

    return served(_endpoint(url, tokenizer, model), top_k, tokenizer.vocab_size)


def _endpoint(url: str, tokenizer: Tokenizer, model: str) -> Endpoint:
    from cabochon.generation.teacher import connect
    from cabochon.generation.transport import Transport

    key = os.environ.get("VLLM_API_KEY", "")
    transport = Transport(url=url, api_key=key, notice=say)
    return connect(transport, tokenizer.encode, model=model)


def check_covers(cache: TeacherCache, rows: Rows) -> None:
    """Make sure that a run will find everything it asks for.

    Raises:
        DataError: a document of the rows is not in the cache; it is named.
    """
    if isinstance(rows, Packed):
        cache.check_covers(rows)
    elif isinstance(rows, Mixture):
        for name, part in rows.sources.items():
            cache.check_covers(part, name)


def open_cache(folder: str) -> TeacherCache:
    """The cache of a folder, whose bytes are read once in a process however often it is opened."""
    cache = Path(folder)
    changed = tuple(
        (each.name, each.stat().st_mtime_ns, each.stat().st_size)
        for each in sorted(cache.glob("*"))
    )
    return _opened(str(cache.resolve()), changed)


@lru_cache(maxsize=4)
def _opened(folder: str, _files: tuple[tuple[str, int, int], ...]) -> TeacherCache:
    return TeacherCache.open(folder)
