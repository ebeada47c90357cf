"""Conversations by the chat template of another family's folder, and which tokens are the model's.

A template is a program that only writes text, so the model's turns are found by what each turn
adds to the rendering of the turns before it. That holds only for templates that never rewrite
earlier turns; one that does is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cabochon.core.errors import DataError
from cabochon.data.templates import render_template
from cabochon.data.tokenizer import Tokenizer

__all__ = ["encode_template_chat", "encode_template_prompt", "encode_template_whole"]


def encode_template_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[list[int], list[bool]]:
    """Token ids, and for each True where it is in an assistant turn.

    A turn goes from where the template hands over to the assistant to the turn's last control
    token, or to its end where it has none.

    Args:
        tokenizer: with a chat template.
        messages: mappings of "role" ("assistant" for the model) and "content".

    Raises:
        DataError: there is no template, it refuses the conversation, it rewrites earlier turns, or
            a message spells a control token, which the template would make real.
    """
    whole = _rendered(tokenizer, messages, open_turn=False)
    ids, starts = tokenizer.encode_with_controls(whole)
    spoken = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:number], open_turn=True)
        after = _rendered(tokenizer, messages[: number + 1], open_turn=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"the chat template does not simply add message {number} to what comes before it, "
                "so that its tokens cannot be told apart; use a template that rewrites no turn and "
                "opens the assistant's turn as it writes it"
            )
        turn = [at for at, start in enumerate(starts) if len(before) <= start < len(after)]
        ends = [at for at in turn if tokenizer.is_control(ids[at])]
        for at in turn:
            spoken[at] = not ends or at <= ends[-1]
    return ids, spoken


def encode_template_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids up to where the template hands over to the assistant.

    Raises:
        DataError: as in `encode_template_chat`.
    """
    return tokenizer.encode_with_controls(_rendered(tokenizer, messages, open_turn=True))[0]


def encode_template_whole(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of all that the template writes, as transformers' apply_chat_template gives them.

    Where messages spell control tokens, which would become real there, all messages are encoded
    apart from what the template writes around them, as the plain texts that they are.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    if not any(tokenizer.controls_in(each["content"]) for each in messages):
        return tokenizer.encode_with_controls(_rendered(tokenizer, messages, open_turn=False))[0]
    marked = [{**each, "content": f"\ue000{at}\ue001"} for at, each in enumerate(messages)]
    ids: list[int] = []
    for part in re.split("(\ue000\\d+\ue001)", _rendered(tokenizer, marked, open_turn=False)):
        if part.startswith("\ue000"):
            ids += tokenizer.encode(messages[int(part[1:-1])]["content"])
        else:
            ids += tokenizer.encode_with_controls(part)[0]
    return ids


def _rendered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, open_turn: bool
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has neither Gemma's turn tokens nor a chat template; add a "
            "chat_template.jinja to its folder"
        )
    for number, message in enumerate(messages):
        if spelt := tokenizer.controls_in(message["content"]):
            raise DataError(
                f"message {number} spells the control token {spelt[0]!r}, which this chat template "
                "would make real; leave the message out or spell it otherwise"
            )
    controls = {
        f"{name}_token": tokenizer.pieces([id_])[0]
        for name in ("bos", "eos", "pad", "unk")
        if (id_ := getattr(tokenizer.controls, name)) is not None
    }
    return render_template(tokenizer.chat_template, messages, names=controls, open_turn=open_turn)
