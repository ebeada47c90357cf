"""Learning-rate schedules: pure functions from an update's index to a multiplier.

Each rises linearly over the first `warmup` updates, (index + 1) / warmup, so that the first update
already moves and update `warmup - 1` is the first at full height.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from cabochon.core.errors import ConfigError

__all__ = ["Kind", "Schedule", "constant", "cosine", "linear", "scheduled"]

Schedule = Callable[[int], float]
"""Update index -> what the initial learning rate is multiplied by."""

Kind = Literal["cosine", "linear", "constant"]

USUAL_WARMUP = 50


def scheduled(kind: Kind, *, total: int, warmup: int | None = None, floor: float = 0.1) -> Schedule:
    """The schedule of a run of `total` updates, by the name that its settings give it.

    Args:
        kind: "cosine", "linear" or "constant".
        total: updates in all.
        warmup: updates of the rise; None for a tenth of them, at most 50.
        floor: what a cosine or a line ends at.

    Raises:
        ConfigError: there are no updates, `warmup` is longer than the run, or `floor` no fraction.
    """
    if total < 1:
        raise ConfigError(f"steps must be at least 1, got {total}")
    rise = min(USUAL_WARMUP, total // 10) if warmup is None else warmup
    if kind == "constant":
        _decay(total, rise, floor, float)  # the same bounds hold
        return constant(warmup=rise)
    decay = {"cosine": cosine, "linear": linear}[kind]
    return decay(total=total, warmup=rise, floor=floor)


def constant(*, warmup: int = 0) -> Schedule:
    """1 after the warm-up.

    Raises:
        ConfigError: `warmup` is negative.
    """
    if warmup < 0:
        raise ConfigError(f"warmup must not be negative, got {warmup}")
    return lambda index: min(1.0, (index + 1) / warmup) if warmup else 1.0


def linear(*, total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """From 1 at update `warmup` along a straight line to `floor` at the last, `total` - 1.

    Raises:
        ConfigError: `warmup` or `floor` is out of range.
    """
    return _decay(total, warmup, floor, lambda progress: 1.0 - progress)


def cosine(*, total: int, warmup: int = 0, floor: float = 0.1) -> Schedule:
    """From 1 at update `warmup` along half a cosine to `floor` at the last, `total` - 1.

    multiplier = floor + (1 - floor) (1 + cos(pi progress)) / 2

    Raises:
        ConfigError: `warmup` or `floor` is out of range.
    """
    return _decay(total, warmup, floor, lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0)


def _decay(total: int, warmup: int, floor: float, height: Callable[[float], float]) -> Schedule:
    if not 0 <= warmup <= total:
        raise ConfigError(f"warmup must lie between 0 and the {total} updates, got {warmup}")
    if not 0.0 <= floor <= 1.0:
        raise ConfigError(f"floor must lie in [0, 1], got {floor}")

    def multiplier(index: int) -> float:
        if index < warmup:
            return (index + 1) / warmup
        progress = min(1.0, (index - warmup) / max(1, total - 1 - warmup))
        return floor + (1.0 - floor) * height(progress)

    return multiplier
