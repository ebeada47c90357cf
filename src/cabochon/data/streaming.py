"""Text of tokens that come one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Gives out whole characters only, as soon as they are whole.

    The outputs of `feed` and a last `finish` make up the decoding of all the tokens.
    """

    def __init__(
        self, table: Sequence[bytes] | None, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """A decoder at the beginning of a text; `Tokenizer.stream` makes it.

        Args:
            table: the bytes of each token, or None where they depend on the token's neighbours.
            decode: decoding of a whole sequence.
        """
        self._table = table
        self._decode = decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0

    def feed(self, id_: int) -> str:
        """The text that became complete with this token: often more or less than its own.

        Raises:
            DataError: the id lies outside the vocabulary.
        """
        if self._table is not None:
            if not 0 <= id_ < len(self._table):
                self._decode([id_])
            return self._utf8.decode(self._table[id_])
        # A window that begins one output earlier holds the neighbours that matter.
        before = self._decode(self._ids[: self._shown])
        self._ids.append(id_)
        now = self._decode(self._ids)
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left: a character that was never completed, as U+FFFD."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(before) :]
