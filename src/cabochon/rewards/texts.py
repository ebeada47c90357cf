"""Rewards that judge texts: one completion at a time, or all of them together.

A function of two strings judges one at a time. What had better see many at once, such as a model
with a tokenizer of its own, is asked for all, and in a chat it sees the turns of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn
from cabochon.core.errors import DataError
from cabochon.data.chat import Message
from cabochon.rewards.deadlines import Overdue, within

__all__ = ["Decode", "Exchange", "Judge", "TextsJudge", "Turns", "judged", "judged_together"]

Judge = Callable[[str, str], float]
"""(prompt, completion) -> how good the completion is; True and False are 1 and 0."""

Decode = Callable[[Iterable[int]], str]
"""Token ids -> text without control tokens, as `Tokenizer.decode` gives it."""

Turns = Callable[[Sequence[int]], Sequence[Message]]
"""A prompt's token ids -> the turns of its conversation, the last one the user's."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A completion as text, and what it goes on from."""

    prompt: str | tuple[Message, ...]
    """The beginning of a text, or the turns of a conversation, the last one the user's."""
    completion: str
    name: str
    """How a message calls it."""


TextsJudge = Callable[[Sequence[Exchange]], Tensor]
"""n exchanges -> n float32: how good the completion of each is."""

EXCERPT = 120
"""Characters of a prompt and of a completion that a message quotes."""


def judged(judge: Judge, decode: Decode, *, timeout_s: float = 10.0) -> RewardFn:
    """The reward that asks `judge` of every completion's text.

    Args:
        judge: sees the prompt's and the completion's text, without control tokens.
        decode: of the tokenizer that the tokens are of.
        timeout_s: the longest that one judgement may take.

    Returns:
        A reward that raises DataError where a judgement fails, takes too long or is no number; it
        names and quotes prompt and sample.
    """

    def reward(groups: Sequence[Group]) -> Tensor:
        rows = []
        for place, group in enumerate(groups):
            prompt = decode(group.prompt.tolist())
            said = [decode(each.tokens.tolist()) for each in group.completions]
            rows.append(
                [
                    _asked(judge, prompt, text, f"prompt {place}, sample {sample}", timeout_s)
                    for sample, text in enumerate(said)
                ]
            )
        return torch.tensor(rows, dtype=torch.float32)

    return reward


def judged_together(judge: TextsJudge, decode: Decode, turns: Turns | None = None) -> RewardFn:
    """The reward that asks `judge` of the texts of all completions at once.

    Args:
        judge: sees texts without control tokens.
        decode: of the tokenizer that the tokens are of.
        turns: of the same; None where prompts are the beginnings of plain texts.

    Returns:
        A reward that raises DataError for a prompt that `turns` cannot take apart; names it.
    """

    def reward(groups: Sequence[Group]) -> Tensor:
        found = []
        for place, group in enumerate(groups):
            ids = group.prompt.tolist()
            text = decode(ids)
            try:
                prompt = text if turns is None else tuple(turns(ids))
            except DataError as error:
                raise DataError(f"prompt {place}: {_excerpt(text)}: {error}") from error
            for sample, each in enumerate(group.completions):
                said = decode(each.tokens.tolist())
                name = _quoted(f"prompt {place}, sample {sample}", text, said)
                found.append(Exchange(prompt=prompt, completion=said, name=name))
        return judge(found).reshape(len(groups), -1)

    return reward


def _asked(judge: Judge, prompt: str, completion: str, where: str, timeout_s: float) -> float:
    try:
        value: Any = within(timeout_s, lambda: judge(prompt, completion))
    except Overdue:
        problem = f"took longer than {timeout_s:g} s"
        raise DataError(f"the reward {problem} at {_quoted(where, prompt, completion)}") from None
    except DataError as error:
        raise DataError(f"{error}; at {_quoted(where, prompt, completion)}") from error
    except (Exception, SystemExit) as error:  # somebody's code: whatever it raises is named
        problem = f"failed ({type(error).__name__}: {error})"
        raise DataError(f"the reward {problem} at {_quoted(where, prompt, completion)}") from error
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the reward gave {value!r} at {_quoted(where, prompt, completion)}; expected a number"
        ) from error


def _quoted(where: str, prompt: str, completion: str) -> str:
    return f"{where}: {_excerpt(prompt)} -> {_excerpt(completion)}"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= EXCERPT else f"{text[:EXCERPT]}...")
