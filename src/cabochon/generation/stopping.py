"""Conditions that end a completion, beyond the stop tokens of its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.settings import Ends

__all__ = ["at_text"]


def at_text(stops: Sequence[str], bytes_of: Callable[[int], bytes | None]) -> Ends:
    """Ends a completion with the token that completes one of the texts.

    Texts are compared as UTF-8 bytes, in which no character begins inside another: a stop text is
    found however its bytes, or those of one character, are spread over tokens.

    Args:
        stops: texts of at least one character.
        bytes_of: what a token stands for; nothing for control tokens.

    Raises:
        ConfigError: a text is empty, or no Unicode text (a lone surrogate).
        DataError: when asked about a token that `bytes_of` gives no bytes, not even none.
    """
    if not all(stops):
        raise ConfigError("a stop text is empty; every completion would end at once")
    try:
        wanted = [stop.encode() for stop in stops]
    except UnicodeEncodeError as error:
        raise ConfigError(f"the stop text {error.object!r} is not Unicode text") from error
    longest = max(map(len, wanted), default=0)

    def piece(token: int) -> bytes:
        found = bytes_of(token)
        if found is None:
            raise DataError(
                f"token {token} has no bytes of its own (in this tokenizer its neighbours decide); "
                "look for the text in what the tokenizer decodes"
            )
        return found

    def ends(tokens: Sequence[int]) -> bool:
        # A text that the last token completes begins less than its length before that token.
        last = piece(tokens[-1])
        tail, place = last, len(tokens) - 1
        while place and len(tail) - len(last) < longest:
            place -= 1
            tail = piece(tokens[place]) + tail
        return any(stop in tail for stop in wanted)

    return ends
