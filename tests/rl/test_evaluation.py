"""Whole episodes, none chosen for being short; films; folders that give the same agent back."""

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.core.errors import ConfigError, FolderError, WeightsMismatch
from cabochon.models.agents.networks import NetworkConfig, build, policy_and_value
from cabochon.rl.agent_folder import load_agent, load_into, read_acting, save_agent
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.evaluation import film, greedy, play, save_gif
from cabochon.rl.inference import sample

SPEC = EnvironmentSpec(
    name="small_environments:cabochon-tests/Counting-v0", options={"length": 4, "spread": 9}
)


def agent(spec=SPEC, **shape):
    config = NetworkConfig(**{"hidden": (8,), "lstm": 4, **shape})
    return build(config, signature_of(spec), policy_and_value(), Key(0))


@pytest.mark.parametrize("choose", [greedy, sample])
def test_each_environment_plays_one_episode_to_its_end(choose):
    played = play(agent(), SPEC, 40, Key(1), choose)
    assert len(played.returns) == len(played.lengths) == 40
    assert all(r == n * (n + 1) / 2 for r, n in zip(played.returns, played.lengths, strict=True))
    assert {4, 5, 11, 12} < set(played.lengths)  # the long ones, too
    assert play(agent(), SPEC, 40, Key(1), choose) == played
    assert played.mean == np.mean(played.returns)


def test_an_episode_without_end_is_an_error():
    endless = EnvironmentSpec(name=SPEC.name, options={"length": 10**9})
    with pytest.raises(ConfigError, match="--max-episode-steps"):
        play(agent(), endless, 1, Key(0), limit=50)
    exact = EnvironmentSpec(name=SPEC.name, options={"length": 9})
    assert play(agent(), exact, 5, Key(0), limit=9).lengths == (9,) * 5  # of each, not of all
    with pytest.raises(ConfigError, match="after 8 actions"):
        play(agent(), exact, 5, Key(0), limit=8)
    with pytest.raises(ConfigError, match="at least 1"):
        play(agent(), SPEC, 0, Key(0))


def test_what_draws_nothing_cannot_be_filmed():
    with pytest.raises(ConfigError, match="draws no pictures"):
        film(agent(), SPEC, Key(0))


def test_a_game_is_filmed_as_the_agent_sees_it(tmp_path):
    pytest.importorskip("ale_py")
    image = pytest.importorskip("PIL.Image")
    pong = EnvironmentSpec(name="ALE/Pong-v5", max_episode_steps=12, options={"num_threads": 1})
    pictures = film(agent(pong, frame_stack=4, features=16), pong, Key(0))
    assert pictures.shape == (12, 84, 84, 3)
    assert pictures.std() > 10
    save_gif(pictures, tmp_path / "film.gif")
    with image.open(tmp_path / "film.gif") as opened:
        assert opened.size == (168, 168)
        assert opened.n_frames > 1


def test_a_folder_gives_the_same_agent_back(tmp_path):
    network = agent(frame_stack=2, previous=True)
    acting = {"counts": np.arange(3)}
    save_agent(
        tmp_path / "a", network, algorithm="vtrace_agent", head={"hidden": []}, spec=SPEC,
        acting=acting,
    )  # fmt: skip
    found = load_agent(tmp_path / "a", {"vtrace_agent": policy_and_value})
    assert found.spec == SPEC
    assert found.algorithm == "vtrace_agent"
    assert play(found.network, SPEC, 5, Key(3)) == play(network, SPEC, 5, Key(3))
    np.testing.assert_array_equal(read_acting(tmp_path / "a")["counts"], np.arange(3))
    with pytest.raises(WeightsMismatch, match="another network"):
        load_into(agent(hidden=(9,)), tmp_path / "a")
    with pytest.raises(FolderError, match="expected r2d2"):
        load_agent(tmp_path / "a", {"r2d2": policy_and_value})
    with pytest.raises(FolderError, match="is not the folder of an agent"):
        load_agent(tmp_path, {})
