"""Rewards by name: checks, lengths, models of preferences, servers, functions of one's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from cabochon import folders
from cabochon.cli.machine import device_of, model_folder
from cabochon.cli.prompts import turns_of
from cabochon.cli.words import unknown
from cabochon.core import Group, RewardFn
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.chat import Message
from cabochon.data.prompts import Prompt
from cabochon.data.readers import read_records
from cabochon.data.tokenizer import Tokenizer
from cabochon.generation.transport import Transport
from cabochon.rewards import checks, lengths
from cabochon.rewards.compose import (
    Composition,
    Part,
    frozen,
    load_scales,
    rescaled,
)
from cabochon.rewards.deadlines import LONGEST, within
from cabochon.rewards.preference_model import preferred
from cabochon.rewards.preference_texts import encode_exchange, preferred_texts
from cabochon.rewards.served import served
from cabochon.rewards.texts import Exchange, Turns, judged, judged_together

__all__ = [
    "NAMES",
    "RewardSettings",
    "absolute",
    "is_address",
    "is_folder",
    "load_reward",
    "located",
    "reward_sources",
]

NAMES = {
    "parses": "the completion is Python (parses:prompt: together with its prompt)",
    "docstring": "its first function has a docstring of one sentence (docstring:prompt likewise)",
    "matches": "matches:REGEX is found in the completion",
    "number": "its last number is the data's answer (number:marked: the one behind ####)",
    "length": "tokens (length:N: minus the share by which it is longer than N tokens)",
    "repetition": "minus the share of repeated n-grams of tokens (repetition:N; 4)",
    "python": "python:MODULE.FUNCTION of (prompt, completion), or of groups",
}
"""Name -> what it rewards; besides, a reward model's folder or run, and http(s)://HOST:PORT/PATH."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What completions are rewarded for."""

    reward: tuple[str, ...] = ()
    """parses, docstring, matches:REGEX, number, length:N, repetition:N, python:MODULE.FUNCTION, a
    reward model's folder or run, or http://HOST:PORT/PATH; several are added up."""
    reward_weights: tuple[float, ...] = ()
    """One for each of `reward`, of either sign; 1 each when absent."""
    reward_normalise: str = ""
    """Scales of the parts, frozen: a file that `evaluate rewards --save` wrote, or how many prompts
    to measure them on before the first update; as they are when absent."""
    reward_timeout: float = 10.0
    """Seconds that one judgement, or one answer of a server, may take."""

    def __post_init__(self) -> None:
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ConfigError(
                f"{len(self.reward_weights)} reward weights for {len(self.reward)} rewards; give "
                "one for each, or none"
            )
        if not 0.0 < self.reward_timeout <= LONGEST:
            raise ConfigError(
                f"reward_timeout is above 0 and at most {LONGEST:.0f} s, got {self.reward_timeout}"
            )
        normalise = self.reward_normalise
        if normalise and not normalise.isdecimal() and not Path(normalise).is_file():
            raise ConfigError(
                f"--reward-normalise {normalise} is neither a number of prompts nor a file; make "
                "one: cabochon evaluate rewards FILE ... --save FILE"
            )


def load_reward(
    settings: RewardSettings,
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[Prompt] = (),
    data: Sequence[str] = (),
    device: str = "cpu",
    plain: bool = False,
    draw: Callable[[int], Sequence[Group]] | None = None,
) -> Composition:
    """The reward that the settings name, as a sum whose parts are told by `scores`.

    Args:
        settings: at least one reward.
        tokenizer: of the policy.
        prompts: those that will be asked; `number` needs them for the answers.
        data: the names in `--data` that the prompts came from, whose `answer` fields are the
            answers; without the field, a prompt's completion is.
        device: where models of preferences go.
        plain: prompts are the beginnings of texts, not turns of conversations: what a model of
            preferences with a tokenizer of its own is given.
        draw: how many prompts -> what the policy writes for them before any training, for
            `--reward-normalise N`.

    Raises:
        ConfigError: no reward, an unknown name, or a parameter that it cannot have.
        DataError: a prompt without an answer, or scales of another reward.
        FolderError: a folder that holds no reward model, or no tokenizer.
        WeightsMismatch: a model of several labels.
    """
    if not settings.reward:
        raise ConfigError(f"what is good? --reward {' | '.join(NAMES)} | FOLDER | http://HOST:PORT")
    weights = settings.reward_weights or (1.0,) * len(settings.reward)
    parts = tuple(
        Part(
            name=name,
            reward=_named(name, settings, tokenizer, prompts, data, device, plain=plain),
            weight=weight,
        )
        for name, weight in zip(settings.reward, weights, strict=True)
    )
    reward = Composition(parts=parts)
    normalise = settings.reward_normalise
    if not normalise:
        return reward
    if not normalise.isdecimal():
        return rescaled(reward, load_scales(normalise))
    if draw is None:
        raise ConfigError("--reward-normalise takes a file here: nobody draws reference samples")
    return frozen(reward, draw(int(normalise)))


def reward_sources(settings: RewardSettings) -> dict[str, str]:
    """The model folders and servers among the rewards, by a name for the manifest."""
    found = [name for name in settings.reward if is_address(name) or is_folder(name)]
    return {f"reward_{number}": name for number, name in enumerate(found)}


def absolute(settings: RewardSettings) -> RewardSettings:
    """The same with the paths of folders and files written out."""
    return replace(settings, **located(settings.reward, settings.reward_normalise))


def located(names: Sequence[str], normalise: str) -> dict[str, Any]:
    """The settings `reward` and `reward_normalise`, with the paths of folders and files whole."""
    scales = bool(normalise) and not normalise.isdecimal()
    return {
        "reward": tuple(str(Path(name).resolve()) if is_folder(name) else name for name in names),
        "reward_normalise": str(Path(normalise).resolve()) if scales else normalise,
    }


def _named(
    name: str,
    settings: RewardSettings,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    data: Sequence[str],
    device: str,
    *,
    plain: bool,
) -> RewardFn:
    if is_address(name):
        return served(Transport(url=name, timeout_s=settings.reward_timeout), tokenizer.decode)
    if is_folder(name):
        return _model(name, tokenizer, device, None if plain else turns_of(tokenizer, data))
    word, _, argument = name.partition(":")
    if word in ("length", "repetition"):
        return _counted(word, argument)
    if word == "python":
        return _own(argument, tokenizer, settings.reward_timeout)
    if word == "matches" and argument:
        judge = checks.matches(argument)
    elif word in ("parses", "docstring") and argument in ("", "prompt"):
        made = checks.parses if word == "parses" else checks.documented
        judge = made(with_prompt=argument == "prompt")
    elif word == "number" and argument in ("", "marked"):
        answers = _answers(tokenizer, prompts, data)
        judge = checks.equals(answers, marked=argument == "marked")
    elif word in NAMES:
        raise ConfigError(f"--reward {name!r}: {word} is written so: {NAMES[word]}")
    else:
        raise ConfigError(unknown("reward", word, NAMES) + ", or a folder that is there")
    return judged(judge, tokenizer.decode, timeout_s=settings.reward_timeout)


def is_address(name: str) -> bool:
    """Whether a name in `--reward` is a server's."""
    return name.startswith(("http://", "https://"))


def is_folder(name: str) -> bool:
    """Whether it is a model folder's or a run's."""
    return name.partition(":")[0] not in NAMES and Path(name).exists()


def _model(name: str, tokenizer: Tokenizer, device: str, turns: Turns | None) -> RewardFn:
    """Reads the policy's tokens as they were drawn where its tokenizer is the policy's."""
    folder = model_folder(name)
    model, own = folders.load_reward(folder, device=device_of(device))
    model.requires_grad_(False)
    if tokenizer.difference(own) is None:
        return preferred(model)
    here = folders.saved_here(folder)
    prompt = "?" if turns is None else (Message("user", "?"),)
    try:  # what cannot be written at all is found before anything is
        encode_exchange(own, Exchange(prompt=prompt, completion="!", name=name), trained_here=here)
    except DataError as error:
        raise ConfigError(
            f"the reward model {name} has another tokenizer than the policy, so it is given texts; "
            f"they cannot be written for it: {error}; or --plain, where no conversations are meant"
        ) from error
    return judged_together(preferred_texts(model, own, trained_here=here), tokenizer.decode, turns)


def _counted(word: str, argument: str) -> RewardFn:
    if argument and not argument.isdecimal():
        raise ConfigError(
            f"--reward {word}:{argument}: expected a number of tokens after the colon"
        )
    if word == "repetition":
        return lengths.repetition(int(argument)) if argument else lengths.repetition()
    return lengths.excess(int(argument)) if argument else lengths.length


def _own(path: str, tokenizer: Tokenizer, timeout_s: float) -> RewardFn:
    """A function from a module of the user's: of two texts, or of groups."""
    where, _, name = path.rpartition(".")
    if not where:
        raise ConfigError(f"--reward python:{path}: expected python:MODULE.FUNCTION")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as `python -m` has it
    try:
        function: Any = getattr(importlib.import_module(where), name)
        wanted = [p for p in inspect.signature(function).parameters.values() if _is_positional(p)]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"--reward python:{path} cannot be used: {error}") from error
    if len(wanted) == 2:
        return judged(function, tokenizer.decode, timeout_s=timeout_s)
    if len(wanted) == 1:
        return lambda groups: within(timeout_s, lambda: function(groups))
    raise ConfigError(
        f"{path} takes {len(wanted)} arguments; a reward takes (prompt, completion) and gives a "
        "number, or takes groups and gives a tensor of P G"
    )


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
    ) and (parameter.default is parameter.empty)


def _answers(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], data: Sequence[str]
) -> dict[str, Fraction]:
    """The number that belongs to each prompt, by the prompt's text."""
    written: dict[str, str] = {}
    for source in data:
        if source != "stdlib":
            for record in read_records(source):
                if "answer" in record.values:
                    written[record.source] = str(record.values["answer"])
    found: dict[str, Fraction] = {}
    for prompt in prompts:
        text = written.get(prompt.source) or tokenizer.decode(prompt.completion)
        number = checks.answer_number(text)
        if number is None:
            raise DataError(
                f"{prompt.source}: no number in the answer {text[:80]!r}; --reward number needs "
                "one in the field 'answer', or in the completion"
            )
        key = tokenizer.decode(prompt.ids)
        if found.setdefault(key, number) != number:
            raise DataError(
                f"{prompt.source}: the same prompt has the answers {found[key]} and {number}"
            )
    return found
