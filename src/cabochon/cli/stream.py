"""A completion written as it is drawn, whole characters at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from torch import Tensor

from cabochon.core import Key
from cabochon.data.tokenizer import Tokenizer
from cabochon.generation.engine import Settings, Token

__all__ = ["Speaker", "Written", "write_stream"]

Speaker = Callable[[Tensor, Settings, Key], Iterator[Token]]
"""`stream` of the engine, its model decided."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What came out."""

    tokens: list[int]
    """All drawn, a final stop token included."""
    text: str
    """Without control tokens and stop texts."""
    logprobs: list[float]
    """Nats, of each token."""
    stopped: bool
    """By a stop token or text, not by the length limit."""


def write_stream(
    speak: Speaker,
    tokenizer: Tokenizer,
    prompt: Tensor,
    settings: Settings,
    key: Key,
    stops: Sequence[str],
    out: TextIO | None,
) -> Written:
    """Draws one completion and writes its text to `out` as it comes.

    A text that may be the beginning of a stop text is held back until that is decided.
    """
    decoder = tokenizer.stream()
    longest = max((len(stop) for stop in stops), default=0)
    tokens: list[int] = []
    logprobs: list[float] = []
    text, shown, stopped = "", 0, False
    for token in speak(prompt, settings, key):
        tokens.append(token.id)
        logprobs.append(token.logprob)
        text += decoder.feed(token.id)
        stopped = token.id in settings.stop_ids
        places = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
        if places:
            text, stopped = text[: min(places)], True
            break
        sure = max(shown, len(text) - max(0, longest - 1))
        _write(out, text[shown:sure])
        shown = sure
    else:
        text += decoder.finish()
    _write(out, text[shown:])
    return Written(tokens=tokens, text=text, logprobs=logprobs, stopped=stopped)


def _write(out: TextIO | None, text: str) -> None:
    if out is not None and text:
        out.write(text)
        out.flush()
