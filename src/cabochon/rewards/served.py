"""A reward that a server computes: one question for each prompt, all its completions in it.

    POST URL   {"prompt": "...", "completions": ["...", "..."]}
    200        {"scores": [0.3, -1.2]}

Time-outs, repeats and concurrency are those of `generation.transport` (extra `remote`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn
from cabochon.core.errors import DataError, ServerError
from cabochon.generation.transport import Request, Transport, ask
from cabochon.rewards.scores import named
from cabochon.rewards.texts import Decode

__all__ = ["served"]

PATH = "/score"
"""Where an address without a path is asked."""


def served(transport: Transport, decode: Decode) -> RewardFn:
    """The reward of a server.

    Args:
        transport: the address, with its path, and how patient to be.
        decode: of the tokenizer that the tokens are of; control tokens are not sent.

    Returns:
        A reward that raises ServerError where the server fails for good, answers what is no list
        of as many numbers, or takes too long; the prompt is named, and the sample where there is
        one.
    """
    parts = urlsplit(transport.url)
    path = parts.path if parts.path.strip("/") else PATH
    params = parse_qs(parts.query, keep_blank_values=True)
    root = replace(transport, url=f"{parts.scheme}://{parts.netloc}")

    def reward(groups: Sequence[Group]) -> Tensor:
        requests = [_question(path, params, groups, place, decode) for place in range(len(groups))]
        rows: list[list[float]] = [[] for _ in groups]
        for place, found in ask(root, requests):
            rows[place] = found
        return torch.tensor(rows, dtype=torch.float32)

    return reward


def _question(
    path: str,
    params: Mapping[str, Sequence[str]],
    groups: Sequence[Group],
    place: int,
    decode: Decode,
) -> Request[list[float]]:
    group = groups[place]

    def read(answer: Any) -> list[float]:
        found = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(group.completions):
            raise ServerError(
                f"expected {{'scores': [...]}} with {len(group.completions)} numbers, got "
                f"{str(answer)[:200]}"
            )
        for sample, value in enumerate(found):
            if type(value) not in (int, float):
                raise ServerError(f"the score of sample {sample} is {value!r}, expected a number")
        return [float(value) for value in found]

    try:
        body = {
            "prompt": decode(group.prompt.tolist()),
            "completions": [decode(each.tokens.tolist()) for each in group.completions],
        }
    except DataError as error:
        raise DataError(f"{named(groups, place)}: {error}") from error
    return Request(
        path=path,
        params=params,
        body=body,
        read=read,
        name=named(groups, place),
        absent="is this the address of a reward?",
    )
