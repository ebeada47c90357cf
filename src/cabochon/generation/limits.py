"""Settings that a backend knows, and those that it would silently not follow."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields

from cabochon.core.errors import ConfigError
from cabochon.generation.settings import Settings

__all__ = ["refuse_unknown"]


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
