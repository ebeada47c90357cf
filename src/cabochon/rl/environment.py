"""Environments, several at once, as an actor holds them: no network, no torch.

When an episode ends, its environment begins the next in the same step: the reward and the flags are
those of the episode that ended, the observation is the first of the next one, and the final
observation is kept beside it. Every episode begins from a seed of its own, which depends on the
environment's number, its actor's run and the episode's number alone, so that what was done in an
episode can be done again (`history`, `restore`): an environment cannot be saved, its past can.

Needs the extra `rl`; names such as ALE/Pong-v5 need `atari`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import Signature

__all__ = [
    "Arrival",
    "EnvironmentSpec",
    "Environments",
    "environments",
    "seed_of",
    "signature_of",
]

Array = NDArray[Any]
NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """Which environment."""

    name: str
    """As Gymnasium knows it: CartPole-v1, ALE/Pong-v5, module:Name-v0 of a module of your own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it is made with beside its defaults; JSON values."""
    max_episode_steps: int | None = None
    """After so many actions an episode is cut short; the environment's own limit when absent."""

    def __post_init__(self) -> None:
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ConfigError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")

    @property
    def is_atari(self) -> bool:
        """Played through ale-py's own vector of environments."""
        return self.name.startswith("ALE/")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What n environments gave, a row each: an observation that waits for an action."""

    ids: Array
    """n int64: the environments' numbers."""
    run: Array
    """n int64: changes whenever an environment was begun anew, by another actor."""
    episode: Array
    """n int64: the number, within the run, of the episode that the observation belongs to."""
    observation: Array
    """n ...: the first of a new episode where `first` is True."""
    reward: Array
    """n float32: what the previous action brought; 0 at the very beginning."""
    first: Array
    """n bool: the observation begins an episode."""
    terminated: Array
    """n bool: the environment ended the episode before."""
    truncated: Array
    """n bool: the episode before was cut short; what would have come is worth something."""
    ended: Array = field(default_factory=lambda: NO_ROWS)
    """m int64: the rows whose episode has just ended."""
    final_observation: Array = field(default_factory=lambda: np.zeros(0))
    """m ...: their last observations."""
    episode_return: Array = field(default_factory=lambda: np.zeros(0))
    """m float64: the undiscounted sums of their rewards."""
    episode_length: Array = field(default_factory=lambda: NO_ROWS)
    """m int64: how many actions they took."""

    @staticmethod
    def joined(arrivals: Sequence[Arrival]) -> Arrival:
        """One arrival of several actors' environments, in their order."""
        if len(arrivals) == 1:
            return arrivals[0]
        begins = np.cumsum([0, *(len(each.ids) for each in arrivals)])
        ended = [each.ended + begin for each, begin in zip(arrivals, begins, strict=False)]
        some = [each for each in arrivals if len(each.ended)] or arrivals[:1]
        named = {
            name: np.concatenate([getattr(each, name) for each in arrivals])
            for name in (
                "ids",
                "run",
                "episode",
                "observation",
                "reward",
                "first",
                "terminated",
                "truncated",
            )
        }
        finals = {
            name: np.concatenate([getattr(each, name) for each in some])
            for name in ("final_observation", "episode_return", "episode_length")
        }
        return Arrival(**named, **finals, ended=np.concatenate(ended))


class Environments(Protocol):
    """The object that an actor is: several environments, stepped together."""

    def reset(self, run: int, /) -> Arrival:
        """Begins every environment anew; their seeds depend on `run`."""
        ...

    def step(self, actions: Array, /) -> Arrival:
        """One action each (n int64).

        Raises:
            DataError: an environment raised, or gave what does not fit its spaces; or an action is
                outside of the action space.
            NonFinite: an environment gave a reward or an observation that is not finite.
        """
        ...

    def history(self) -> dict[str, Array]:
        """What was done in the episodes under way, for `restore`."""
        ...

    def restore(self, history: Mapping[str, Array], observation: Array, /) -> bool:
        """Does again what was done; True if every observation (n ...) is again what it was."""
        ...

    def close(self) -> None:
        """Twice is once."""
        ...


def environments(spec: EnvironmentSpec, ids: Sequence[int], key: Key) -> Environments:
    """The environments of these numbers; what an actor is spawned with.

    Raises:
        ConfigError: there is no such environment, or an agent of numbered actions cannot play it.
        MissingExtra: Gymnasium or ale-py is not installed.
    """
    if spec.is_atari:
        from cabochon.rl.atari import AtariEnvironments

        return AtariEnvironments(spec, ids, key)
    from cabochon.rl.gymnasium_environments import GymnasiumEnvironments

    return GymnasiumEnvironments(spec, ids, key)


def signature_of(spec: EnvironmentSpec) -> Signature:
    """What an agent sees and can do there; an environment is made and closed for it."""
    opened = environments(spec, [0], Key(0))
    try:
        return opened.signature  # type: ignore[attr-defined,no-any-return]
    finally:
        opened.close()


def seed_of(key: Key, number: int, run: int, episode: int) -> int:
    """31 bits: the seed of an episode."""
    return key.fold("environment", number, run, episode).integer() % 2**31
