"""What a backend is asked for: indices and settings for every prompt, and only what it follows."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import fields

from cabochon.core.errors import ConfigError
from cabochon.generation.settings import Settings

__all__ = ["for_each", "refuse_unknown"]


def for_each(
    count: int, settings: Settings | Sequence[Settings], indices: Sequence[int] | None
) -> list[tuple[int, Settings]]:
    """The index in the key and the settings of each of `count` prompts.

    Raises:
        ConfigError: there are not as many.
    """
    indices = range(count) if indices is None else indices
    if len(indices) != count:
        raise ConfigError(f"got {len(indices)} indices for {count} prompts")
    each = [settings] * count if isinstance(settings, Settings) else list(settings)
    if len(each) != count:
        raise ConfigError(f"got {len(each)} settings for {count} prompts")
    return list(zip(indices, each, strict=True))


def refuse_unknown(settings: Settings, backend: str, known: Set[str]) -> None:
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
