"""Rewards that judge one completion's text at a time, from a function of two strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn
from cabochon.core.errors import DataError
from cabochon.rewards.deadlines import Overdue, within

__all__ = ["Decode", "Judge", "judged"]

Judge = Callable[[str, str], float]
"""(prompt, completion) -> how good the completion is; True and False are 1 and 0."""

Decode = Callable[[Iterable[int]], str]
"""Token ids -> text without control tokens, as `Tokenizer.decode` gives it."""

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


def _asked(judge: Judge, prompt: str, completion: str, where: str, timeout_s: float) -> float:
    try:
        value: Any = within(timeout_s, lambda: judge(prompt, completion))
    except Overdue:
        problem = f"took longer than {timeout_s:g} s"
        raise DataError(f"the reward {problem} at {_quoted(where, prompt, completion)}") from None
    except DataError as error:
        raise DataError(f"{error}; at {_quoted(where, prompt, completion)}") from error
    except Exception as error:  # somebody's code: whatever it raises is named and passed on
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
