"""The task of memory is what its page says it is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from cabochon.core.errors import ConfigError
from cabochon.rl.cue_recall import CueRecall
from cabochon.rl.environment import EnvironmentSpec, signature_of


def played(env: CueRecall, answer: int, seed: int) -> tuple[list[list[float]], list[float]]:
    seen, _ = env.reset(seed=seed)
    sights, rewards, over = [seen.tolist()], [], False
    while not over:
        seen, reward, over, cut, _ = env.step(answer)
        assert not cut
        sights.append(seen.tolist())
        rewards.append(reward)
    return sights, rewards


def test_the_cue_is_shown_first_asked_for_last_and_nothing_lies_between() -> None:
    env = CueRecall(cues=4, delay=3)
    for seed in range(12):
        sights, _ = played(env, 0, seed)
        cue = int(np.argmax(sights[0][:4]))
        assert sights[0] == [float(i == cue) for i in range(4)] + [0.0]
        assert sights[1:4] == [[0.0] * 5] * 3
        assert sights[4] == [0.0] * 4 + [1.0]
        for answer in range(4):
            _, rewards = played(env, answer, seed)
            assert rewards == [0.0] * 4 + [float(answer == cue)]


def test_every_cue_comes_as_often_so_that_one_answer_is_right_once_in_so_many_times() -> None:
    env = CueRecall(cues=3, delay=0)
    right = np.mean([played(env, 1, seed)[1][-1] for seed in range(3000)])
    assert right == pytest.approx(1 / 3, abs=0.03)


def test_gymnasium_takes_it_for_an_environment() -> None:
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on spaces, that they could be wider
        check_env(CueRecall(), skip_render_check=True)
    seen = signature_of(EnvironmentSpec(name="cabochon.rl.cue_recall:CueRecall-v0"))
    assert (seen.shape, seen.actions) == ((4,), 3)


@pytest.mark.parametrize("wrong", [{"cues": 1}, {"delay": -1}])
def test_what_cannot_be_asked_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="CueRecall needs"):
        CueRecall(**wrong)
