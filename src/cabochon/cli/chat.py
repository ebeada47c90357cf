"""`cabochon chat MODEL`: a conversation through the chat template, streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cabochon.cli.configuration import parse

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.data.chat import Message
    from cabochon.data.tokenizer import Tokenizer

__all__ = ["ChatSettings", "fit_history", "main"]

GREETING = "/reset begins anew, /quit or the end of input leaves."


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """With which model, and how it answers."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model folder, or a run directory (its newest checkpoint)."""
    max_new_tokens: int = 256
    temperature: float = 0.7
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw among this many; 0: all."""
    top_p: float = 0.95
    """Draw from this much of the probability; 1: all."""
    seed: int = 0
    """The same seed and messages give the same answers."""
    precision: Literal["stored", "float32", "bf16"] = "stored"
    """What to compute in."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    json: bool = False
    """One JSON object an answer on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Answers each line of standard input until it ends."""
    settings = parse(
        ChatSettings, argv, prog="cabochon chat", description="Talk with a tuned model."
    )
    from cabochon.cli.generate import stop_ids
    from cabochon.cli.machine import load_backbone, use_threads
    from cabochon.cli.output import answer, say
    from cabochon.cli.stream import write_stream
    from cabochon.core import Key
    from cabochon.core.errors import DataError
    from cabochon.data.chat import Message
    from cabochon.generation.engine import Settings, stream

    use_threads(settings.threads)
    model, tokenizer = load_backbone(settings.model, settings.precision, settings.device)
    how = Settings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=stop_ids(tokenizer, (), chat=True),
    )
    history: list[Message] = []
    turns = 0
    if sys.stdin.isatty():
        say(GREETING)
    for line in _lines():
        if line in {"/quit", "/exit"}:
            break
        if line == "/reset":
            history.clear()
            say("(a new conversation)")
            continue
        history.append(Message("user", line))
        room = model.context - min(settings.max_new_tokens, model.context // 2)
        try:
            history, prompt, dropped = fit_history(tokenizer, history, room, model.context - 1)
        except DataError as error:
            history.pop()
            say(f"({error})")
            continue
        if dropped:
            say(f"(the oldest {dropped} turns no longer fit into {model.context} tokens)")
        key = Key(settings.seed, ("chat", turns))
        out = None if settings.json else sys.stdout
        written = write_stream(partial(stream, model), tokenizer, prompt, how, key, (), out)
        history.append(Message("model", written.text))
        turns += 1
        if settings.json:
            names = ("text", "tokens", "logprobs", "stopped")
            answer({name: getattr(written, name) for name in names})
        else:
            print(flush=True)
    return 0


def fit_history(
    tokenizer: Tokenizer, history: Sequence[Message], room: int, longest: int
) -> tuple[list[Message], Tensor, int]:
    """The newest turns whose prompt has at most `room` tokens, that prompt, and how many went.

    Exchanges go as a whole, the oldest first; the last message alone may have `longest` tokens.

    Raises:
        DataError: it has more.
    """
    import torch

    from cabochon.core.errors import DataError
    from cabochon.data.chat import encode_prompt

    ids: list[int] = []
    for begin in range(0, len(history), 2):
        kept = list(history[begin:])
        ids = encode_prompt(tokenizer, kept)
        if len(ids) <= (longest if len(kept) == 1 else room):
            return kept, torch.tensor(ids, dtype=torch.int64), begin
    raise DataError(f"this message has {len(ids)} tokens, the model reads {longest}; shorten it")


def _lines() -> Iterator[str]:
    """The lines of standard input that say something, with an invitation on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
