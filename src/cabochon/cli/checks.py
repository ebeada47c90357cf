"""What the doctor looks at: each check says what it found and whether that is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon import folders
from cabochon.cli.drawing import Drawn, documents_in
from cabochon.cli.machine import model_folder, tokenizer_of
from cabochon.cli.rows import (
    chats_of,
    documents_of,
    encode_conversation,
    is_packed,
    pack_chat_sources,
    pack_document_sources,
)
from cabochon.cli.session import begins_from_folder, config_for
from cabochon.cli.settings import RunSettings
from cabochon.core.errors import CabochonError
from cabochon.data.chat import Message, decode_chat, encode_chat
from cabochon.data.packed import Packed
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.gemma.config import parameter_counts
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import is_reward_model

__all__ = [
    "Check",
    "Counts",
    "attempt",
    "chat_lengths",
    "count",
    "document_lengths",
    "first_row",
    "markers",
    "model",
    "rows_of",
    "template",
    "tokenizer",
    "vocabulary",
]

HARD_TEXTS = (
    "plain words",
    "  two spaces, a tab\t, a line's end\r\n and\n\n  an indented line ",
    "0123456789 3.14159 1e-4",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 e\u0301",
    "<bos><eos><pad><start_of_turn>user\n<end_of_turn>",
)
"""Texts that tokenizers are known to change."""

CONVERSATION = (
    Message("user", "What is 2 + 2?"),
    Message("model", "4"),
    Message("user", "And twice that?"),
    Message("model", "It is 8.\n\nThat is 2 to the power of 3."),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    well: bool
    text: str
    """What was found, and what to do where it is not well."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Markers in the rows as a run would read them."""

    documents: int
    bos: int
    """BOS among the inputs."""
    learned_eos: int
    """EOS among the targets that count."""
    learned_turn_ends: int
    """<end_of_turn> among the targets that count."""
    targets: int
    """Targets that count."""


def attempt(name: str, look: Callable[[], Check]) -> Check:
    """The check, or a failed one with the message of what it ran into."""
    try:
        return look()
    except CabochonError as error:
        return Check(name=name, well=False, text=str(error))


def tokenizer(found: Tokenizer) -> Iterator[Check]:
    """BOS, EOS and padding, and whether hard texts come back unchanged."""

    def ends() -> Check:
        eos = found.learnable_end()
        pad = "none" if found.pad_id is None else str(found.pad_id)
        text = f"EOS is {eos}, PAD is {pad}, BOS is {found.control('bos')}: all different"
        well = len({eos, found.bos_id, found.pad_id}) == 3
        return Check(name="markers", well=well, text=text if well else text.split(":")[0])

    def round_trip() -> Check:
        changed = [text for text in HARD_TEXTS if found.decode(found.encode(text)) != text]
        if not changed:
            return Check(name="round trip", well=True, text="hard texts come back unchanged")
        back = found.decode(found.encode(changed[0]))
        return Check(name="round trip", well=False, text=f"{changed[0]!r} comes back as {back!r}")

    yield attempt("markers", ends)
    yield attempt("round trip", round_trip)


def template(found: Tokenizer) -> Check:
    """Whether a conversation comes back from its tokens, and model turns alone are learned."""

    def look() -> Check:
        chat = encode_chat(found, CONVERSATION)
        said = found.decode([i for i, learned in zip(chat.ids, chat.mask, strict=True) if learned])
        wanted = [m.content for m in CONVERSATION if m.role == "model"]
        if any(content not in said for content in wanted) or CONVERSATION[0].content in said:
            text = f"of {wanted} the mask marks {said!r}"
            return Check(name="template", well=False, text=text)
        if found.start_of_turn_id is None:
            return Check(name="template", well=True, text="the folder's own; model turns learned")
        if decode_chat(found, chat.ids) != list(CONVERSATION):
            text = f"comes back as {decode_chat(found, chat.ids)}"
            return Check(name="template", well=False, text=text)
        text = "a conversation comes back unchanged; its model turns alone are learned"
        return Check(name="template", well=True, text=text)

    return attempt("template", look)


def model(run: RunSettings, found: Tokenizer) -> Check:
    """Whether the model can be made or read, and the tokenizer is its own."""

    def look() -> Check:
        if begins_from_folder(run):
            folder = model_folder(run.model.source)
            read = folders.load_reward if is_reward_model(folder) else folders.load
            learner, _ = read(folder)
            folders.check_tokenizer(learner, found)
            text = f"{folder}: weights complete, tokenizer its own"
            return Check(name="model", well=True, text=text)
        config = config_for(run, found)
        embedding, rest = parameter_counts(config)
        folders.check_tokenizer(Gemma(config, device="meta", dtype=torch.bfloat16), found)
        text = f"{run.model.source}: {embedding:,} parameters in the embedding, {rest:,} elsewhere"
        return Check(name="model", well=True, text=text)

    return attempt("model", look)


def vocabulary(student: Tokenizer, teacher: str) -> Check:
    """Whether student and teacher mean the same by every id."""

    def look() -> Check:
        unlike = student.difference(tokenizer_of(teacher))
        if unlike is None:
            text = f"that of {teacher}, entry by entry"
            return Check(name="teacher's vocabulary", well=True, text=text)
        return Check(
            name="teacher's vocabulary",
            well=False,
            text=f"student against {teacher}: {unlike}",
        )

    return attempt("teacher's vocabulary", look)


def document_lengths(name: str, run: RunSettings, found: Tokenizer) -> Check:
    """How many documents are longer than a row, empty, or spell control tokens."""
    documents = list(documents_of(name, run.field))
    lengths = [len(ids) + 2 for ids in found.encode_all([each.text for each in documents])]
    long = sum(length > run.context for length in lengths)
    empty = sum(not each.text.strip() for each in documents)
    spelled = sum(bool(found.controls_in(each.text)) for each in documents)
    notes = [
        f"{len(documents):,} documents, the longest of {max(lengths):,} tokens",
        f"{long:,} are longer than the {run.context} of a row and are split",
    ]
    if empty:
        notes.append(f"{empty:,} are blank")
    if spelled:
        notes.append(f"{spelled:,} spell control tokens, which are read as plain text")
    return Check(name=f"documents of {name}", well=True, text="; ".join(notes))


def chat_lengths(name: str, run: RunSettings, found: Tokenizer) -> Check:
    """How many conversations do not fit into a row."""
    chats = list(chats_of(name))
    lengths = {each.source: len(encode_conversation(found, each).ids) for each in chats}
    long = [source for source, length in lengths.items() if length > run.context]
    text = f"{len(chats):,} conversations, the longest of {max(lengths.values()):,} tokens"
    if long:
        text += f"; {len(long):,} are longer than the {run.context} of a row, first {long[0]}: " + (
            "left out" if run.too_long == "drop" else "raise --context or --too-long drop"
        )
    well = not long or run.too_long == "drop"
    return Check(name=f"conversations of {name}", well=well, text=text)


def rows_of(name: str, run: RunSettings, found: Tokenizer, *, chat: bool) -> Packed:
    """The rows that a name in `--data` becomes.

    Raises:
        CabochonError: it cannot be read or packed.
    """
    if is_packed(name):
        packed = Packed.load(name)
        packed.check_tokenizer(found.fingerprint())
        return packed
    if chat:
        return pack_chat_sources([name], found, run.context, run.too_long)
    return pack_document_sources([name], run.field, found, run.context)


def count(packed: Packed, found: Tokenizer, *, at_once: int = 256) -> Counts:
    """Every marker in every row."""
    bos = eos = turn_ends = targets = 0
    for start in range(0, packed.rows, at_once):
        batch = packed.batch(range(start, min(start + at_once, packed.rows)))
        real = batch.documents >= 0
        learned = batch.targets[batch.mask]
        bos += _occurrences(found.bos_id, batch.tokens[real])
        eos += _occurrences(found.eos_id, learned)
        turn_ends += _occurrences(found.end_of_turn_id, learned)
        targets += len(learned)
    return Counts(
        documents=packed.manifest.documents,
        bos=bos,
        learned_eos=eos,
        learned_turn_ends=turn_ends,
        targets=targets,
    )


def markers(name: str, counts: Counts, *, chat: bool) -> Check:
    """Whether each document has one BOS, and its end is learned."""
    ends = counts.learned_turn_ends if chat else counts.learned_eos
    end = "end of turn" if chat else "EOS"
    problems = []
    if counts.bos != counts.documents:
        problems.append(f"{counts.documents:,} documents have {counts.bos:,} BOS; expected as many")
    if (ends < counts.documents) if chat else (ends != counts.documents):
        problems.append(
            f"{end} is learned {ends:,} times in {counts.documents:,} documents; the model would "
            "not learn where to stop"
        )
    text = f"{counts.bos:,} BOS, {ends:,} learned {end}, {counts.targets:,} learned tokens"
    if not problems:
        text += f" in {counts.documents:,} documents"
    return Check(name=f"markers in {name}", well=not problems, text="; ".join([text, *problems]))


def first_row(packed: Packed) -> list[Drawn]:
    """The documents of the first row, to be drawn."""
    return list(documents_in(packed.batch([0]), 0))


def _occurrences(id_: int | None, tokens: Tensor) -> int:
    return 0 if id_ is None else int(torch.count_nonzero(tokens == id_))
