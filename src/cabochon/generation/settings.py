"""What is asked of a completion: which distribution to draw from, and when to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cabochon.core.errors import ConfigError

__all__ = ["Ends", "Settings"]

Ends = Callable[[Sequence[int]], bool]
"""All tokens written so far -> whether the last of them ends the completion."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to write one completion."""

    max_new_tokens: int = 128
    """The most tokens a completion may have; fewer fit where the context is nearly full."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token instead of drawing."""
    top_k: int = 0
    """How many of the most probable tokens may be drawn; 0: all."""
    top_p: float = 1.0
    """Mass of the nucleus that may be drawn; 1: all."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion (and are its last token)."""
    ends: tuple[Ends, ...] = ()
    """Further conditions, asked after every token; `stopping.at_text` makes one of stop strings."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0 keeps all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must lie in (0, 1] (1 keeps all tokens), got {self.top_p}")
        if any(stop < 0 for stop in self.stop_ids):
            raise ConfigError(f"stop_ids must be token ids, at least 0, got {self.stop_ids}")
        if callable(self.ends) or not all(map(callable, self.ends)):
            raise ConfigError(f"ends must be a tuple of functions of the tokens, got {self.ends}")

    @property
    def distribution(self) -> tuple[float, int, float]:
        """Temperature, top-k, top-p: sequences that agree in them are drawn together."""
        return self.temperature, self.top_k, self.top_p
