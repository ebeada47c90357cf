"""Conversations in Gemma's turns, and the tokens of them that are to be learned.

    <bos><start_of_turn>user
    What is 2 + 2?<end_of_turn>
    <start_of_turn>model
    4<end_of_turn>

The loss mask is drawn while the tokens are written, never by searching text, and control tokens
come from the template alone: a message that spells ``<end_of_turn>`` is text like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cabochon.core.errors import DataError
from cabochon.data.template_chat import (
    encode_template_chat,
    encode_template_prompt,
    encode_template_whole,
)
from cabochon.data.tokenizer import Tokenizer

__all__ = [
    "ChatTokens",
    "Message",
    "decode_chat",
    "decode_prompt",
    "encode_chat",
    "encode_prompt",
    "encode_published",
    "render",
]

_ALIASES = {"assistant": "model"}
_NO_SYSTEM = (
    "Gemma's template has no system role; put its content at the beginning of the first user turn"
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """ "user" or "model"; "assistant" is read as "model"."""
    content: str


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """A conversation as tokens."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """True for the tokens that are to be predicted: model turns with their <end_of_turn>."""
    roles: tuple[str | None, ...]
    """Whose turn each token is in, the turn's control tokens included; None for <bos>, and for
    all but the model's turns where another family's template wrote them."""
    source: str = ""
    """Where it came from, for messages."""


def render(messages: Sequence[Message]) -> str:
    """The conversation as text, for people to read; `encode_chat` is what models see.

    Raises:
        DataError: the roles do not alternate from user on, or there is a system turn.
    """
    checked = _checked(messages)
    return "<bos>" + "".join(
        f"<start_of_turn>{each.role}\n{each.content}<end_of_turn>\n" for each in checked
    )


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, learned: Collection[str] = ("model",)
) -> ChatTokens:
    """The conversation as tokens, each with its role, and the mask of those to be learned.

    A tokenizer with Gemma's turn tokens is written in Gemma's turns; any other one by the chat
    template of its folder.

    Args:
        tokenizer: of the model that is to read it.
        messages: turns of user and model, beginning with the user.
        learned: roles whose turns are to be predicted.

    Raises:
        DataError: the conversation or the template cannot be used, with the reason.
    """
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        return _by_template(tokenizer, messages, learned)
    begin, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    ids: list[int] = [tokenizer.control("bos")]
    mask: list[bool] = [False]
    roles: list[str | None] = [None]
    line_end = tokenizer.encode("\n")
    for message in _checked(messages):
        header = [begin, *tokenizer.encode(f"{message.role}\n")]
        said = [*tokenizer.encode(message.content), end]
        turn = [*header, *said, *line_end]
        counts = message.role in learned
        ids += turn
        mask += [False] * len(header) + [counts] * len(said) + [False] * len(line_end)
        roles += [message.role] * len(turn)
    return ChatTokens(ids=tuple(ids), mask=tuple(mask), roles=tuple(roles))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens after which the model speaks: a conversation that ends with the user's turn.

    Raises:
        DataError: the last turn is not the user's, or the conversation cannot be used.
    """
    if not messages or _ALIASES.get(messages[-1].role, messages[-1].role) != "user":
        raise DataError("a prompt ends with a user turn; add one, or leave out the last model turn")
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        return encode_template_prompt(tokenizer, _for_template(messages))
    opening = [tokenizer.start_of_turn_id, *tokenizer.encode("model\n")]
    return [*encode_chat(tokenizer, messages).ids, *opening]


def encode_published(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The whole conversation as the folder's own chat template writes it, whatever the family.

    Published models were trained on what transformers' apply_chat_template gives, which may trim
    the messages and go on behind the last one; this is the same. Without a template: `encode_chat`.

    Raises:
        DataError: there is neither a template nor Gemma's turns, or the conversation is refused.
    """
    if tokenizer.chat_template is None:
        return list(encode_chat(tokenizer, messages).ids)
    return encode_template_whole(tokenizer, _for_template(messages))


def decode_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Message]:
    """The messages that `encode_prompt` wrote in Gemma's turns; the last is the user's.

    Raises:
        DataError: the tokens are not such a conversation, or do not end where the model speaks.
    """
    *before, last = decode_chat(tokenizer, ids) or [Message("", "")]
    if last != Message("model", "") or not before:
        raise DataError("the prompt does not end with a user's turn and the opening of the model's")
    return before


def decode_chat(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Message]:
    """The messages that `encode_chat` wrote in Gemma's turns; a last turn may be unfinished.

    Raises:
        DataError: the tokens are not such a conversation; the place is named.
    """
    begin, end = tokenizer.control("start_of_turn"), tokenizer.control("end_of_turn")
    place = 1 if ids and ids[0] == tokenizer.bos_id else 0
    line_end = tokenizer.encode("\n")
    messages = []
    while place < len(ids):
        if ids[place] != begin:
            raise DataError(
                f"token {place} is {tokenizer.pieces([ids[place]])[0]!r}, expected <start_of_turn>"
            )
        stop = next((at for at in range(place, len(ids)) if ids[at] == end), len(ids))
        role, content = _turn(tokenizer, ids[place + 1 : stop], place)
        messages.append(Message(role, content))
        place = stop + 1
        if list(ids[place : place + len(line_end)]) == line_end:
            place += len(line_end)
    return messages


def _turn(tokenizer: Tokenizer, ids: Sequence[int], place: int) -> tuple[str, str]:
    for role in ("user", "model"):
        header = tokenizer.encode(f"{role}\n")
        if list(ids[: len(header)]) == header:
            return role, tokenizer.decode(ids[len(header) :])
    raise DataError(f"the turn at token {place} begins with neither 'user' nor 'model' on a line")


def _by_template(
    tokenizer: Tokenizer, messages: Sequence[Message], learned: Collection[str]
) -> ChatTokens:
    if set(learned) != {"model"}:
        raise DataError(
            f"of another family's chat template only model turns can be learned, got {learned}"
        )
    ids, spoken = encode_template_chat(tokenizer, _for_template(messages))
    roles = tuple("model" if each else None for each in spoken)
    return ChatTokens(ids=tuple(ids), mask=tuple(spoken), roles=roles)


def _for_template(messages: Sequence[Message]) -> list[dict[str, str]]:
    names = {"model": "assistant"}
    return [{"role": names.get(each.role, each.role), "content": each.content} for each in messages]


def _checked(messages: Sequence[Message]) -> list[Message]:
    if not messages:
        raise DataError("the conversation has no messages; give at least a user turn")
    checked = []
    for number, message in enumerate(messages):
        role = _ALIASES.get(message.role, message.role)
        expected = "user" if number % 2 == 0 else "model"
        if role == "system":
            raise DataError(f"message {number} is a system turn; {_NO_SYSTEM}")
        if role != expected:
            raise DataError(
                f"message {number} has the role {message.role!r}, expected {expected!r}: turns "
                "alternate between user and model, beginning with user"
            )
        checked.append(Message(role, message.content))
    return checked
