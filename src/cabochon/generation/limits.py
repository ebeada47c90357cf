"""What may be asked of a backend: prompts with room behind them, settings that it knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from torch import Tensor

from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.engine import Settings

__all__ = ["new_tokens", "refuse_unknown"]

KNOWN_EVERYWHERE = ("max_new_tokens", "temperature", "top_k", "top_p", "stop_ids")


def new_tokens(context: int | None, prompt: Tensor, index: int, settings: Settings) -> int:
    """How many tokens may follow a prompt, at least one.

    Args:
        context: tokens of the longest document; None where it is not known.
        prompt: T int64.
        index: the prompt's, for the message.
        settings: for the most that is wanted.

    Raises:
        DataError: the prompt is empty, or leaves no room.
    """
    if prompt.ndim != 1 or len(prompt) == 0:
        raise DataError(
            f"prompt {index} has shape {tuple(prompt.shape)}; a prompt is one row of at least one "
            "token (begin with BOS where there is no text)"
        )
    if context is None:
        return settings.max_new_tokens
    room = context - len(prompt)
    if room < 1:
        raise DataError(
            f"prompt {index} has {len(prompt)} tokens, the model's context is {context}; "
            "shorten it so that at least one new token fits"
        )
    return min(room, settings.max_new_tokens)


def refuse_unknown(
    settings: Settings, backend: str, known: Iterable[str] = KNOWN_EVERYWHERE
) -> None:
    """Refuse settings that `backend` would silently not follow.

    Raises:
        ConfigError: a field outside `known` is not at its default.
    """
    plain = Settings()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in known and value != getattr(plain, field.name):
            raise ConfigError(
                f"{backend} cannot follow {field.name}={value!r}; leave it out, or use the engine"
            )
