"""From the names in `--data` to packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

from cabochon.cli.output import say
from cabochon.cli.settings import RunSettings, TooLong
from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.data import corpus
from cabochon.data.chat import ChatTokens, Message, encode_chat
from cabochon.data.documents import Document
from cabochon.data.mixtures import Mixture
from cabochon.data.packed import Packed
from cabochon.data.packing import pack_chats, pack_documents
from cabochon.data.readers import Conversation, read_chats, read_documents
from cabochon.data.tokenizer import Tokenizer

__all__ = [
    "SUMMARISE",
    "Rows",
    "chat_rows",
    "chats_of",
    "document_rows",
    "documents_of",
    "encode_conversation",
    "is_packed",
    "pack_chat_sources",
    "pack_document_sources",
    "refuse_repeated",
]

SUMMARISE = "Say in one sentence what this function does.\n\n"
"""What `stdlib` asks of the model in front of each function."""


class Rows(Protocol):
    """Packed rows, or a mixture of them."""

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """Endless micro-batches, from the one after `start` others on."""
        ...


def document_rows(run: RunSettings, tokenizer: Tokenizer) -> Rows:
    """The documents of `run.data` in rows of `run.context` tokens; long ones are split."""
    return _rows(
        run,
        tokenizer,
        lambda sources: pack_document_sources(sources, run.field, tokenizer, run.context),
    )


def chat_rows(run: RunSettings, tokenizer: Tokenizer) -> Rows:
    """The conversations of `run.data` in rows of `run.context` tokens."""
    return _rows(
        run,
        tokenizer,
        lambda sources: pack_chat_sources(sources, tokenizer, run.context, run.too_long),
    )


def pack_document_sources(
    sources: Sequence[str], field: str, tokenizer: Tokenizer, context: int
) -> Packed:
    """All documents of these names together.

    Raises:
        DataError: they cannot be read; file and line are named.
    """
    documents = chain.from_iterable(documents_of(name, field) for name in sources)
    return pack_documents(tokenizer, documents, context)


def pack_chat_sources(
    sources: Sequence[str], tokenizer: Tokenizer, context: int, too_long: TooLong
) -> Packed:
    """All conversations of these names together.

    Raises:
        DataError: they cannot be read, or are too long for a row; file and line are named.
    """
    chats: list[ChatTokens] = []
    dropped = 0
    for each in chain.from_iterable(chats_of(name) for name in sources):
        chat = encode_conversation(tokenizer, each)
        if not any(chat.mask[1:]):
            raise DataError(f"{each.source}: no model turn, so there is nothing to learn")
        if len(chat.ids) <= context:
            chats.append(chat)
        elif too_long == "drop":
            dropped += 1
        else:
            raise DataError(
                f"{each.source}: the conversation has {len(chat.ids)} tokens, a row holds "
                f"{context}; raise --context, take it out, or leave out all such with "
                "--too-long drop"
            )
    if dropped:
        say(f"left out {dropped:,} conversations longer than {context} tokens; {len(chats):,} stay")
    return pack_chats(chats, context, tokenizer=tokenizer.fingerprint())


def documents_of(source: str, field: str, *, held_out: bool = False) -> Iterable[Document]:
    """The documents that a name in `--data` means.

    Raises:
        DataError: they cannot be read; file and line are named.
    """
    if source != "stdlib":
        return read_documents(source, field)
    library = corpus.standard_library()
    return library.held_out if held_out else library.train


def chats_of(source: str, *, held_out: bool = False) -> Iterable[Conversation]:
    """The conversations that a name in `--data` means; `stdlib` asks for summaries of functions.

    Raises:
        DataError: they cannot be read; file and line are named.
    """
    if source != "stdlib":
        return read_chats(source)
    found = corpus.summaries()
    return [
        Conversation(
            (Message("user", SUMMARISE + each.function), Message("model", each.summary)),
            each.source,
        )
        for each in (found.held_out if held_out else found.train)
    ]


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> ChatTokens:
    """Its tokens and mask.

    Raises:
        DataError: the template refuses it; file and line are named.
    """
    try:
        return encode_chat(tokenizer, conversation.messages)
    except DataError as error:
        raise DataError(f"{conversation.source}: {error}") from error


def is_packed(source: str) -> bool:
    """True for a folder that `cabochon data pack` has written."""
    return (Path(source) / "rows.safetensors").is_file()


def refuse_repeated(names: Sequence[str]) -> None:
    """What is named twice would be read twice.

    Raises:
        ConfigError: a name stands there twice.
    """
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the same data is named twice: {', '.join(names)}; name it once, and let --weights "
            "say how much of a run it is"
        )


def _rows(run: RunSettings, tokenizer: Tokenizer, pack: Callable[[Sequence[str]], Packed]) -> Rows:
    ready = {name: _load(name, run, tokenizer) for name in run.data if is_packed(name)}
    raw = [name for name in run.data if name not in ready]
    refuse_repeated(run.data)
    if run.weights:
        sources = {**ready, **{name: pack([name]) for name in raw}}
        return Mixture(sources, dict(zip(run.data, run.weights, strict=True)))
    parts = {**ready, **({", ".join(raw): pack(raw)} if raw else {})}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return Mixture(parts, {name: float(part.rows) for name, part in parts.items()})


def _load(name: str, run: RunSettings, tokenizer: Tokenizer) -> Packed:
    packed = Packed.load(name)
    packed.check_tokenizer(tokenizer.fingerprint())
    if packed.context != run.context:
        raise ConfigError(
            f"{name} was packed in rows of {packed.context} tokens, the run asks for "
            f"{run.context}; give --context {packed.context}, or pack again"
        )
    return packed
