"""Gymnasium's environments, one after the other; whatever one raises or gives is named.

They are foreign code: what does not fit their own spaces, or is no number, would falsify what an
agent learns, so it ends the actor with the environment, the episode and the action in the message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, MissingExtra, NonFinite
from cabochon.models.agents.networks import Signature
from cabochon.rl.environment import Arrival, EnvironmentSpec, seed_of

__all__ = ["GymnasiumEnvironments", "gymnasium_environment"]

Array = NDArray[Any]
FLOAT32_MOST = float(np.finfo(np.float32).max)
"""Rewards are kept, and observations read, as float32."""


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
