"""Groups whose tokens are the bytes of texts, so that a reward's reading is easy to see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cabochon.core import Completion, Group


def decode(ids: Iterable[int]) -> str:
    return bytes(ids).decode("utf-8")


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def completion(text: str) -> Completion:
    tokens = encode(text)
    logprob = torch.zeros(len(tokens))
    return Completion(tokens=tokens, logprob=logprob, model_logprob=logprob, stopped=True)


def group(prompt: str, *texts: str) -> Group:
    return Group(prompt=encode(prompt), completions=tuple(map(completion, texts)))


def groups(rows: Sequence[tuple[str, Sequence[str]]]) -> list[Group]:
    return [group(prompt, *texts) for prompt, texts in rows]
