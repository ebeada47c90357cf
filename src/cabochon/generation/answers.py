"""Reading a completion server's answers, which are not believed before they are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Completion, Group
from cabochon.core.errors import ServerError
from cabochon.generation.settings import Settings
from cabochon.generation.transport import Unsettled

__all__ = ["Scored", "Text", "read_group", "read_scores", "read_texts"]

ROUNDING = 1e-3
"""Nats by which a log-probability may lie above 0."""

LOWEST = -9999.0
"""What servers write for -inf, which JSON does not have."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a server wrote, where only the text is known."""

    text: str
    stopped: bool
    """By the server's own end of text, not by the length limit."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model thinks of one completion, at temperature 1 and with no cut."""

    logprob: Tensor
    """T float32, nats: of each token; -inf where the server says that it is impossible."""
    top_ids: Tensor
    """T k int64: the k most probable tokens, most probable first."""
    top_logprob: Tensor
    """T k float32, nats. What is missing to 1 is the mass of all other tokens together."""


def _choices(answer: Any, count: int) -> list[dict[str, Any]]:
    """The choices of an answer, in order.

    Raises:
        ServerError: they are not `count`, each with an index of its own.
        Unsettled: the server gave a request up before it was done.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        raise ServerError(f"the answer has no choices: {str(answer)[:200]!r}")
    places = [each.get("index", place) for place, each in enumerate(choices)]
    if any(type(place) is not int for place in places) or sorted(places) != list(range(count)):
        raise ServerError(f"asked for {count} choices, got those of index {places}")
    for each in choices:
        if each.get("finish_reason") == "abort":
            raise Unsettled(ServerError("the server gave the request up before it was done"))
    return [choices[places.index(place)] for place in range(count)]


def read_group(
    prompt: Tensor, settings: Settings, samples: int, as_text: bool, answer: Any
) -> Group:
    """The completions of one prompt.

    Args:
        prompt: T int64, what was to be gone on from.
        settings: what was asked for; `max_new_tokens` is the room there is.
        samples: how many completions were asked for.
        as_text: the prompt was sent as text, so that the server may have read other tokens.
        answer: decoded JSON.

    Raises:
        ServerError: anything is missing, too much, or no number.
        Unsettled: the server gave the request up.
    """
    choices = _choices(answer, samples)
    _check_prompt(prompt, samples, as_text, choices[0], answer.get("usage"))
    completions = tuple(_completion(each, settings, prompt.device) for each in choices)
    return Group(prompt=prompt, completions=completions)


def _check_prompt(
    prompt: Tensor, samples: int, as_text: bool, choice: Mapping[str, Any], usage: Any
) -> None:
    """Refuse a prompt that the server read otherwise: a BOS too many, a text split differently."""
    told = choice.get("prompt_token_ids")
    if told is not None:
        if _list(told) != prompt.tolist():
            raise ServerError(
                f"the server read the prompt as {len(told)} tokens {told[:8]}..., it has "
                f"{len(prompt)}: {prompt[:8].tolist()}..."
            )
        return
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if count is None and not as_text:
        return
    if count not in (len(prompt), len(prompt) * samples):  # counted once, or for each sample
        raise ServerError(
            f"the server read a prompt of {count} tokens, it has {len(prompt)}; look at BOS and at "
            "the tokenizer, or send token ids"
        )


def _completion(choice: Mapping[str, Any], settings: Settings, device: torch.device) -> Completion:
    ids, logprobs = _tokens(choice, choice.get("token_ids"))
    if len(ids) != len(logprobs):
        raise ServerError(f"got {len(ids)} tokens and {len(logprobs)} log-probabilities")
    if not 1 <= len(ids) <= settings.max_new_tokens:
        raise ServerError(f"asked for 1 to {settings.max_new_tokens} tokens, got {len(ids)}")
    for place, value in enumerate(logprobs):
        if not _is_number(value) or not LOWEST < value <= ROUNDING:
            raise ServerError(f"token {place} was drawn with the log-probability {value}")
    stop = next((place for place in range(len(ids)) if _ends(ids[: place + 1], settings)), None)
    reason = choice.get("finish_reason")
    if stop is None and reason != "length":
        raise ServerError(
            f"a completion ended for the reason {reason!r}, but neither a stop id of "
            f"{settings.stop_ids} nor another condition ends it; a stop token that is not among "
            "the tokens cannot be learned from"
        )
    length = len(ids) if stop is None else stop + 1
    logprob = torch.tensor(logprobs[:length], dtype=torch.float32, device=device)
    return Completion(
        tokens=torch.tensor(ids[:length], dtype=torch.int64, device=device),
        logprob=logprob,
        model_logprob=logprob,
        stopped=stop is not None,
    )


def _ends(ids: list[int], settings: Settings) -> bool:
    """Whether the last of these tokens ends the completion."""
    return ids[-1] in settings.stop_ids or any(ends(ids) for ends in settings.ends)


def _tokens(choice: Mapping[str, Any], ids: Any = None) -> tuple[list[int], list[Any]]:
    """Token ids and log-probabilities, in either of the forms that servers have.

    `ids` is for servers that list the ids by themselves, whatever they name the tokens.
    """
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        raise ServerError("a choice has no log-probabilities; the server must return them")
    if isinstance(given.get("content"), list):  # the form of chats
        entries = [each if isinstance(each, dict) else {} for each in given["content"]]
        names = [each.get("id", each.get("token")) for each in entries]
        values = [each.get("logprob") for each in entries]
    else:
        names, values = _list(given.get("tokens")), _list(given.get("token_logprobs"))
    return [_token_id(each) for each in (names if ids is None else _list(ids))], values


def _token_id(name: Any) -> int:
    if isinstance(name, str) and name.startswith("token_id:"):
        digits = name.removeprefix("token_id:")
        name = int(digits) if digits.isdecimal() and digits.isascii() else name
    if type(name) is not int or not 0 <= name < 2**31:
        raise ServerError(
            f"the server names a token {name!r} instead of giving its id; a piece of text may "
            "stand for several tokens"
        )
    return name


def _list(value: Any) -> list[Any]:
    """A list; absent, an empty one."""
    if value is not None and not isinstance(value, list):
        raise ServerError(f"expected a list in the answer, got {str(value)[:200]!r}")
    return value or []


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def read_texts(samples: int, answer: Any) -> list[Text]:
    """The texts of one prompt.

    Raises:
        ServerError: there are not `samples`, or one has no text.
        Unsettled: the server gave the request up.
    """
    found = []
    for each in _choices(answer, samples):
        if not isinstance(each.get("text"), str):
            raise ServerError(f"a choice has no text: {str(each)[:200]!r}")
        found.append(Text(text=each["text"], stopped=each.get("finish_reason") == "stop"))
    return found


def read_scores(how: str, group: Group, top_k: int, answer: Any) -> list[Scored]:
    """The scores of one group's completions.

    Args:
        how: `prompt_logprobs` (vLLM's) or `echo` (OpenAI's).
        group: what was sent, each completion behind the prompt.
        top_k: how many of the most probable tokens were asked for.
        answer: decoded JSON.

    Raises:
        ServerError: anything is missing, too much, or no number.
    """
    choices = _choices(answer, len(group.completions))
    return [
        _scored(how, choice, group.prompt, completion.tokens, top_k)
        for choice, completion in zip(choices, group.completions, strict=True)
    ]


def _scored(
    how: str, choice: Mapping[str, Any], prompt: Tensor, completion: Tensor, top_k: int
) -> Scored:
    tokens = [*prompt.tolist(), *completion.tolist()]
    entries = _list(choice.get("prompt_logprobs"))
    if how == "echo":
        ids, values = _tokens(choice)
        if ids != tokens or len(values) != len(ids):
            raise ServerError(
                f"asked to score {len(tokens)} tokens, got {len(values)} scores of {len(ids)} "
                + ("" if len(ids) != len(tokens) else "others")
            )
        entries = _echoed(ids, values, choice["logprobs"].get("top_logprobs"), top_k)
    if len(entries) != len(tokens):
        raise ServerError(f"asked to score {len(tokens)} tokens, got {len(entries)} scores")
    logprob, top_ids, top_logprob = [], [], []
    for place in range(len(prompt), len(tokens)):
        values_here = _entry(entries[place], place)
        if tokens[place] not in values_here:
            raise ServerError(f"the score of token {place} (id {tokens[place]}) is missing")
        logprob.append(values_here[tokens[place]])
        most = sorted(values_here.items(), key=lambda item: -item[1])[:top_k]
        if len(most) < top_k:
            raise ServerError(f"asked for the {top_k} most probable, got {len(most)} at {place}")
        top_ids.append([id_ for id_, _ in most])
        top_logprob.append([value for _, value in most])
    device, shape = completion.device, (len(completion), top_k)
    return Scored(
        logprob=torch.tensor(logprob, dtype=torch.float32, device=device),
        top_ids=torch.tensor(top_ids, dtype=torch.int64, device=device).reshape(shape),
        top_logprob=torch.tensor(top_logprob, dtype=torch.float32, device=device).reshape(shape),
    )


def _echoed(ids: list[int], values: list[Any], most: Any, top_k: int) -> list[Any]:
    """Entries as vLLM's `prompt_logprobs` has them, from OpenAI's parallel lists."""
    tops = _list(most) if top_k else []
    if top_k and len(tops) != len(ids):
        raise ServerError(f"asked to score {len(ids)} tokens, got the most probable of {len(tops)}")
    entries = []
    for place, (id_, value) in enumerate(zip(ids, values, strict=True)):
        top = tops[place] if top_k and isinstance(tops[place], dict) else {}
        entries.append({**{str(_token_id(k)): v for k, v in top.items()}, str(id_): value})
    return entries


def _entry(entry: Any, place: int) -> dict[int, float]:
    """The log-probabilities at one place, by token id."""
    if not isinstance(entry, dict):
        raise ServerError(f"there is no score at token {place}: {entry!r}")
    found = {}
    for name, value in entry.items():
        number: Any = value.get("logprob") if isinstance(value, dict) else value
        if not (name.isdecimal() and name.isascii()) or not _is_number(number) or number > ROUNDING:
            raise ServerError(f"the score of token {name} at {place} is {value!r}")
        found[int(name)] = -math.inf if number <= LOWEST else float(number)
    return found
