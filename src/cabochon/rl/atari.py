"""Atari games through ale-py's vector of environments, which steps them in threads of its own.

Pictures of 84 x 84 grey bytes, one at a time (the network stacks them), an action for 4 frames, the
brighter of the last two of them, 1 to 30 no-ops at the beginning, no end at the loss of a life, no
clipped reward. The chance that an action is repeated is the one that the name stands for (0.25 for
v5). Options are those of ale-py's AtariVectorEnv. Needs the extra `atari`: ale-py is under the GPL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, MissingExtra
from cabochon.models.agents.networks import Signature
from cabochon.rl.environment import Arrival, EnvironmentSpec, seed_of

__all__ = ["AtariEnvironments"]

Array = NDArray[Any]


class AtariEnvironments:
    """`Environments` of one Atari game."""

    def __init__(self, spec: EnvironmentSpec, ids: Sequence[int], key: Key) -> None:
        self.spec, self.key = spec, key
        self.ids = np.asarray(ids, np.int64)
        self.run = 0
        self.vector: Any = _vector(spec, len(ids))
        shape = self.vector.single_observation_space.shape
        shape = shape[1:] if shape[0] == 1 else shape
        actions = int(self.vector.single_action_space.n)
        self.signature = Signature(shape=tuple(map(int, shape)), dtype="uint8", actions=actions)
        count = len(ids)
        self.episode, self.length = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.returns = np.zeros(count)
        self.actions: list[list[int]] = [[] for _ in ids]

    def reset(self, run: int, /) -> Arrival:
        """As the protocol says."""
        count = len(self.ids)
        self.run, self.episode[:], self.length[:], self.returns[:] = run, 0, 0, 0.0
        self.actions = [[] for _ in range(count)]
        observation = self._begin(np.ones(count, bool))
        nothing = np.zeros(count, bool)
        return Arrival(
            ids=self.ids,
            run=np.full(count, run, np.int64),
            episode=self.episode.copy(),
            observation=observation,
            reward=np.zeros(count, np.float32),
            first=~nothing,
            terminated=nothing,
            truncated=nothing,
        )

    def step(self, actions: Array, /) -> Arrival:
        """As the protocol says."""
        observation, reward, terminated, truncated, info = self._stepped(actions)
        truncated = truncated & ~terminated
        over = terminated | truncated
        ended = np.flatnonzero(over)
        final = self._shaped(info["final_obs"][ended]) if len(ended) else observation[:0]
        returns, lengths = self.returns[ended], self.length[ended]
        if len(ended):
            self.episode[ended] += 1
            self.returns[ended], self.length[ended] = 0.0, 0
            for row in ended.tolist():
                self.actions[row] = []
            observation = self._begin(over)
        return Arrival(
            ids=self.ids,
            run=np.full(len(self.ids), self.run, np.int64),
            episode=self.episode.copy(),
            observation=observation,
            reward=reward,
            first=over,
            terminated=terminated,
            truncated=truncated,
            ended=ended,
            final_observation=final,
            episode_return=returns,
            episode_length=lengths,
        )

    def history(self) -> dict[str, Array]:
        """As the protocol says."""
        return {
            "run": np.array([self.run]),
            "episode": self.episode.copy(),
            "length": self.length.copy(),
            "returns": self.returns.copy(),
            "actions": np.array([action for each in self.actions for action in each], np.int64),
        }

    def restore(self, history: Mapping[str, Array], observation: Array, /) -> bool:
        """As the protocol says. The longest episode begins first, so that all end together."""
        self.run, self.episode = int(history["run"][0]), history["episode"].copy()
        lengths = history["length"].tolist()
        pieces = np.split(history["actions"], np.cumsum(lengths)[:-1])
        seen = self._begin(np.ones(len(self.ids), bool))
        longest = max(lengths)
        for time in range(longest):
            begin = np.array([0 < length == longest - time for length in lengths])
            if time and begin.any():
                self._begin(begin)
            chosen = [
                int(piece[time - longest + length]) if time >= longest - length else 0
                for piece, length in zip(pieces, lengths, strict=True)
            ]
            seen = self._shaped(self.vector.step(np.array(chosen, np.int64))[0])
        if any(length == 0 for length in lengths):
            seen = self._begin(np.array([length == 0 for length in lengths]))
        self.actions = [piece.tolist() for piece in pieces]
        self.length, self.returns = history["length"].copy(), history["returns"].copy()
        return bool(np.array_equal(seen, observation))

    def close(self) -> None:
        """As the protocol says."""
        self.vector.close()

    def _stepped(self, actions: Array) -> Any:
        """What the library gives, with actions checked and episodes counted."""
        chosen = np.asarray(actions, np.int64)
        if chosen.shape != self.ids.shape:
            raise DataError(f"{len(self.ids)} environments need an action each, got {chosen.shape}")
        if ((chosen < 0) | (chosen >= self.signature.actions)).any():
            raise DataError(
                f"the actions {chosen.tolist()} for {self.spec.name} are outside of its action "
                f"space: 0 to {self.signature.actions - 1}"
            )
        observation, reward, terminated, truncated, info = self.vector.step(chosen)
        self.length += 1
        self.returns += reward
        for done, action in zip(self.actions, chosen.tolist(), strict=True):
            done.append(action)
        return self._shaped(observation), reward.astype(np.float32), terminated, truncated, info

    def _begin(self, rows: Array) -> Array:
        """New episodes of the chosen rows (n bool); everyone's observations."""
        seeds = [
            seed_of(self.key, int(self.ids[row]), self.run, int(self.episode[row]))
            for row in np.flatnonzero(rows).tolist()
        ]
        options = None if rows.all() else {"reset_mask": rows}
        observation, _ = self.vector.reset(seed=np.array(seeds), options=options)
        return self._shaped(observation)

    def _shaped(self, observation: Array) -> Array:
        """A copy, without the axis of a single frame: the library writes into its own again."""
        single = observation.ndim - 1 > len(self.signature.shape)
        return np.array(observation[:, 0] if single else observation)


def _vector(spec: EnvironmentSpec, count: int) -> Any:
    try:
        import ale_py
        import gymnasium
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as error:
        raise MissingExtra("ale-py", "atari", f"the environment {spec.name}") from error
    gymnasium.register_envs(ale_py)
    try:
        known = dict(gymnasium.spec(spec.name).kwargs)
    except gymnasium.error.Error as error:
        raise ConfigError(f"there is no environment {spec.name}: {error}") from error
    options: dict[str, Any] = {
        "stack_num": 1,
        "reward_clipping": False,
        "repeat_action_probability": known.get("repeat_action_probability", 0.0),
        **spec.options,
    }
    if spec.max_episode_steps is not None:
        frames = spec.max_episode_steps * int(options.get("frameskip", 4))
        options["max_num_frames_per_episode"] = frames
    try:
        return AtariVectorEnv(
            game=known["game"],
            num_envs=count,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
            **options,
        )
    except (gymnasium.error.Error, AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{spec.name} cannot be made with {options}: {error}") from error
