"""What arrives from environments: ends told apart, episodes done again, misbehaviour named."""

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.rl.environment import Arrival, EnvironmentSpec, environments, signature_of

PREFIX = "small_environments:cabochon-tests/"


def opened(name="Counting", count=2, key=0, **options):
    spec = EnvironmentSpec(name=f"{PREFIX}{name}-v0", options=options)
    return environments(spec, range(count), Key(key))


@pytest.mark.parametrize("cut", [False, True])
def test_an_end_brings_the_next_episode_and_keeps_the_last_observation(cut):
    envs = opened(length=3, cut=cut)
    begun = envs.reset(0)
    assert begun.first.all()
    assert not begun.reward.any()
    names = begun.observation[:, 0]
    for time in (1, 2):
        arrival = envs.step(np.array([1, 2]))
        assert not arrival.first.any()
        np.testing.assert_array_equal(arrival.observation[:, 1], [time, time])
        np.testing.assert_array_equal(arrival.reward, [time, time])
    arrival = envs.step(np.array([1, 2]))
    assert arrival.first.all()
    assert (arrival.truncated if cut else arrival.terminated).all()
    assert not (arrival.terminated if cut else arrival.truncated).any()
    np.testing.assert_array_equal(arrival.reward, [3, 3])  # of the episode that ended
    np.testing.assert_array_equal(arrival.observation[:, 1], [0, 0])  # the next one's first
    np.testing.assert_array_equal(arrival.final_observation[:, 1:], [[3, 1], [3, 2]])
    assert (arrival.final_observation[:, 0] == names).all()
    assert (arrival.observation[:, 0] != names).all()
    np.testing.assert_array_equal(arrival.episode_return, [6, 6])
    np.testing.assert_array_equal(arrival.episode_length, [3, 3])


def test_the_seed_of_an_episode_depends_on_environment_run_and_number_alone():
    alone, among = opened(count=1), opened(count=3)
    assert alone.reset(0).observation[0, 0] == among.reset(0).observation[0, 0]
    seen = {among.reset(run).observation[i, 0] for run in (0, 1) for i in range(3)}
    assert len(seen) == 6


def test_what_was_done_in_an_episode_can_be_done_again():
    envs, draw = opened(length=4, spread=9), np.random.default_rng(0)
    envs.reset(5)
    for _ in range(23):
        arrival = envs.step(draw.integers(0, 3, 2))
    again = opened(length=4, spread=9)
    assert again.restore(envs.history(), arrival.observation)
    for _ in range(20):
        actions = draw.integers(0, 3, 2)
        one, two = envs.step(actions), again.step(actions)
        for name in vars(one):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_an_environment_that_is_not_the_same_again_is_noticed():
    envs = opened("Forgetful")
    arrival = envs.reset(0)
    assert not opened("Forgetful").restore(envs.history(), arrival.observation)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("raise", DataError, "raised RuntimeError in step: the joystick is gone"),
        ("nan_reward", NonFinite, "gave the reward nan"),
        ("nan_observation", NonFinite, "observation that is not finite"),
        ("other_shape", DataError, "its space says"),
        ("exit", DataError, "raised SystemExit in step: 3"),
        ("four_values", DataError, "gave 4 values in step, expected 5 values"),
        ("no_reward", DataError, "gave the reward None, expected a number"),
        ("two_rewards", DataError, r"gave the reward array\(\[1., 1.\]\), expected a number"),
        ("text_reward", DataError, "gave the reward '1', expected a number"),
        ("huge_reward", NonFinite, r"gave the reward 1e\+39, no finite float32"),
        ("no_flag", DataError, "said None of the end of its episode, expected a bool"),
    ],
)
def test_misbehaviour_is_named_with_its_place(how, kind, words):
    envs = opened("Broken", how=how)
    envs.reset(4)
    for _ in range(2):
        envs.step(np.array([0, 0]))
    with pytest.raises(kind, match=words) as error:
        envs.step(np.array([0, 0]))
    assert "environment 0 (small_environments:" in str(error.value)
    assert "episode 0 of run 4" in str(error.value)


def test_what_an_environment_gives_when_it_begins_is_checked_too():
    with pytest.raises(DataError, match="gave NoneType in reset, expected 2 values"):
        opened("Broken", how="none_in_reset").reset(0)
    envs = opened("Numbered")
    envs.reset(0)
    for _ in range(2):
        envs.step(np.array([0, 0]))
    with pytest.raises(DataError, match=r"the observation 3, outside of its space Discrete\(3\)"):
        envs.step(np.array([0, 0]))


def test_an_array_that_an_environment_writes_into_again_is_kept_as_it_was():
    one, other = opened(length=2), opened("Rewriting", length=2)
    one.reset(0), other.reset(0)
    for _ in range(4):
        expected, found = one.step(np.array([1, 2])), other.step(np.array([1, 2]))
        np.testing.assert_array_equal(expected.observation, found.observation)
        np.testing.assert_array_equal(expected.final_observation, found.final_observation)


@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_outside_of_the_space_never_reaches_the_environment(action):
    envs = opened()
    envs.reset(0)
    with pytest.raises(DataError, match=f"action {action} .*outside of its action space: 0 to 2"):
        envs.step(np.array([0, action]))


def test_environments_that_cannot_be_made_or_played_say_why():
    with pytest.raises(ConfigError, match="CartPole"):
        signature_of(EnvironmentSpec(name="CartPol-v1"))
    with pytest.raises(ConfigError, match="colour"):
        signature_of(EnvironmentSpec(name="CartPole-v1", options={"colour": "red"}))
    with pytest.raises(ConfigError, match="Discrete"):
        signature_of(EnvironmentSpec(name=f"{PREFIX}Moving-v0"))
    with pytest.raises(ConfigError, match="cannot be made: there is no licence"):
        signature_of(EnvironmentSpec(name=f"{PREFIX}Unlicensed-v0"))
    with pytest.raises(ConfigError, match=r"without a number, of shape \(0,\)"):
        signature_of(EnvironmentSpec(name=f"{PREFIX}Blind-v0"))
    with pytest.raises(ConfigError, match="at least 1"):
        EnvironmentSpec(name="CartPole-v1", max_episode_steps=0)


def test_a_limit_of_steps_cuts_episodes_short():
    spec = EnvironmentSpec(name="CartPole-v1", max_episode_steps=4)
    envs = environments(spec, [0], Key(0))
    envs.reset(0)
    for time in range(4):
        arrival = envs.step(np.array([time % 2]))
    assert arrival.truncated[0]
    assert not arrival.terminated[0]


def test_arrivals_join_in_order():
    one, two = (
        opened(length=2),
        environments(
            EnvironmentSpec(name=f"{PREFIX}Counting-v0", options={"length": 1}), [2, 3], Key(0)
        ),
    )
    one.reset(0), two.reset(7)
    arrivals = [one.step(np.array([0, 1])), two.step(np.array([2, 0]))]
    joined = Arrival.joined(arrivals)
    np.testing.assert_array_equal(joined.ids, [0, 1, 2, 3])
    np.testing.assert_array_equal(joined.run, [0, 0, 7, 7])
    np.testing.assert_array_equal(joined.episode, [0, 0, 1, 1])  # those of length 1 have ended
    np.testing.assert_array_equal(joined.ended, [2, 3])
    np.testing.assert_array_equal(joined.final_observation, arrivals[1].final_observation)
    assert Arrival.joined(arrivals[:1]) is arrivals[0]
