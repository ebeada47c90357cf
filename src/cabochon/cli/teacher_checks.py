"""What the doctor looks at in a teacher, or in the cache or server that stands in for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from cabochon.cli import checks
from cabochon.cli.checks import Check
from cabochon.cli.machine import model_folder, refuse_rows_beyond, tokenizer_of
from cabochon.cli.rows import document_rows
from cabochon.cli.session import begins_from_folder, config_for
from cabochon.cli.settings import RunSettings
from cabochon.cli.teachers import check_covers, compare, kind, load_served, open_cache
from cabochon.core import TokenBatch
from cabochon.core.errors import CabochonError
from cabochon.data.alignment import aligned
from cabochon.data.cross_tokenizer import cross_tokenizer
from cabochon.data.teacher_cache import TeacherCache
from cabochon.data.tokenizer import Tokenizer
from cabochon.data.tokenizer_files import open_backend, read_object, read_utf8
from cabochon.weight_files import read_json

__all__ = ["same", "teacher"]

HARD_TEXT = "Two  words,\tIt's 12345 (x_y);\n\n  caf\u00e9 e\u0301 \u6f22\u5b57 \U0001f642."


def teacher(student: Tokenizer, spec: str, run: RunSettings, *, own: str = "") -> Iterator[Check]:
    """Everything that can be wrong with a teacher before a run asks it.

    Args:
        student: the student's tokenizer.
        spec: the teacher's name.
        run: of the student.
        own: where the teacher's tokenizer is another: its folder.
    """
    if own:
        yield checks.attempt("teacher's tokenizer", lambda: _crossing(student, own))
        if kind(spec) == "server":
            yield checks.attempt("teacher's server", lambda: _server(tokenizer_of(own), spec))
        else:
            yield checks.attempt("teacher's soft-caps", lambda: _caps(student, spec, run))
        return
    match kind(spec):
        case "server":
            yield checks.attempt("teacher's server", lambda: _server(student, spec))
        case "cache":
            yield from _cache(student, spec, run)
        case "model":
            yield checks.vocabulary(student, spec)
            yield checks.attempt("teacher's BOS", lambda: _bos(student, spec))
            yield checks.attempt("teacher's soft-caps", lambda: _caps(student, spec, run))
            yield checks.attempt("teacher's context", lambda: _context(spec, run))


def same(spec: str, cache: str) -> Check:
    """Whether a cache was made from the teacher that is named beside it."""

    def look() -> Check:
        compare(open_cache(cache), spec)
        return Check(name="teacher and cache", well=True, text="the cache is of this teacher")

    return checks.attempt("teacher and cache", look)


def _crossing(student: Tokenizer, folder: str) -> Check:
    own = tokenizer_of(folder)

    def silent(_: TokenBatch, /) -> Tensor:
        raise AssertionError

    cross_tokenizer(silent, student, own)  # refuses what cannot be aligned
    ids = student.encode(HARD_TEXT), own.encode(HARD_TEXT)
    mine = [student.bytes_of(id_) or b"" for id_ in ids[0]]
    theirs = [own.bytes_of(id_) or b"" for id_ in ids[1]]
    groups = aligned(mine, theirs)
    text = (
        f"of {len(mine)} and {len(theirs)} tokens of a hard text {len(groups)} groups cover the "
        "same bytes"
    )
    told = sum(len(ours) for ours, _ in groups)
    if told < len(mine):
        text += f"; it changes the text: only {told} of the student's tokens can be compared"
    return Check(name="teacher's tokenizer", well=told == len(mine), text=text)


def _server(student: Tokenizer, spec: str) -> Check:
    load_served(spec, student, top_k=1)
    text = f"{spec} gives log-probabilities of prompts, and reads a hard text as the same tokens"
    return Check(name="teacher's server", well=True, text=text)


def _cache(student: Tokenizer, spec: str, run: RunSettings) -> Iterator[Check]:
    try:
        cache = open_cache(spec)
        cache.check_tokenizer(student.fingerprint())
    except CabochonError as error:
        yield Check(name="teacher cache", well=False, text=str(error))
        return
    yield Check(name="teacher cache", well=True, text=f"{spec}: {_described(cache)}")
    if run.data:

        def covers() -> Check:
            check_covers(cache, document_rows(run, student))
            return Check(name="teacher cache's text", well=True, text="every document is in it")

        yield checks.attempt("teacher cache's text", covers)


def _described(cache: TeacherCache) -> str:
    manifest, losses = cache.manifest, cache.manifest.losses
    width = manifest.identity.width
    if manifest.identity.form == "sampled":
        what = f"{width} draws a position, standard error {losses.standard_error:.3g} nats"
    else:
        what = (
            f"the {width} likeliest tokens; not stored is {losses.tail:.2%} of the probability, "
            f"and KL too low by at most {losses.uneven:.3g} nats where the student is even there"
        )
    return f"whole, of this tokenizer; {manifest.positions:,} positions; {what}"


def _bos(student: Tokenizer, spec: str) -> Check:
    """Rows begin with BOS; a teacher that has never seen one in front predicts badly behind it."""
    own = tokenizer_of(spec)
    folder = model_folder(spec)
    name = "teacher's BOS"
    if own.bos_id is None or own.bos_id != student.bos_id:
        text = f"the teacher's BOS is {own.bos_id}, the student's {student.bos_id}"
        return Check(name=name, well=False, text=f"{text}; rows begin with the student's")
    if not _puts_bos(folder, own):
        text = (
            f"{folder} puts no BOS in front of texts (add_bos_token), so it was probably made "
            "without; rows begin with one, and what it says behind that is not what it learned"
        )
        return Check(name=name, well=False, text=text)
    return Check(
        name=name, well=True, text=f"is {own.bos_id}, and it puts one in front, as rows do"
    )


def _puts_bos(folder: Path, own: Tokenizer) -> bool:
    habit = read_object(folder / "tokenizer_config.json").get("add_bos_token")
    if habit is not None:
        return bool(habit)
    backend = open_backend(read_utf8(folder / "tokenizer.json"))
    return list(backend.encode("a", add_special_tokens=True).ids)[:1] == [own.bos_id]


def _caps(student: Tokenizer, spec: str, run: RunSettings) -> Check:
    """Each soft-cap is inside its own distribution, so that unlike ones are no error, but news."""
    theirs = _soft_caps(model_folder(spec))
    if begins_from_folder(run):
        ours = _soft_caps(model_folder(run.model.source))
    else:
        config = config_for(run, student)
        ours = (config.attention_cap, config.final_cap)
    shown = [
        f"{what} {'none' if a is None else f'{a:g}'} against {'none' if b is None else f'{b:g}'}"
        for what, a, b in zip(("attention", "logits"), ours, theirs, strict=True)
    ]
    told = f"student against teacher: {', '.join(shown)}"
    note = "" if ours == theirs else "; they differ: each is inside its own distribution"
    return Check(name="teacher's soft-caps", well=True, text=told + note)


def _soft_caps(folder: Path) -> tuple[float | None, float | None]:
    """Of the attention scores and of the logits, as config.json has them."""
    values = read_json(folder / "config.json")
    of_gemma2 = values.get("model_type") == "gemma2"
    found: list[float | None] = []
    for key, absent in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        value = values.get(key, absent if of_gemma2 else None)
        found.append(float(value) if isinstance(value, int | float) and value else None)
    return found[0], found[1]


def _context(spec: str, run: RunSettings) -> Check:
    longest = read_json(model_folder(spec) / "config.json").get("max_position_embeddings")
    if isinstance(longest, int):
        refuse_rows_beyond(longest, run.context, f"the teacher {spec}")
    text = f"{longest} tokens; rows have {run.context}"
    return Check(name="teacher's context", well=True, text=text)
