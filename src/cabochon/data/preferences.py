r"""Pairs of answers to one prompt, of which one is preferred, from the forms that people have.

    {"prompt": ..., "chosen": ..., "rejected": ...}   each a string or a list of messages; answers
                                                      that begin with the prompt's own messages
                                                      are cut behind them
    {"chosen": [...], "rejected": [...]}              whole conversations that differ in the last
                                                      turn of the model
    {"chosen": "\n\nHuman: ...", "rejected": ...}       the same as text, in turns of `Human:` and
                                                      `Assistant:`

A pair becomes two rows, the preferred one first; what counts in them are the answer's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, DataError
from cabochon.core.keys import Key
from cabochon.core.types import TokenBatch
from cabochon.data.chat import Message, encode_chat, encode_prompt
from cabochon.data.order import Order
from cabochon.data.packed import shard
from cabochon.data.readers import read_records
from cabochon.data.tokenizer import Tokenizer

__all__ = [
    "Pair",
    "PairTokens",
    "Pairs",
    "encode_answer",
    "encode_pair",
    "encoded_pairs",
    "pair_of",
    "read_pairs",
    "with_flipped",
]

_ROLES = {"assistant": "model", "gpt": "model", "human": "user"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt."""

    prompt: tuple[Message, ...]
    """Turns of user and model, the last one the user's."""
    chosen: str
    rejected: str
    source: str
    """The file and the line, for messages."""


@dataclass(frozen=True, kw_only=True)
class PairTokens:
    """The same as tokens."""

    prompt: tuple[int, ...]
    """With BOS and what the template writes before an answer."""
    chosen: tuple[int, ...]
    """With the token that ends it."""
    rejected: tuple[int, ...]
    source: str

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def flipped(self) -> PairTokens:
        """With the other answer preferred."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


class Pairs:
    """Pairs in a keyed, endless, seekable order; each is two rows, one below the other."""

    def __init__(self, pairs: Sequence[PairTokens]) -> None:
        """At least one pair.

        Raises:
            DataError: there is none.
        """
        if not pairs:
            raise DataError("there is no pair; the data are empty, or all of it was left out")
        self.pairs = tuple(pairs)

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """Endless batches of `batch_size` rows, which are half as many pairs.

        The other arguments are those of `Packed.batches`.

        Raises:
            ConfigError: the number of rows is odd, or cannot be shared equally by the ranks.
        """
        if batch_size % 2:
            raise ConfigError(f"a pair is two rows: batch_size must be even, got {batch_size}")
        count = batch_size // 2
        own = shard(count, start, rank, ranks)
        order = Order(key, len(self.pairs), start * count)
        return (self.batch(order.take(count)[own]) for _ in iter(int, 1))

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenBatch:
        """The chosen pairs: row 2 i is the preferred answer of the i-th, row 2 i + 1 the other."""
        return self.rows([self.pairs[index] for index in indices])

    @staticmethod
    def rows(pairs: Sequence[PairTokens]) -> TokenBatch:
        """Two rows for each pair; the answers' tokens are what counts."""
        sequences, masks = [], []
        for pair in pairs:
            for answer in (pair.chosen, pair.rejected):
                sequences.append([*pair.prompt, *answer])
                masks.append([False] * len(pair.prompt) + [True] * len(answer))
        return TokenBatch.of(sequences, masks=masks)


def read_pairs(path: str | Path, *, unusable: list[str] | None = None) -> Iterator[Pair]:
    """The pairs of a file or folder of records, one after another.

    Args:
        path: of a kind that `readers` knows.
        unusable: takes what is said of rows that are no pairs, which are then left out.

    Raises:
        DataError: a row is no pair, its answers are equal or empty, or they answer different
            prompts; file and line are named.
        MissingExtra: parquet or a `datasets` folder without the extra "hf".
    """
    for record in read_records(path):
        try:
            yield pair_of(record.values, record.source)
        except DataError as error:
            if unusable is None:
                raise
            unusable.append(str(error))


def pair_of(values: Mapping[str, Any], source: str) -> Pair:
    """The pair that a row holds, in one of the forms at the top of this module.

    Raises:
        DataError: as `read_pairs`.
    """
    for name in ("chosen", "rejected"):
        if name not in values:
            there = ", ".join(map(repr, values)) or "nothing"
            raise DataError(
                f"{source}: no field {name!r}; a pair has 'chosen' and 'rejected', and 'prompt' "
                f"unless they are whole conversations; the row has {there}"
            )
    prompt = _turns(values["prompt"], "prompt", source) if values.get("prompt") else ()
    sides = [_side(values[name], name, prompt, source) for name in ("chosen", "rejected")]
    (before, chosen), (other, rejected) = sides
    if before != other:
        raise DataError(
            f"{source}: 'chosen' and 'rejected' answer different prompts "
            f"({_excerpt(before)} and {_excerpt(other)}); a pair has one"
        )
    if not before or before[-1].role != "user" or not before[-1].content.strip():
        raise DataError(f"{source}: the prompt is empty; a pair needs something to answer")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise DataError(f"{source}: the answer in {name!r} is empty")
    if chosen == rejected:
        raise DataError(f"{source}: both answers are the same, so neither is preferred")
    return Pair(prompt=before, chosen=chosen, rejected=rejected, source=source)


def encode_pair(tokenizer: Tokenizer, pair: Pair, *, plain: bool = False) -> PairTokens:
    """The tokens of a pair, answers ending in what ends a turn.

    Args:
        tokenizer: of the model that is to read it.
        pair: its messages.
        plain: BOS and the prompt's only text, then the answer and EOS, without a chat template.

    Raises:
        DataError: the template refuses it, or both answers become the same tokens; its source is
            named.
    """
    try:
        prompt, answers = _encoded(tokenizer, pair.prompt, _both(pair), plain=plain)
    except DataError as error:
        raise DataError(f"{pair.source}: {error}") from error
    if answers[0] == answers[1]:
        raise DataError(f"{pair.source}: both answers become the same tokens")
    return PairTokens(prompt=prompt, chosen=answers[0], rejected=answers[1], source=pair.source)


def encode_answer(
    tokenizer: Tokenizer, prompt: Sequence[Message], answer: str, *, plain: bool = False
) -> list[int]:
    """A prompt with an answer, as each of the two rows of a pair has it.

    Raises:
        DataError: the template refuses it.
    """
    before, (said,) = _encoded(tokenizer, prompt, [answer], plain=plain)
    return [*before, *said]


def encoded_pairs(
    path: str, tokenizer: Tokenizer, *, plain: bool = False, unusable: list[str] | None = None
) -> Iterator[PairTokens]:
    """The pairs of a file as tokens.

    Args:
        path: as `read_pairs`.
        tokenizer: as `encode_pair`.
        plain: as `encode_pair`.
        unusable: takes what is wrong with rows that are no pairs, which are then left out.

    Raises:
        DataError: a row is no pair, and there is no list to note it in; file and line are named.
    """
    for pair in read_pairs(path, unusable=unusable):
        try:
            yield encode_pair(tokenizer, pair, plain=plain)
        except DataError as error:
            if unusable is None:
                raise
            unusable.append(str(error))


def with_flipped(pairs: Sequence[PairTokens], fraction: float, key: Key) -> list[PairTokens]:
    """The pairs, of which exactly this share (rounded to a pair) prefers the wrong answer.

    Which ones is decided by `key` alone.

    Raises:
        ConfigError: the share does not lie in [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"a share of flipped pairs lies in [0, 1], got {fraction}")
    order = Order(key.fold("flipped"), max(1, len(pairs))).take(round(fraction * len(pairs)))
    wrong = set(order.tolist())
    return [pair.flipped() if at in wrong else pair for at, pair in enumerate(pairs)]


def _side(
    value: Any, name: str, prompt: tuple[Message, ...], source: str
) -> tuple[tuple[Message, ...], str]:
    """What is answered, and the answer."""
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        if not prompt:
            raise DataError(
                f"{source}: {name!r} is a text and there is no prompt; add the field 'prompt', or "
                "give whole conversations"
            )
        return prompt, value
    turns = _turns(value, name, source)
    if not turns or turns[-1].role != "model":
        raise DataError(f"{source}: {name!r} does not end with a turn of the model")
    before, answer = turns[:-1], turns[-1].content
    if not prompt:
        return before, answer
    if before and before != prompt:
        raise DataError(
            f"{source}: {name!r} answers another prompt ({_excerpt(before)}) than the one in "
            f"'prompt' ({_excerpt(prompt)})"
        )
    return prompt, answer


def _turns(value: Any, name: str, source: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return _dialogue(value) if value.startswith("\n\nHuman:") else (Message("user", value),)
    if not isinstance(value, list):
        raise DataError(
            f"{source}: the field {name!r} is {type(value).__name__}, expected a text or messages"
        )
    turns = []
    for number, each in enumerate(value):
        if not isinstance(each, dict) or not all(
            isinstance(each.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{source}: message {number} of {name!r} has no strings 'role' and 'content'"
            )
        role = str(each["role"])
        turns.append(Message(_ROLES.get(role, role), str(each["content"])))
    return tuple(turns)


def _dialogue(text: str) -> tuple[Message, ...]:
    parts: list[str] = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "model"}
    return tuple(
        Message(roles[who], said.removeprefix(" "))
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _encoded(
    tokenizer: Tokenizer, prompt: Sequence[Message], answers: Sequence[str], *, plain: bool
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    if not plain:
        before = tuple(encode_prompt(tokenizer, prompt))
        return before, [_answer(tokenizer, prompt, text, before) for text in answers]
    if len(prompt) > 1:
        raise DataError(
            f"a plain text is one prompt and its answer; the pair's prompt has {len(prompt)} turns"
        )
    before = (tokenizer.control("bos"), *tokenizer.encode(prompt[0].content))
    end = tokenizer.learnable_end()
    return before, [(*tokenizer.encode(text), end) for text in answers]


def _answer(
    tokenizer: Tokenizer, prompt: Sequence[Message], text: str, before: tuple[int, ...]
) -> tuple[int, ...]:
    chat = encode_chat(tokenizer, [*prompt, Message("model", text)])
    end = max(at for at, learned in enumerate(chat.mask) if learned) + 1
    if chat.ids[: len(before)] != before or end <= len(before):
        raise DataError(
            "the chat template writes a prompt otherwise than the beginning of its conversation; "
            "prompts and answers cannot be told apart"
        )
    return chat.ids[len(before) : end]


def _both(pair: Pair) -> tuple[str, str]:
    return pair.chosen, pair.rejected


def _excerpt(turns: Sequence[Message]) -> str:
    text = turns[-1].content if turns else ""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
