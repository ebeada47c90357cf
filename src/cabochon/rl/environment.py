"""Environments, several at once, as an actor holds them: no network, no torch.

When an episode ends, its environment begins the next in the same step: the reward and the flags are
those of the episode that ended, the observation is the first of the next one, and the final
observation is kept beside it. Every episode begins from a seed of its own, which depends on the
environment's number, its actor's run and the episode's number alone, so that what was done in an
episode can be done again (`history`, `restore`): an environment cannot be saved, its past can.

Needs the extra `rl`; names such as ALE/Pong-v5 need `atari`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, MissingExtra, NonFinite
from cabochon.models.agents.networks import Signature

__all__ = [
    "Arrival",
    "EnvironmentSpec",
    "Environments",
    "GymnasiumEnvironments",
    "environments",
    "gymnasium_environment",
    "seed_of",
    "signature_of",
]

Array = NDArray[Any]
NO_ROWS = np.zeros(0, np.int64)
FLOAT32_MOST = float(np.finfo(np.float32).max)
"""Rewards are kept, and observations read, as float32."""


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


def gymnasium_environment(spec: EnvironmentSpec, **more: Any) -> Any:
    """One Gymnasium environment; `more` goes to `gymnasium.make`.

    Raises:
        ConfigError: there is none of the name, or it cannot be made with these options.
        MissingExtra: Gymnasium, or what the environment itself needs, is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingExtra("gymnasium", "rl", f"the environment {spec.name}") from error
    more |= dict(spec.options)
    if spec.max_episode_steps is not None:
        more["max_episode_steps"] = spec.max_episode_steps
    try:
        return gymnasium.make(spec.name, disable_env_checker=True, **more)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError(f"{spec.name} lacks what it needs: {error}") from error
    except Exception as error:  # whatever a foreign environment raises, it is named
        options = f" with {json.dumps(dict(spec.options))}" if spec.options else ""
        raise ConfigError(f"{spec.name} cannot be made{options}: {error}") from error


class GymnasiumEnvironments:
    """`Environments` of Gymnasium, one after the other in this thread."""

    def __init__(self, spec: EnvironmentSpec, ids: Sequence[int], key: Key) -> None:
        self.spec, self.key = spec, key
        self.ids = np.asarray(ids, np.int64)
        self.run = 0
        self.envs: list[Any] = []
        try:
            self.envs += [gymnasium_environment(spec) for _ in ids]
            space = self.envs[0].observation_space
            self.signature, self._offset = _signature(spec.name, space, self.envs[0].action_space)
        except BaseException:
            self.close()
            raise
        self._shape, self._dtype = self.signature.shape, np.dtype(self.signature.dtype)
        self.episode = [0] * len(ids)
        self.actions: list[list[int]] = [[] for _ in ids]
        self.returns = [0.0] * len(ids)

    def reset(self, run: int, /) -> Arrival:
        """As the protocol says."""
        self.run = run
        self.episode = [0] * len(self.ids)
        rows = range(len(self.ids))
        observation = np.stack([self._begin(row) for row in rows])
        nothing = np.zeros(len(self.ids), bool)
        return Arrival(
            ids=self.ids,
            run=np.full(len(self.ids), run, np.int64),
            episode=np.array(self.episode, np.int64),
            observation=observation,
            reward=np.zeros(len(self.ids), np.float32),
            first=~nothing,
            terminated=nothing,
            truncated=nothing,
        )

    def step(self, actions: Array, /) -> Arrival:
        """As the protocol says."""
        count = len(self.ids)
        if len(actions) != count:
            raise DataError(f"{count} environments need an action each, got {len(actions)}")
        observation = np.empty((count, *self._shape), self._dtype)
        reward = np.zeros(count, np.float32)
        terminated, truncated = np.zeros(count, bool), np.zeros(count, bool)
        ended, finals, returns, lengths = [], [], [], []
        for row, action in enumerate(actions.tolist()):
            seen, got, over, cut = self._step(row, action)
            reward[row] = got
            if over or cut:
                terminated[row], truncated[row] = over, cut and not over
                ended.append(row)
                finals.append(seen.copy())  # environments write into their arrays again
                returns.append(self.returns[row])
                lengths.append(len(self.actions[row]))
                self.episode[row] += 1
                seen = self._begin(row)
            observation[row] = seen
        return Arrival(
            ids=self.ids,
            run=np.full(count, self.run, np.int64),
            episode=np.array(self.episode, np.int64),
            observation=observation,
            reward=reward,
            first=terminated | truncated,
            terminated=terminated,
            truncated=truncated,
            ended=np.array(ended, np.int64),
            final_observation=np.array(finals, self._dtype).reshape(-1, *self._shape),
            episode_return=np.array(returns, np.float64),
            episode_length=np.array(lengths, np.int64),
        )

    def history(self) -> dict[str, Array]:
        """As the protocol says."""
        return {
            "run": np.array([self.run]),
            "episode": np.array(self.episode),
            "length": np.array([len(each) for each in self.actions]),
            "actions": np.array([action for each in self.actions for action in each], np.int64),
        }

    def restore(self, history: Mapping[str, Array], observation: Array, /) -> bool:
        """As the protocol says."""
        self.run, self.episode = int(history["run"][0]), history["episode"].tolist()
        begin = 0
        for row, length in enumerate(history["length"].tolist()):
            seen = self._begin(row)
            for action in history["actions"][begin : begin + length].tolist():
                seen, _, over, cut = self._step(row, action)
                if over or cut:
                    return False
            if not np.array_equal(seen, observation[row]):
                return False
            begin += length
        return True

    def close(self) -> None:
        """As the protocol says."""
        while self.envs:
            self.envs.pop().close()

    def _begin(self, row: int) -> Array:
        self.actions[row], self.returns[row] = [], 0.0
        seed = seed_of(self.key, int(self.ids[row]), self.run, self.episode[row])
        observation, _ = self._asked(row, lambda: self.envs[row].reset(seed=seed), "reset", 2)
        return self._plain(row, observation)

    def _step(self, row: int, action: int) -> tuple[Array, float, bool, bool]:
        if not 0 <= action < self.signature.actions:
            raise DataError(
                f"the action {action} for {self._where(row)} is outside of its action space: "
                f"0 to {self.signature.actions - 1}"
            )
        env, chosen = self.envs[row], action + self._offset
        observation, reward, over, cut, _ = self._asked(row, lambda: env.step(chosen), "step", 5)
        self.actions[row].append(action)
        gained = self._reward(row, reward)
        self.returns[row] += gained
        return self._plain(row, observation), gained, self._flag(row, over), self._flag(row, cut)

    def _asked(self, row: int, ask: Callable[[], Any], verb: str, values: int) -> Any:
        try:
            answer = ask()
        except (Exception, SystemExit) as error:  # whatever a foreign environment raises
            raise DataError(
                f"{self._where(row)} raised {type(error).__name__} in {verb}: {error}"
            ) from error
        if not isinstance(answer, tuple) or len(answer) != values:
            came = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise DataError(f"{self._where(row)} gave {came} in {verb}, expected {values} values")
        return answer

    def _reward(self, row: int, reward: Any) -> float:
        array = np.asarray(reward)
        if array.ndim != 0 or array.dtype.kind not in "fiub":
            raise DataError(f"{self._where(row)} gave the reward {reward!r}, expected a number")
        gained = float(reward)
        if not abs(gained) <= FLOAT32_MOST:
            raise NonFinite(
                f"{self._where(row)} gave the reward {reward}, no finite float32; mend the "
                "environment"
            )
        return gained

    def _flag(self, row: int, flag: Any) -> bool:
        if type(flag) is bool:
            return flag
        if np.ndim(flag) != 0 or np.asarray(flag).dtype.kind not in "biu":
            raise DataError(
                f"{self._where(row)} said {flag!r} of the end of its episode, expected a bool"
            )
        return bool(flag)

    def _plain(self, row: int, observation: Any) -> Array:
        array: Array = np.asarray(observation)
        if self.signature.kinds:
            array = np.asarray(array - int(self.envs[row].observation_space.start), self._dtype)
        if array.shape != self._shape or array.dtype != self._dtype:
            raise DataError(
                f"{self._where(row)} gave an observation of {array.dtype} and shape {array.shape}, "
                f"its space says {self._dtype} and {self._shape}"
            )
        if array.dtype.kind == "f" and not (np.abs(array) <= FLOAT32_MOST).all():
            raise NonFinite(f"{self._where(row)} gave an observation that is not finite as float32")
        kinds = self.signature.kinds
        if kinds and not 0 <= array < kinds:
            raise DataError(
                f"{self._where(row)} gave the observation {observation}, outside of its space "
                f"{self.envs[row].observation_space}"
            )
        return array

    def _where(self, row: int) -> str:
        return (
            f"environment {self.ids[row]} ({self.spec.name}), episode {self.episode[row]} of run "
            f"{self.run}, action {len(self.actions[row])}"
        )


def _signature(name: str, seen: Any, done: Any) -> tuple[Signature, int]:
    """The signature, and the number of the first action.

    Raises:
        ConfigError: the spaces are none of those that an agent here can see or act in.
    """
    from gymnasium import spaces

    if not isinstance(done, spaces.Discrete):
        raise ConfigError(
            f"{name} takes actions from {done}; agents here choose one of a number of actions "
            "(Discrete): wrap the environment"
        )
    actions, offset = int(done.n), int(done.start)
    if isinstance(seen, spaces.Discrete):
        kinds = int(seen.n)
        return Signature(shape=(), dtype="int64", actions=actions, kinds=kinds), offset
    if not isinstance(seen, spaces.Box):
        raise ConfigError(
            f"{name} gives observations from {seen}; agents here see a Box or a Discrete: wrap the "
            "environment with gymnasium's FlattenObservation"
        )
    shape = tuple(int(each) for each in seen.shape)
    if 0 in shape:
        raise ConfigError(f"{name} gives observations without a number, of shape {shape}")
    return Signature(shape=shape, dtype=str(seen.dtype), actions=actions), offset
