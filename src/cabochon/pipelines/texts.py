"""The texts of a pipeline as tokens: a tokenizer, rows to learn from, documents to be judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import DataError
from cabochon.data.chat import encode_chat, encode_prompt
from cabochon.data.order import Order
from cabochon.data.packed import Packed
from cabochon.data.packing import pack_conversations, pack_documents, pack_tokens
from cabochon.data.readers import Conversation, read_chats, read_documents
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.files import whole
from cabochon.pipelines.recipe import Config
from cabochon.pipelines.stages import Event, Observe
from cabochon.pipelines.timing import timed

__all__ = ["Exam", "Texts", "answering", "prepared"]

PROBE_TOKENS = 8192
"""How much held-out text is read at each point of a curve."""
PROBE_CHATS = 48
"""How many held-out answers are, in the tuning."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """A held-out conversation up to its last model turn, which is the reference."""

    source: str
    question: str
    """The user turn before it."""
    reference: str
    prompt: tuple[int, ...]
    """The tokens after which the model speaks."""
    answer: tuple[int, ...]
    """The reference as tokens, its <end_of_turn> included."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Everything that the models of a pipeline read."""

    tokenizer: Tokenizer
    train: Packed
    chats: Packed
    held_out: tuple[tuple[int, ...], ...]
    """The beginnings of the held-out documents, equally long where they are long enough."""
    held_out_bytes: int
    """Of those beginnings, as UTF-8."""
    exams: tuple[Exam, ...]
    probe: TokenBatch
    """Held-out text for the curves."""
    chat_probe: TokenBatch
    """Held-out conversations for the curve of the tuning."""


def prepared(config: Config, folder: Path, observe: Observe) -> Texts:
    """The texts that `config` names; what was made before is read from `folder`.

    Raises:
        DataError: they cannot be read, or leave nothing to learn or to be judged on.
    """
    tokenizer = _tokenizer(config, folder, observe)
    train = _rows(config, folder, tokenizer, observe)
    chats = _chat_rows(config, folder, tokenizer, observe)
    documents = [each.text for each in read_documents(config.held_out)]
    held_out = _equal_shares(tokenizer.encode_all(documents), config.held_out_tokens)
    exams = _exams(config, tokenizer)
    bos = tokenizer.control("bos")
    rows = pack_tokens([(bos, *each) for each in held_out], config.context)
    count = min(max(1, PROBE_TOKENS // config.context), rows.rows)
    spread = torch.linspace(0, rows.rows - 1, count).long()
    return Texts(
        tokenizer=tokenizer,
        train=train,
        chats=chats,
        held_out=held_out,
        held_out_bytes=sum(len(tokenizer.decode(each).encode()) for each in held_out),
        exams=exams,
        probe=rows.batch(spread),
        chat_probe=answering(exams[:PROBE_CHATS]),
    )


def _tokenizer(config: Config, folder: Path, observe: Observe) -> Tokenizer:
    place = folder / "tokenizer"
    if not place.exists():
        observe(Event(stage="tokenizer", steps=0, note=f"learns {config.vocab_size} entries"))
        with timed(folder, "tokenizer"):
            texts = (each.text for each in read_documents(config.train))
            with whole(place) as aside:
                train_tokenizer(texts, config.vocab_size).save(aside)
    return Tokenizer.load(place)


def _rows(config: Config, folder: Path, tokenizer: Tokenizer, observe: Observe) -> Packed:
    place = folder / "data" / "train"
    if not place.exists():
        observe(Event(stage="data", steps=0, note=f"packs rows of {config.context} tokens"))
        with timed(folder, "data"):
            pack_documents(tokenizer, read_documents(config.train), config.context).save(place)
    packed = Packed.load(place)
    packed.check_tokenizer(tokenizer.fingerprint())
    return packed


def _chat_rows(config: Config, folder: Path, tokenizer: Tokenizer, observe: Observe) -> Packed:
    place = folder / "data" / "chats"
    if not place.exists():
        observe(Event(stage="data", steps=0, note="packs the conversations"))
        with timed(folder, "conversations"):
            fitting = _fitting(config, config.chats, tokenizer)
            pack_conversations(tokenizer, fitting, config.tune_context).save(place)
    packed = Packed.load(place)
    packed.check_tokenizer(tokenizer.fingerprint())
    return packed


def _exams(config: Config, tokenizer: Tokenizer) -> tuple[Exam, ...]:
    fitting = _fitting(config, config.held_out_chats, tokenizer)
    order = Order(Key(config.seed, ("exams",)), len(fitting))
    chosen = (fitting[each] for each in order.take(min(config.held_out_chat_count, len(fitting))))
    return tuple(_exam(tokenizer, conversation) for conversation in chosen)


def _exam(tokenizer: Tokenizer, conversation: Conversation) -> Exam:
    messages = list(conversation.messages)
    while messages[-1].role == "user":
        messages.pop()
    prompt = encode_prompt(tokenizer, messages[:-1])
    answer = [*tokenizer.encode(messages[-1].content), tokenizer.control("end_of_turn")]
    return Exam(
        source=Path(conversation.source).name,
        question=messages[-2].content,
        reference=messages[-1].content,
        prompt=tuple(prompt),
        answer=tuple(answer),
    )


def _fitting(config: Config, path: str, tokenizer: Tokenizer) -> list[Conversation]:
    """The conversations that a row can hold and that have a model turn.

    Raises:
        DataError: hardly any does, or one cannot be written in turns.
    """
    kept = []
    for conversation in read_chats(path):
        try:
            tokens = encode_chat(tokenizer, conversation.messages)
        except DataError as error:
            raise DataError(f"{conversation.source}: {error}") from error
        if len(tokens.ids) <= config.tune_context and any(tokens.mask[1:]):
            kept.append(conversation)
    if len(kept) < 2:
        raise DataError(
            f"{path}: {len(kept)} conversations fit into {config.tune_context} tokens, need 2 or "
            "more; give shorter ones, or raise tune_context"
        )
    return kept


def answering(exams: Sequence[Exam]) -> TokenBatch:
    """The exams as rows of which only the reference answers count."""
    return TokenBatch.of(
        [each.prompt + each.answer for each in exams],
        masks=[[False] * len(each.prompt) + [True] * len(each.answer) for each in exams],
    )


def _equal_shares(documents: Sequence[Sequence[int]], tokens: int) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the documents, `tokens` in all or a little more, no share above another's.

    A document shorter than the share gives all it has.
    """
    lengths = sorted(len(each) for each in documents)
    share, remaining = lengths[-1], tokens
    for number, length in enumerate(lengths):
        left = len(lengths) - number
        if length * left >= remaining:
            share = -(-remaining // left)
            break
        remaining -= length
    return tuple(tuple(each[:share]) for each in documents if each)
