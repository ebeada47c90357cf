"""Patterns over a stream of steps: at every step, a choice of things from it and those before it.

After Reverb's patterns: `{"state": Take("observation", -3, -1), "action": Take("action", -1)}`
gives, at every step that has two before it, the observations of those two and the step's own
action. A pattern does not reach over the end of an episode unless it is told to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.records import Episode, column_of, flat, mapped_leaves

__all__ = ["Take", "pattern_map", "steps_of"]


@dataclass(frozen=True)
class Take:
    """One thing of the last steps. -1 is the current step, -2 the one before."""

    path: str
    """Of a step: `reward`, `observation/image`."""
    start: int
    """The step, or the first of several."""
    stop: int | None = None
    """One past the last of several (0: the current one included); None takes one, unstacked."""

    def __post_init__(self) -> None:
        if self.start >= 0 or (self.stop is not None and not self.start < self.stop <= 0):
            raise ConfigError(
                f"steps are counted back from the current one, -1; got {self.start} to {self.stop}"
            )


def steps_of(episodes: Iterable[Episode]) -> Iterator[dict[str, Any]]:
    """All steps of all episodes, one behind the other."""
    for episode in episodes:
        for row in range(len(episode)):
            yield mapped_leaves(episode.steps, lambda column, row=row: column[row])


def pattern_map(
    steps: Iterable[Mapping[str, Any]],
    pattern: Mapping[str, Take],
    *,
    across_episodes: bool = False,
) -> Iterator[dict[str, Any]]:
    """What the pattern gives at every step that has enough steps before it.

    Args:
        steps: a stream; no more of it is held than the pattern reaches back.
        pattern: name -> what to take.
        across_episodes: let it reach from one episode into the one before.

    Raises:
        ConfigError: the pattern is empty.
        DataError: a step does not have what the pattern takes.
    """
    if not pattern:
        raise ConfigError("the pattern takes nothing")
    reach = max(-take.start for take in pattern.values())
    held: deque[dict[str, Any]] = deque(maxlen=reach)
    for step in steps:
        leaves = flat(step)
        held.append(leaves)
        if len(held) == reach:
            yield {name: _taken(held, take) for name, take in pattern.items()}
        if bool(leaves.get("is_last", False)) and not across_episodes:
            held.clear()


def _taken(held: deque[dict[str, Any]], take: Take) -> Any:
    count = len(held)
    try:
        if take.stop is None:
            return held[count + take.start][take.path]
        chosen = range(count + take.start, count + take.stop)
        return column_of([held[place][take.path] for place in chosen])
    except KeyError:
        raise DataError(f"a step has no {take.path}; it has {', '.join(held[-1])}") from None
