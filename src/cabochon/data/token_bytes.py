"""The bytes that each token stands for, read off a tokenizer's own decoder.

Text is then joined as bytes and decoded once, so that a character split over several tokens is
whole again, and a stream can tell an unfinished character from a broken one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["token_bytes"]

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(decoder: Mapping[str, Any] | None, pieces: list[str]) -> list[bytes] | None:
    """The bytes of each piece; None if `decoder` also looks at a token's neighbours.

    Args:
        decoder: the "decoder" entry of a tokenizer.json.
        pieces: what the vocabulary calls each token, by id.
    """
    reading = _reading(decoder)
    return None if reading is None else [reading(piece) for piece in pieces]


def _reading(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if kinds == ["ByteFallback"]:
        return lambda piece: _byte_fallback(piece, piece)
    if kinds == ["Replace", "ByteFallback"] and "String" in steps[0]["pattern"]:
        stand_in, meant = steps[0]["pattern"]["String"], steps[0]["content"]
        return lambda piece: _byte_fallback(piece, piece.replace(stand_in, meant))
    return None


def _byte_fallback(piece: str, text: str) -> bytes:
    byte = _FALLBACK.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else text.encode()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # an added token, which is written as it is
        return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters for themselves, then from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {
        chr(0x100 + place): value for place, value in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()
