"""Episodes of a Gymnasium environment, recorded while it is used. Needs the extra `rl`.

    env = record(gymnasium.make("CartPole-v1"), "data/cartpole")

Everything that the environment gives and gets passes unchanged. An episode is written when it
ends; one that is cut by `reset` or `close` is written as cut short; one in which the environment
raised, or gave a reward that is not finite, is written as `invalid`, and the error goes on.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.core.errors import ConfigError, DataError, MissingExtra, NonFinite
from cabochon.data.rlds.records import column_of, episode_of, flat, nested
from cabochon.data.rlds.writer import EpisodeWriter

try:
    import gymnasium
except ImportError as error:
    raise MissingExtra("gymnasium", "rl", "recording an environment") from error

__all__ = ["Recorder", "plain_observation", "record"]


def record(
    env: Any,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    **writing: Any,
) -> Recorder:
    """The same environment, whose episodes are written to the dataset at `path`.

    Args:
        env: a Gymnasium environment, not a vector of them. An `Autoreset` goes around the recorder,
            not into it.
        path: the dataset's folder.
        metadata: of every episode, beside `episode_id`, `environment_config`, `seed` and `invalid`.
        writing: as `EpisodeWriter` takes them: `split`, `append`, `format`, `name`.

    Raises:
        ConfigError: `env` is a vector of environments.
        DataError: as `EpisodeWriter`.
    """
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise ConfigError(
            "a vector of environments cannot be recorded as one; record each of them: "
            "SyncVectorEnv([lambda: record(make(), folder_i), ...])"
        )
    return Recorder(env, EpisodeWriter(path, **writing), dict(metadata or {}))


class Recorder(gymnasium.Wrapper):  # type: ignore[misc]
    """What `record` makes. `close` it, or what has not become a shard waits for the next writer."""

    def __init__(self, env: Any, writer: EpisodeWriter, metadata: dict[str, Any]) -> None:
        super().__init__(env)
        self.writer, self.metadata_of_all = writer, metadata
        self.observations: list[dict[str, Any]] = []
        self.actions: list[dict[str, Any]] = []
        self.rewards: list[float] = []
        self.seed = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode; one that is under way is written as cut short."""
        self._write(terminated=False)
        observation, info = self.env.reset(seed=seed, options=options)
        self.seed = -1 if seed is None else seed
        self.observations = [flat({"observation": plain_observation(observation)})]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step.

        Raises:
            DataError: the action is outside of the action space, or no episode is under way.
            NonFinite: the environment gave a reward that is not finite.
        """
        if not self.observations:
            raise DataError("no episode is under way: call reset (an Autoreset goes outside)")
        self._check_action(action)
        taken = flat({"action": plain_observation(action)})
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception:
            self._write(terminated=False, invalid=True)
            raise
        if not math.isfinite(reward):
            number = len(self.rewards)
            self._write(terminated=False, invalid=True)
            raise NonFinite(f"the environment's reward at step {number} is {reward}")
        self.actions.append(taken)
        self.rewards.append(float(reward))
        self.observations.append(flat({"observation": plain_observation(observation)}))
        if terminated or truncated:
            self._write(terminated=bool(terminated))
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Writes what is under way as cut short, closes the dataset and the environment."""
        self._write(terminated=False)
        self.writer.close()
        super().close()

    def _check_action(self, action: Any) -> None:
        space = self.env.action_space
        tried = action
        if isinstance(space, gymnasium.spaces.Box) and np.shape(action) == space.shape:
            tried = np.asarray(action, space.dtype)
        if not space.contains(tried):
            raise DataError(f"the action {action!r} is outside of {space}")

    def _write(self, *, terminated: bool, invalid: bool = False) -> None:
        """Writes the episode under way, if it has an action or is marked."""
        observations, actions = self.observations, self.actions
        rewards = np.array(self.rewards, np.float64)
        self.observations, self.actions, self.rewards = [], [], []
        if not actions:
            return
        columns = nested(
            {k: column_of([each[k] for each in observations]) for k in observations[0]}
        )
        taken = nested({k: column_of([each[k] for each in actions]) for k in actions[0]})
        self.writer.write(
            episode_of(
                observations=columns["observation"],
                actions=taken["action"],
                rewards=rewards,
                terminated=terminated,
                metadata={
                    **self.metadata_of_all,
                    "episode_id": uuid.uuid4().hex,
                    "environment_config": _config(self.env),
                    "seed": np.int64(self.seed),
                    "invalid": np.bool_(invalid),
                },
            )
        )


def plain_observation(value: Any) -> Any:
    """Arrays, texts, and mappings of such; the parts of a tuple are called 0, 1, ...

    Arrays are copies: environments write into theirs again.
    """
    if isinstance(value, Mapping):
        return {str(name): plain_observation(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return {str(place): plain_observation(each) for place, each in enumerate(value)}
    return value if isinstance(value, str) else np.array(value)


def _config(env: Any) -> str:
    """JSON that says which environment it is; empty where the environment does not know."""
    spec = getattr(env, "spec", None)
    if spec is None:
        return ""
    try:
        return str(spec.to_json())
    except (TypeError, ValueError):  # it was made with things that have no JSON
        return json.dumps({"id": spec.id})
