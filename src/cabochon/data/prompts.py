"""Prompts one a row, each with the completion that the data have for it, where they have one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cabochon.core.errors import DataError
from cabochon.core.keys import Key
from cabochon.core.types import TokenBatch
from cabochon.data.chat import encode_chat, encode_prompt
from cabochon.data.order import Order
from cabochon.data.packed import shard
from cabochon.data.readers import Conversation
from cabochon.data.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptRows", "prompts_in", "text_prompt"]


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and what the data say after it."""

    ids: tuple[int, ...]
    completion: tuple[int, ...]
    """With the token that ends it; empty where the data say nothing."""
    source: str
    """For messages."""
    trailing: tuple[int, ...] = ()
    """What the template writes after the completion: nobody has to say it."""


class PromptRows:
    """Prompts in a keyed, endless, seekable order."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        """At least one prompt.

        Raises:
            DataError: there is none.
        """
        if not prompts:
            raise DataError("there is no prompt; the data are empty, or all of it was left out")
        self.prompts = tuple(prompts)

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """Endless batches of one prompt a row; its completion counts.

        The arguments are those of `Packed.batches`.

        Raises:
            ConfigError: the batch cannot be shared equally, or a number is out of range.
        """
        own = shard(batch_size, start, rank, ranks)
        order = Order(key, len(self.prompts), start * batch_size)
        return (
            self.batch([self.prompts[row] for row in order.take(batch_size)[own]])
            for _ in iter(int, 1)
        )

    @staticmethod
    def batch(prompts: Sequence[Prompt]) -> TokenBatch:
        """A row for each."""
        return TokenBatch.of(
            [[*each.ids, *each.completion, *each.trailing] for each in prompts],
            masks=[
                [False] * len(each.ids)
                + [True] * len(each.completion)
                + [False] * len(each.trailing)
                for each in prompts
            ],
        )


def prompts_in(tokenizer: Tokenizer, conversation: Conversation) -> list[Prompt]:
    """A prompt for each of the model's turns, and one for a last user turn without an answer.

    Raises:
        DataError: the template refuses it; its source is named.
    """
    messages, source = conversation.messages, conversation.source
    found = []
    try:
        for place, message in enumerate(messages):
            if message.role in ("model", "assistant"):
                ids = encode_prompt(tokenizer, messages[:place])
                chat = encode_chat(tokenizer, messages[: place + 1])
                end = max(at for at, learned in enumerate(chat.mask) if learned) + 1
                if list(chat.ids[: len(ids)]) != ids or end <= len(ids):
                    raise DataError(
                        "the chat template writes a prompt otherwise than the beginning of its "
                        "conversation; prompts and completions cannot be told apart"
                    )
                said, rest = chat.ids[len(ids) : end], chat.ids[end:]
                found.append(Prompt(tuple(ids), said, source, rest))
            elif place + 1 == len(messages):
                found.append(Prompt(tuple(encode_prompt(tokenizer, messages)), (), source))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return found


def text_prompt(tokenizer: Tokenizer, conversation: Conversation) -> Prompt:
    """The same row as plain text: BOS and the prompt; the completion and EOS.

    Raises:
        DataError: it is more than one prompt and one completion; its source is named.
    """
    source = conversation.source
    prompt, *rest = conversation.messages
    if prompt.role != "user" or len(rest) > 1 or any(each.role == "user" for each in rest):
        raise DataError(
            f"{source}: a plain text is a prompt and perhaps its completion; the row has the turns "
            f"{', '.join(each.role for each in conversation.messages)}"
        )
    try:
        ids = (tokenizer.control("bos"), *tokenizer.encode(prompt.content))
        said = [(*tokenizer.encode(each.content), tokenizer.learnable_end()) for each in rest]
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return Prompt(ids, said[0] if said else (), source)
