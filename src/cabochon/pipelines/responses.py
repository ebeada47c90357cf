"""Prompts on three sides that share none, and the responses that models gave to them.

    texts -> different prompts -> oracle's | distillation | held out

Responses are kept in `FOLDER/responses/NAME/`, a file for each stretch of prompts, so that drawing
them goes on where it was interrupted. A response depends on (seed, prompt's number on its side,
sample's number) alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cabochon.core import Backbone, Completion, Group, Key, TokenBatch
from cabochon.core.errors import DataError
from cabochon.data.order import Order
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import write_whole
from cabochon.generation.engine import Settings, generate

__all__ = ["Pair", "Prompts", "drawn", "pairs_of", "rows_of", "split"]

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and a response to it, as tokens."""

STRETCH = 256
"""Prompts whose responses are drawn, and kept, at a time."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Different prompts; no side has one of another side's."""

    oracle: tuple[tuple[int, ...], ...]
    """Whose responses by the oracle teacher and student learn first."""
    distillation: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    """On which every distance is measured."""
    cut: int
    """How many texts of those read were longer than a prompt may be, and lost their ends."""


def split(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    longest: int,
    sizes: tuple[int, int, int],
    key: Key,
    origin: str,
) -> Prompts:
    """The beginnings of the texts, each once, drawn into three sides.

    Args:
        texts: as many as there are; an empty one is left out.
        tokenizer: a prompt begins with its BOS, where it has one.
        longest: tokens of a prompt, BOS included.
        sizes: of the three sides.
        key: of the drawing.
        origin: what the texts are called in messages.

    Raises:
        DataError: there are not as many different prompts.
    """
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found: dict[tuple[int, ...], bool] = {}
    for ids in tokenizer.encode_all([text for text in texts if text]):
        whole = [*front, *ids]
        found.setdefault(tuple(whole[:longest]), len(whole) > longest)
    different, needed = list(found), sum(sizes)
    if len(different) < needed:
        raise DataError(
            f"{origin} gives {len(different)} different prompts of at most {longest} tokens, and "
            f"{needed} are needed ({sizes[0]} for the oracle's responses, {sizes[1]} for the "
            f"distillation, {sizes[2]} held out); give more texts, or ask for fewer prompts"
        )
    chosen = [different[number] for number in Order(key, len(different)).take(needed)]
    first, second = sizes[0], sizes[0] + sizes[1]
    return Prompts(
        oracle=tuple(chosen[:first]),
        distillation=tuple(chosen[first:second]),
        held_out=tuple(chosen[second:]),
        cut=sum(found[each] for each in chosen),
    )


def drawn(
    folder: Path,
    model: Backbone,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    key: Key,
    *,
    samples: int,
    device: str,
) -> list[Group]:
    """`samples` responses to each prompt, read from `folder` where they were drawn before.

    Args:
        folder: of these responses alone.
        model: whose responses they are.
        prompts: token ids.
        settings: of the drawing.
        key: of the drawing.
        samples: responses to each prompt.
        device: of the model.

    Raises:
        DataError: a file in `folder` is damaged.
    """
    groups: list[Group] = []
    for start in range(0, len(prompts), STRETCH):
        path = folder / f"{start:08d}.jsonl"
        some = [torch.tensor(each, device=device) for each in prompts[start : start + STRETCH]]
        if not path.is_file():
            numbers = range(start, start + len(some))
            made = generate(model, some, settings, key, samples, indices=numbers)
            write_whole(path, "".join(json.dumps(_written(each)) + "\n" for each in made))
        groups += _read(path, [prompt.cpu() for prompt in some], samples)
    return groups


def pairs_of(groups: Sequence[Group], *, samples: int | None = None) -> list[Pair]:
    """Each prompt with its first `samples` responses (all, when absent), one after another."""
    return [
        (tuple(group.prompt.tolist()), tuple(written.tokens.tolist()))
        for group in groups
        for written in group.completions[:samples]
    ]


def rows_of(pairs: Sequence[Pair]) -> TokenBatch:
    """One pair a row; the response's tokens are learned."""
    return TokenBatch.of(
        [prompt + response for prompt, response in pairs],
        masks=[[False] * len(prompt) + [True] * len(response) for prompt, response in pairs],
    )


def _written(group: Group) -> list[dict[str, Any]]:
    return [
        {
            "tokens": each.tokens.tolist(),
            "logprob": each.logprob.tolist(),
            "model_logprob": each.model_logprob.tolist(),
            "stopped": each.stopped,
        }
        for each in group.completions
    ]


def _read(path: Path, prompts: Sequence[torch.Tensor], samples: int) -> list[Group]:
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        groups = [
            Group(
                prompt=prompt,
                completions=tuple(
                    Completion(
                        tokens=torch.tensor(each["tokens"], dtype=torch.int64),
                        logprob=torch.tensor(each["logprob"]),
                        model_logprob=torch.tensor(each["model_logprob"]),
                        stopped=bool(each["stopped"]),
                    )
                    for each in line
                ),
            )
            for prompt, line in zip(prompts, lines, strict=True)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run again") from error
    if any(len(group.completions) != samples for group in groups):
        raise DataError(f"{path} does not hold {samples} responses a prompt; remove it")
    return groups
