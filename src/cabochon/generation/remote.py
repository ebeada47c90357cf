"""Drawing from and scoring with a server that speaks OpenAI's completions over HTTP.

    endpoint = Endpoint(transport=Transport(url="http://127.0.0.1:8000"), model="student")
    texts(endpoint, ["Once upon"], Settings(max_new_tokens=50), Key(0))

A sampler needs more than text: the ids of the tokens, and their log-probabilities under what they
were drawn from. OpenAI's protocol has no place for ids and does not say which log-probabilities it
means, so a `Dialect` says what a server adds to it. What a server cannot give is refused, not made
up: a text encoded again is often not the tokens that were drawn.

Every prompt is a request of its own, with the seed that the key and the prompt's index give, so
what is drawn does not depend on the list it came in as far as the server keeps to seeds. Requests
are under way several at a time and the server batches them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from cabochon.core import Group, Key, Sampler
from cabochon.core.errors import ConfigError, DataError, ServerError
from cabochon.generation.answers import Scored, Text, read_group, read_scores, read_texts
from cabochon.generation.limits import for_each, refuse_unknown
from cabochon.generation.settings import Settings
from cabochon.generation.transport import Request, Transport, ask
from cabochon.generation.writing import begin

__all__ = [
    "OPENAI",
    "Dialect",
    "Endpoint",
    "Scored",
    "Text",
    "completed",
    "generate",
    "sampler",
    "score",
    "texts",
]

A = TypeVar("A")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a server understands beyond OpenAI's completions."""

    name: str
    """For messages."""
    known: frozenset[str] = frozenset({"max_new_tokens", "temperature", "top_p"})
    """Fields of `Settings` that it follows."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Sent with every request: asks for token ids, turns the server's own defaults off."""
    logprobs: Literal["drawn", "model", "none"] = "none"
    """Whose log-probabilities it returns: of what a token was drawn from (after temperature and
    cuts), or of the model itself."""
    scores: Literal["prompt_logprobs", "echo", "none"] = "none"
    """How it can be asked for the log-probabilities of a given text."""


OPENAI = Dialect(name="an OpenAI-compatible server")
"""Text in, text out: the least that every server understands."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model on a server."""

    transport: Transport
    model: str
    """The name that the server gives it."""
    dialect: Dialect = OPENAI
    context: int | None = None
    """Tokens of the longest document; where unknown the server itself refuses longer ones."""
    text_of: Callable[[Tensor], str] | None = None
    """How to write a prompt (T int64) as text, for a server that takes no ids; None sends ids."""
    path: str = "/v1/completions"


def sampler(endpoint: Endpoint, settings: Settings, samples: int) -> Sampler:
    """`generate` with everything but the prompts and the key decided."""

    def sample(prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
        return generate(endpoint, prompts, settings, key, samples)

    return sample


def generate(
    endpoint: Endpoint,
    prompts: Sequence[Tensor],
    settings: Settings | Sequence[Settings],
    key: Key,
    samples: int = 1,
    *,
    indices: Sequence[int] | None = None,
) -> list[Group]:
    """`samples` completions of each prompt, in the prompts' order, written by the server.

    Where the distribution drawn from is not the model's own, the completions are sent once more,
    to be scored: that is where `model_logprob` comes from.

    Args:
        endpoint: a server that returns token ids and log-probabilities.
        prompts: T int64 each, of at least one token.
        settings: the same for all, or one for each prompt.
        key: the seed of a request depends on (key, prompt index) alone.
        samples: completions of each prompt.
        indices: the prompts' indices in the key; 0, 1, 2, ... when absent. Give those that an
            interrupted call did not finish, to go on with it.

    Raises:
        ConfigError: settings that this server does not follow, or whose log-probabilities it
            cannot give.
        DataError: an empty prompt, or one that leaves no room in the context.
        ServerError: the server cannot be reached, refuses, or answers what cannot be used; its
            `finished` holds the groups that came before, by the place of their prompts.
    """
    found = completed(endpoint, prompts, settings, key, samples, indices=indices)
    return _collected(found, len(prompts))


def completed(
    endpoint: Endpoint,
    prompts: Sequence[Tensor],
    settings: Settings | Sequence[Settings],
    key: Key,
    samples: int = 1,
    *,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[int, Group]]:
    """The groups of `generate` as they are finished, each with the place of its prompt.

    Leaving the iterator early cancels what the server still has to do.
    """
    _check_samples(samples)
    context = sys.maxsize if endpoint.context is None else endpoint.context
    requests = []
    for prompt, (index, wanted) in zip(
        prompts, for_each(len(prompts), settings, indices), strict=True
    ):
        _check_can_sample(endpoint, wanted)
        room = begin(prompt, wanted, key, index, 0, context).limit
        how = replace(wanted, max_new_tokens=room)
        sent = prompt.tolist() if endpoint.text_of is None else endpoint.text_of(prompt)
        requests.append(
            Request(
                path=endpoint.path,
                body=_body(endpoint, sent, how, key.fold(index), samples),
                read=partial(read_group, prompt, how, samples, endpoint.text_of is not None),
                then=None if _draws_from_the_model(how) else partial(_scored_too, endpoint),
            )
        )
    return ask(endpoint.transport, requests)


def score(endpoint: Endpoint, groups: Sequence[Group], *, top_k: int = 0) -> list[list[Scored]]:
    """What the served model thinks of completions that are already there.

    Args:
        endpoint: a server whose dialect can score.
        groups: prompts and what to score behind them.
        top_k: how many of the most probable tokens to report beside each.

    Raises:
        ConfigError: the server cannot score.
        DataError: an empty prompt.
        ServerError: the server cannot be reached, refuses, or answers what cannot be used.
    """
    how = endpoint.dialect.scores
    if how == "none" or endpoint.text_of is not None:
        raise ConfigError(
            f"{endpoint.dialect.name} cannot score given tokens; score with a local model, or with "
            "a server whose dialect can"
        )
    for number, group in enumerate(groups):
        if len(group.prompt) == 0:
            raise DataError(f"prompt {number} is empty; begin with BOS where there is no text")
    requests = [_score_request(endpoint, group, top_k) for group in groups]
    return _collected(ask(endpoint.transport, requests), len(groups))


def texts(
    endpoint: Endpoint, prompts: Sequence[str], settings: Settings, key: Key, samples: int = 1
) -> list[list[Text]]:
    """`samples` texts for each prompt, from any server that completes text.

    Raises:
        ConfigError: settings that this server does not follow; stop ids, which text cannot show.
        ServerError: as `generate`; `finished` holds lists of `Text`.
    """
    known = endpoint.dialect.known - {"stop_ids", "ends"}
    refuse_unknown(settings, endpoint.dialect.name, known)
    _check_samples(samples)
    requests = [
        Request(
            path=endpoint.path,
            body=_body(endpoint, prompt, settings, key.fold(index), samples),
            read=partial(read_texts, samples),
        )
        for index, prompt in enumerate(prompts)
    ]
    return _collected(ask(endpoint.transport, requests), len(prompts))


def _collected(answers: Iterator[tuple[int, A]], count: int) -> list[A]:
    """The answers in order; those that came before a failure go with its error."""
    found: dict[int, A] = {}
    try:
        found.update(answers)  # one by one: it keeps what came before an error
    except ServerError as error:
        error.finished = dict(found)
        error.args = (
            f"{error} ({len(found)} of {count} were finished before; they are in this error's "
            "`finished`)",
        )
        raise
    return [found[place] for place in range(count)]


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")


def _check_can_sample(endpoint: Endpoint, settings: Settings) -> None:
    dialect = endpoint.dialect
    # What ends a completion is looked for in what a server returns, should it go on. What came
    # before has the same law, since no token depends on those after it.
    refuse_unknown(settings, dialect.name, dialect.known | {"stop_ids", "ends"})
    if dialect.logprobs == "none":
        raise ConfigError(
            f"{dialect.name} returns text, not tokens and log-probabilities; use `texts`, or a "
            "dialect that says how its server returns them"
        )
    if _draws_from_the_model(settings):
        return
    if dialect.logprobs == "model":
        raise ConfigError(
            f"{dialect.name} returns the model's log-probabilities, not those of what is drawn "
            f"from at temperature {settings.temperature}, top_k {settings.top_k}, top_p "
            f"{settings.top_p}; draw at temperature 1 without cuts, or let the server return "
            "processed ones (vLLM: --logprobs-mode processed_logprobs)"
        )
    if dialect.scores == "none":
        raise ConfigError(
            f"{dialect.name} cannot score, so the model's own log-probabilities cannot be had at "
            f"temperature {settings.temperature}, top_k {settings.top_k}, top_p {settings.top_p}; "
            "draw at temperature 1 without cuts"
        )


def _draws_from_the_model(settings: Settings) -> bool:
    """Whether `logprob` and `model_logprob` are one and the same."""
    uncut = (settings.temperature, settings.top_k, settings.top_p) == (1.0, 0, 1.0)
    return uncut or settings.temperature == 0.0


def _body(
    endpoint: Endpoint, prompt: str | list[int], settings: Settings, key: Key, samples: int
) -> dict[str, Any]:
    """What is sent. Every setting goes with it: a server's defaults are its own affair."""
    known = endpoint.dialect.known
    body: dict[str, Any] = {
        "model": endpoint.model,
        **endpoint.dialect.extra,
        "prompt": prompt,
        "n": samples,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        # Servers number the samples on from the seed; 48 bits survive every JSON reader.
        "seed": key.integer() & (2**48 - 1),
    }
    if "top_k" in known:
        body["top_k"] = settings.top_k
    if "stop_ids" in known:
        body["stop_token_ids"] = list(settings.stop_ids)
    return body


def _scored_too(endpoint: Endpoint, group: Group) -> Request[Group]:
    """Asks for the model's own log-probabilities of what was drawn from another distribution."""
    request = _score_request(endpoint, group, 0)

    def read(answer: Any) -> Group:
        completions = tuple(
            replace(completion, model_logprob=each.logprob)
            for completion, each in zip(group.completions, request.read(answer), strict=True)
        )
        return replace(group, completions=completions)

    return Request(path=request.path, body=request.body, read=read)


def _score_request(endpoint: Endpoint, group: Group, top_k: int) -> Request[list[Scored]]:
    how = endpoint.dialect.scores
    wanted: dict[str, Any] = {"prompt_logprobs": top_k, "max_tokens": 1}
    if how == "echo":
        wanted = {"echo": True, "logprobs": max(1, top_k), "max_tokens": 0}
    prompt = group.prompt.tolist()
    return Request(
        path=endpoint.path,
        body={
            "model": endpoint.model,
            **endpoint.dialect.extra,
            "prompt": [[*prompt, *completion.tokens.tolist()] for completion in group.completions],
            "n": 1,
            "temperature": 1.0,
            **wanted,
        },
        read=partial(read_scores, how, group, top_k),
    )
