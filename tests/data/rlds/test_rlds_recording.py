"""Recording an environment changes nothing for its user and loses nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_episodes import needs

from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.data.rlds.reader import Episodes, validate
from cabochon.data.rlds.windows import n_step

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra rl)")
needs("tfrecord")

from cabochon.data.rlds.recording import record  # noqa: E402


class Counter(gymnasium.Env):
    """Observations in a mapping; terminates after `end` steps; its buffer is used again."""

    observation_space = gymnasium.spaces.Dict(
        {"n": gymnasium.spaces.Box(0, 99, (1,), np.float32), "k": gymnasium.spaces.Discrete(9)}
    )
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, end: int = 4, fault: str = "") -> None:
        self.end, self.fault, self.buffer = end, fault, np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.buffer[0] = 0
        return {"n": self.buffer, "k": np.int64(1)}, {}

    def step(self, action: Any) -> Any:
        self.buffer[0] += 1
        at = self.buffer[0]
        if self.fault == "raise" and at == 2:
            raise RuntimeError("the motor is broken")
        reward = float("nan") if self.fault == "nan" and at == 2 else 0.1 * float(at)
        return {"n": self.buffer, "k": np.int64(2)}, reward, bool(at == self.end), False, {}


def test_what_cartpole_gave_is_what_is_read(tmp_path: Path) -> None:
    """500 steps are its limit: a policy that balances is cut short, one that falls is ended."""
    plain = gymnasium.make("CartPole-v1")
    env = record(gymnasium.make("CartPole-v1"), tmp_path, format="tfrecord", name="cartpole")
    wanted = []
    for seed in range(3):
        seen, rewards = [], []
        for each in (plain, env):
            observation, _ = each.reset(seed=seed)
            seen, rewards, over = [observation], [], False
            while not over:
                lean = observation[2] + (0.5 * observation[3] if seed else -observation[3])
                action = int(lean > 0)
                observation, reward, terminated, truncated, _ = each.step(action)
                seen.append(observation)
                rewards.append(reward)
                over = terminated or truncated
        wanted.append((np.array(seen), sum(rewards), terminated))
    env.close()
    episodes = Episodes(tmp_path)
    for episode, (seen, total, terminated) in zip(episodes, wanted, strict=True):
        assert episode.steps["observation"].tobytes() == seen.tobytes()
        assert episode.total_reward() == total
        assert episode.terminated == terminated
        assert json.loads(episode.metadata["environment_config"])["id"] == "CartPole-v1"
    assert [each.metadata["seed"] for each in episodes] == [0, 1, 2]
    assert len({each.metadata["episode_id"] for each in episodes}) == 3
    assert list(validate(tmp_path)) == []
    fallen = next(each for each in episodes if each.terminated)
    assert n_step(fallen, 1, gamma=0.99).discount[-1] == 0
    balanced = next(each for each in episodes if not each.terminated)
    assert balanced.transitions == 500
    assert n_step(balanced, 1, gamma=0.5).discount[-1] == 0.5


def test_an_episode_that_is_left_is_cut_short_and_its_buffers_are_copied(tmp_path: Path) -> None:
    env = record(Counter(), tmp_path, format="tfrecord", metadata={"agent_id": "a"})
    env.reset()
    env.step(2)
    env.step(1)
    env.reset()
    env.close()
    env.close()
    (episode,) = Episodes(tmp_path)
    assert episode.steps["observation"]["n"].ravel().tolist() == [0, 1, 2]
    assert episode.steps["observation"]["k"].tolist() == [1, 2, 2]
    assert episode.steps["action"].tolist() == [2, 1, 0]
    assert episode.steps["reward"].tolist() == [0.1, 0.2, 0.0]
    assert not episode.terminated
    assert episode.metadata["agent_id"] == "a"


@pytest.mark.parametrize(("fault", "kind"), [("raise", RuntimeError), ("nan", NonFinite)])
def test_an_episode_that_went_wrong_is_kept_and_marked(
    tmp_path: Path, fault: str, kind: type[Exception]
) -> None:
    env = record(Counter(fault=fault), tmp_path, format="tfrecord")
    env.reset()
    env.step(0)
    with pytest.raises(kind, match=r"(motor is broken|reward at step 1 is nan)"):
        env.step(0)
    env.close()
    assert len(Episodes(tmp_path)) == 0
    (episode,) = Episodes(tmp_path, keep_invalid=True)
    assert episode.invalid
    assert episode.transitions == 1


def test_actions_outside_of_the_space_and_steps_without_reset_are_refused(tmp_path: Path) -> None:
    with record(Counter(end=1), tmp_path, format="tfrecord") as env:
        with pytest.raises(DataError, match="no episode is under way"):
            env.step(0)
        env.reset()
        with pytest.raises(DataError, match=r"the action 3 is outside of Discrete\(3\)"):
            env.step(3)
        assert env.step(2)[2]
        with pytest.raises(DataError, match="no episode is under way"):
            env.step(0)
    assert len(Episodes(tmp_path)) == 1


def test_a_vector_of_environments_is_refused_with_the_way_to_do_it(tmp_path: Path) -> None:
    vector = gymnasium.vector.SyncVectorEnv([Counter, Counter])
    with pytest.raises(ConfigError, match="record each of them"):
        record(vector, tmp_path)
    vector.close()
