"""Atari games are environments like others, by their names. Needs ale-py."""

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.rl.environment import EnvironmentSpec, environments, signature_of

pytest.importorskip("ale_py")

PONG = EnvironmentSpec(name="ALE/Pong-v5", max_episode_steps=30, options={"num_threads": 1})


def test_pong_is_seen_in_grey_bytes():
    signature = signature_of(PONG)
    assert signature.shape == (84, 84)
    assert signature.is_picture
    assert signature.actions == 6


def test_a_game_is_cut_short_begun_from_its_seed_and_done_again():
    draw = np.random.default_rng(0)
    one, two = environments(PONG, range(3), Key(1)), environments(PONG, range(3), Key(1))
    np.testing.assert_array_equal(one.reset(0).observation, two.reset(0).observation)
    ended = 0
    for _ in range(45):
        arrival = one.step(draw.integers(0, 6, 3))
        ended += len(arrival.ended)
        assert not arrival.terminated.any()
    assert ended >= 3
    assert two.restore(one.history(), arrival.observation)
    for _ in range(10):
        actions = draw.integers(0, 6, 3)
        ours, theirs = one.step(actions), two.step(actions)
        for name in vars(ours):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    one.close()
    two.close()


def test_names_and_options_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="Pongg"):
        signature_of(EnvironmentSpec(name="ALE/Pongg-v5"))
    with pytest.raises(ConfigError, match="colour"):
        signature_of(EnvironmentSpec(name="ALE/Pong-v5", options={"colour": 1}))
