"""A teacher on a server: its likeliest tokens at every position of a given text, over HTTP.

    endpoint = connect(Transport(url="http://127.0.0.1:8000"), tokenizer.encode)
    teacher = served(endpoint, 64, tokenizer.vocab_size)

The server is asked for the log-probabilities of prompts: vLLM's `prompt_logprobs`, or OpenAI's
`echo` with `logprobs` from a server that names tokens by their ids. They are the model's own, at
temperature 1. What all other tokens have together is 1 minus the sum of what is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Teacher, TokenBatch, TopKTargets
from cabochon.core.errors import ConfigError, ServerError, TokenizerMismatch
from cabochon.data.batches import Placed, documents
from cabochon.generation.answers import Scored
from cabochon.generation.remote import OPENAI, Dialect, Endpoint, score
from cabochon.generation.transport import Request, Transport, ask_one
from cabochon.generation.vllm import VLLM, read_models

__all__ = ["ECHO", "connect", "served", "served_logprob"]

ECHO = replace(
    OPENAI,
    name="an echoing server",
    extra={"return_tokens_as_token_ids": True, "repetition_penalty": 1.0, "min_p": 0.0},
    scores="echo",
)
"""A server of OpenAI's completions that returns the log-probabilities of its prompts."""

SLACK = 1e-3
"""Probabilities that a server rounded may add up to so much more than 1."""
ROUNDING = 1e-6
"""What 1 minus a float32 sum of probabilities is off by."""

SAMPLE = " Two  words,\tIt's 12345 (x_y);\n\n  caf\u00e9 e\u0301 \u6f22 \U0001f642 end."
"""Text on which tokenizers of different vocabularies differ."""


def connect(
    transport: Transport, encode: Callable[[str], Sequence[int]], *, model: str = ""
) -> Endpoint:
    """The endpoint of a served model that can score text and reads text as `encode` does.

    Args:
        transport: where the server is.
        encode: text to token ids, without BOS: the student's tokenizer.
        model: which of the server's models; the only one when empty.

    Raises:
        ConfigError: it serves several models, or not this one.
        ServerError: it cannot be reached, or returns no log-probabilities of prompts.
        TokenizerMismatch: it cuts a sample of text into other tokens.
    """
    listing: Request[dict[str, int | None]] = Request(
        path="v1/models", read=read_models, method="GET"
    )
    models = ask_one(transport, listing)
    if model not in models and (model or len(models) != 1):
        raise ConfigError(
            f"{transport.url} serves {sorted(models)}; "
            + (f"{model!r} is none of them" if model else "say which one is meant")
        )
    name = model or next(iter(models))
    at = Endpoint(transport=transport, model=name, dialect=VLLM, context=models[name])
    refusals = []
    for dialect in (VLLM, ECHO):
        try:
            read = _reads(replace(at, dialect=dialect))
        except ServerError as error:
            if error.status not in (None, 200, 400, 422):
                raise
            refusals.append(f"asked as {dialect.name}: {error}")
        else:
            _check_tokens(transport.url, read, list(encode(SAMPLE)))
            return replace(at, dialect=dialect)
    raise ServerError(
        f"{transport.url} does not return the log-probabilities of a prompt by token id, which a "
        "teacher needs (vLLM does): " + "; ".join(refusals)
    )


def served(endpoint: Endpoint, k: int, vocabulary: int) -> Teacher:
    """A served model as a teacher that says its k likeliest tokens and the mass of the others.

    Each document of a batch is a request; several are under way at a time.

    Args:
        endpoint: as `connect` gives it.
        k: how many tokens; vLLM gives more than 20 with --max-logprobs.
        vocabulary: how many tokens there are.

    Raises:
        ConfigError: `k` is out of range.

    The teacher raises ServerError where the server cannot be reached, times out, refuses (a k
    above its limit, a document beyond its context), or answers what cannot be used: fewer
    log-probabilities than asked for, other tokens, NaN, probabilities of more than 1 together.
    """
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"can ask for 1 to {vocabulary} tokens, the whole vocabulary; got {k}")

    def teacher(batch: TokenBatch, /) -> TopKTargets:
        size, device = batch.mask.numel(), batch.mask.device
        ids = torch.full((size, k), -1)
        logprob = torch.full((size, k), -math.inf)
        tail = torch.full((size,), math.nan)
        for document, scored in _scores(endpoint, batch, k):
            counted = np.flatnonzero(document.counted)
            flat = torch.from_numpy(document.flat[counted])
            ids[flat], logprob[flat] = scored.top_ids[counted], scored.top_logprob[counted]
            tail[flat] = _tail(scored.top_logprob[counted], vocabulary)
        shape = batch.shape
        return TopKTargets(
            ids=ids.view(*shape, k).to(device),
            logprob=logprob.view(*shape, k).to(device),
            tail=tail.view(shape).to(device),
        )

    return teacher


def served_logprob(endpoint: Endpoint) -> Callable[[TokenBatch], Tensor]:
    """What a served model gives to the counted targets of a batch: B T float32 nats, NaN elsewhere.

    It raises what the teacher of `served` does.
    """

    def logprob(batch: TokenBatch, /) -> Tensor:
        found = torch.full((batch.mask.numel(),), math.nan)
        for document, scored in _scores(endpoint, batch, 0):
            counted = np.flatnonzero(document.counted)
            found[torch.from_numpy(document.flat[counted])] = scored.logprob[counted]
        return found.view(batch.shape).to(batch.mask.device)

    return logprob


def _scores(endpoint: Endpoint, batch: TokenBatch, k: int) -> list[tuple[Placed, Scored]]:
    """What the server says of every document that has something to be predicted."""
    asked = [each for each in documents(batch) if each.counted.any()]
    # A document's first token is the prompt, the others what is scored behind it, up to the last
    # that is asked for.
    groups = []
    for each in asked:
        ids = torch.from_numpy(each.sequence)[: int(np.flatnonzero(each.counted)[-1]) + 2]
        silent = torch.zeros(len(ids) - 1)
        rest = Completion(tokens=ids[1:], logprob=silent, model_logprob=silent, stopped=False)
        groups.append(Group(prompt=ids[:1], completions=(rest,)))
    found = score(endpoint, groups, top_k=k)
    return [(each, scored) for each, (scored,) in zip(asked, found, strict=True)]


def _tail(logprob: Tensor, vocabulary: int) -> Tensor:
    """n float32: log of what the k tokens (n k) leave; where rounding hides it, the most it can be.

    None of the others is likelier than the last one told, and a rest of less than the rounding of
    the sum is not known. It is never taken for 0 while there are others.
    """
    k = logprob.shape[-1]
    mass = logprob.double().exp().sum(-1)
    if bool((mass > 1.0 + SLACK).any()):
        raise ServerError(
            f"the server's {k} probabilities add up to {mass.max().item():.4f} at a position; they "
            "are no log-probabilities of one distribution (vLLM: leave out --logprobs-mode "
            "raw_logits)"
        )
    if k >= vocabulary:
        return torch.full((len(logprob),), -math.inf)
    most = ((vocabulary - k) * logprob[:, -1].double().exp()).clamp(max=ROUNDING)
    rest = 1.0 - mass
    return torch.where(rest > ROUNDING, rest, most).log().float()


def _reads(endpoint: Endpoint) -> list[int]:
    """The tokens that the server makes of the sample, as it scores them."""
    how: dict[str, Any] = {"prompt_logprobs": 0, "max_tokens": 1, "add_special_tokens": False}
    if endpoint.dialect.scores == "echo":
        how = {"echo": True, "logprobs": 1, "max_tokens": 0}
    body = {"model": endpoint.model, **endpoint.dialect.extra, "prompt": SAMPLE, "n": 1, **how}
    request: Request[list[int]] = Request(
        path=endpoint.path, body=body, read=partial(_ids, endpoint.dialect)
    )
    return ask_one(endpoint.transport, request)


def _ids(dialect: Dialect, answer: Any) -> list[int]:
    try:
        (choice,) = answer["choices"]
        if dialect.scores == "echo":
            names = choice["logprobs"]["tokens"]
            return [int(name.removeprefix("token_id:")) for name in names]
        first, *others = choice["prompt_logprobs"]
        told = choice.get("prompt_token_ids")
        if told is not None:
            return [int(id_) for id_ in told]
        return [
            -1 if first is None else int(next(iter(first))),
            *(int(next(iter(e))) for e in others),
        ]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ServerError(
            f"no log-probabilities of the prompt by token id in {str(answer)[:200]!r}"
        ) from error


def _check_tokens(url: str, read: list[int], own: list[int]) -> None:
    """Refuse a server whose tokens are others; a BOS that it puts in front is its own affair."""
    without_bos = read[1:] if len(read) == len(own) + 1 else read
    unknown_first = without_bos[:1] == [-1] and without_bos[1:] == own[1:]
    if without_bos == own or unknown_first:
        return
    place = next(
        (at for at, pair in enumerate(zip(without_bos, own, strict=False)) if pair[0] != pair[1]),
        min(len(without_bos), len(own)),
    )
    theirs, ours = without_bos[place : place + 4], own[place : place + 4]
    raise TokenizerMismatch(
        f"the teacher at {url} cuts a sample of text into {len(read)} tokens, the student's "
        f"tokenizer into {len(own)}; from token {place} on they are {theirs} against {ours}; "
        "distil with the teacher's tokenizer, or with --cross-tokenizer and the teacher's own "
        "tokenizer beside it"
    )
