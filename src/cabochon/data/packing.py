"""Documents into rows: best fit, nothing lost, nothing crossing."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.chat import ChatTokens, encode_chat
from cabochon.data.documents import Document, content_hash
from cabochon.data.packed import Packed, PackedManifest
from cabochon.data.readers import Conversation
from cabochon.data.tokenizer import Tokenizer

__all__ = [
    "Packed",
    "best_fit_pack",
    "pack_chats",
    "pack_conversations",
    "pack_documents",
    "pack_tokens",
]

_ENCODED_TOGETHER = 256
"""Documents encoded in one call: enough for all cores, few enough for memory."""


def best_fit_pack(sequences: Sequence[Sized], context: int) -> list[list[int]]:
    """Rows of sequence numbers, by best fit decreasing: longest first, each where least stays free.

    Args:
        sequences: anything with a length, each of at most `context`.
        context: slots of a row.

    Source: Ding et al. 2024, "Fewer truncations improve language modeling".
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys of `free`, sorted
    for number in sorted(range(len(sequences)), key=lambda each: (-len(sequences[each]), each)):
        length = len(sequences[number])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([number])
            row, room = len(rows) - 1, context - length
        else:
            room = rooms[place]
            row = free[room].pop()
            if not free[room]:
                del free[room], rooms[place]
            rows[row].append(number)
            room -= length
        if room > 0:
            if room not in free:
                insort(rooms, room)
            free.setdefault(room, []).append(row)
    return rows


def pack_documents(tokenizer: Tokenizer, documents: Iterable[Document], context: int) -> Packed:
    """Texts as rows, each behind its BOS and ending in its EOS; long ones are split.

    Raises:
        TokenizerMismatch: BOS or EOS is missing, or EOS is also the padding.
        DataError: there is no document, or one is no valid text.
    """
    tokenizer.learnable_end()
    kept = list(documents)
    return pack_tokens(
        _encoded(tokenizer, kept),
        context,
        tokenizer=tokenizer.fingerprint(),
        sources={"documents": content_hash(kept)},
    )


def pack_tokens(
    sequences: Iterable[Sequence[int]],
    context: int,
    *,
    tokenizer: str = "",
    sources: Mapping[str, str] | None = None,
) -> Packed:
    """Token sequences as rows; every token but a sequence's first is a target exactly once.

    A sequence longer than `context` is split into pieces of `context` tokens and a rest. A piece
    sees nothing of the one before it, but its last token keeps its target.

    Args:
        sequences: token ids, each of at least one token.
        context: slots of a row.
        tokenizer: fingerprint of the tokenizer that made them.
        sources: SHA-256 of what went in, by name.

    Raises:
        DataError: there is no sequence, one is empty, or an id is negative.
    """
    kept = [_checked(number, sequence) for number, sequence in enumerate(sequences)]
    learned = [np.ones(len(sequence), dtype=np.bool_) for sequence in kept]
    return _packed(kept, learned, context, tokenizer, sources or {})


def pack_chats(
    chats: Iterable[ChatTokens],
    context: int,
    *,
    tokenizer: str = "",
    sources: Mapping[str, str] | None = None,
) -> Packed:
    """Whole conversations as rows; only tokens of their masks are targets.

    Args and further errors are those of `pack_tokens`.

    Raises:
        DataError: a conversation is longer than `context` or has nothing to learn; it is named.
    """
    kept: list[NDArray[np.int32]] = []
    learned: list[NDArray[np.bool_]] = []
    for number, chat in enumerate(chats):
        sequence = _checked(number, chat.ids)
        mask = np.asarray(chat.mask, dtype=np.bool_)
        name = chat.source or f"conversation {number}"
        if len(sequence) > context:
            raise DataError(
                f"{name} has {len(sequence)} tokens, a row holds {context}; leave it out, shorten "
                "it, or use a longer context"
            )
        if not mask[1:].any():
            raise DataError(f"{name} has no token to learn; every conversation needs a model turn")
        kept.append(sequence)
        learned.append(mask)
    return _packed(kept, learned, context, tokenizer, sources or {})


def pack_conversations(
    tokenizer: Tokenizer, conversations: Iterable[Conversation], context: int
) -> Packed:
    """Conversations as rows of whole chats, whose model turns are learned.

    Raises:
        TokenizerMismatch: the tokenizer's EOS is missing, or is also the padding.
        DataError: a conversation does not fit the template or a row; its source is named.
    """
    tokenizer.learnable_end()
    chats = []
    whole = hashlib.sha256()
    for conversation in conversations:
        try:
            chat = encode_chat(tokenizer, conversation.messages)
        except DataError as error:
            raise DataError(f"{conversation.source}: {error}") from error
        chats.append(replace(chat, source=conversation.source))
        said = [[each.role, each.content] for each in conversation.messages]
        whole.update(json.dumps(said).encode())
    return pack_chats(
        chats,
        context,
        tokenizer=tokenizer.fingerprint(),
        sources={"conversations": whole.hexdigest()},
    )


def _encoded(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[list[int]]:
    for start in range(0, len(documents), _ENCODED_TOGETHER):
        some = documents[start : start + _ENCODED_TOGETHER]
        try:
            yield from tokenizer.encode_all([each.text for each in some], bos=True, eos=True)
        except DataError:
            for each in some:
                _name_in_error(tokenizer, each)
            raise


def _name_in_error(tokenizer: Tokenizer, document: Document) -> None:
    try:
        tokenizer.encode(document.text)
    except DataError as error:
        raise DataError(f"{document.source}: {error}") from error


def _checked(number: int, sequence: Sequence[int]) -> NDArray[np.int32]:
    ids = np.asarray(sequence, dtype=np.int32)
    if len(ids) == 0:
        raise DataError(f"document {number} has no tokens; leave it out")
    if ids.min() < 0:
        raise DataError(f"document {number} holds the token id {ids.min()}; ids begin at 0")
    return ids


def _packed(
    sequences: list[NDArray[np.int32]],
    learned: list[NDArray[np.bool_]],
    context: int,
    tokenizer: str,
    sources: Mapping[str, str],
) -> Packed:
    if context < 2:
        raise ConfigError(f"context must be at least 2 tokens, got {context}")
    if not sequences:
        raise DataError("there is no document to pack; the corpus is empty")
    pieces = [
        (number, range(start, min(start + context, len(sequence))))
        for number, sequence in enumerate(sequences)
        for start in range(0, len(sequence), context)
    ]
    rows = best_fit_pack([place for _, place in pieces], context)
    largest = max(int(sequence.max()) for sequence in sequences)
    tokens = np.zeros((len(rows), context), np.uint16 if largest < 2**16 else np.int32)
    counts = np.zeros((len(rows), context), np.bool_)
    lengths: list[int] = []
    following: list[int] = []
    for row, members in enumerate(rows):
        slot = 0
        for number, place in (pieces[member] for member in members):
            sequence, end = sequences[number], slot + len(place)
            tokens[row, slot:end] = sequence[place.start : place.stop]
            ahead = learned[number][place.start + 1 : place.stop + 1]
            counts[row, slot : slot + len(ahead)] = ahead
            lengths.append(len(place))
            following.append(int(sequence[place.stop]) if place.stop < len(sequence) else -1)
            slot = end
    manifest = PackedManifest(
        context=context,
        rows=len(rows),
        documents=len(sequences),
        tokens=sum(lengths),
        targets=int(counts.sum()),
        tokenizer=tokenizer,
        sources=dict(sources),
    )
    arrays = {
        "tokens": tokens,
        "learned": counts,
        "row_starts": np.cumsum([0, *(len(members) for members in rows)], dtype=np.int64),
        "lengths": np.asarray(lengths, np.int32),
        "following": np.asarray(following, np.int32),
    }
    return Packed(manifest, arrays)
