"""What agents play is on the disk once, under its own name, also across interruptions."""

import numpy as np

from cabochon.core import Key
from cabochon.data.rlds.reader import Episodes
from cabochon.models.agents.networks import NetworkConfig, PolicyAndValue, build
from cabochon.rl.collector import Collector, Cutting
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.inference import sample
from cabochon.rl.recording import AgentRecorder
from cabochon.rl.server import ActingConfig

SPEC = EnvironmentSpec(
    name="small_environments:cabochon-tests/Counting-v0", options={"length": 4, "spread": 6}
)


def play(folder, versions, saved=None, **acting):
    """Takes of ten unrolls while `folder` records; where it is then, and the episodes played."""
    network = build(NetworkConfig(hidden=(8,)), signature_of(SPEC), PolicyAndValue, Key(0))
    with (
        AgentRecorder(folder, SPEC) as recorder,
        Collector(
            network, SPEC, sample, Key(1), acting=ActingConfig(**acting),
            cutting=Cutting(length=5, batch=10), runtime="inline", observe=recorder,
        ) as collector,
    ):  # fmt: skip
        if saved is not None:
            collector.restore(saved, versions[0])
        for version in versions:
            collector.take(10, version)
        return collector.state(), collector.episodes


def recorded(folder):
    return {
        str(each.metadata["episode_id"]): np.asarray(each.steps["action"]).tolist()
        for each in Episodes(folder)
    }


def test_every_episode_whose_beginning_was_seen_is_recorded_after_an_interruption_too(tmp_path):
    shape = {"actors": 2, "environments": 2}
    _, played = play(tmp_path / "whole", range(6), **shape)
    whole = recorded(tmp_path / "whole")
    assert len(whole) == played > 20
    saved, _ = play(tmp_path / "cut", range(3), **shape)
    before = recorded(tmp_path / "cut")
    _, again = play(tmp_path / "cut", range(3, 6), saved, **shape)
    after = recorded(tmp_path / "cut")
    assert again == played
    assert before.items() < after.items() < whole.items()
    assert played - len(after) <= 4  # those under way, one of each environment


def test_what_is_played_again_after_a_kill_is_not_recorded_again(tmp_path):
    shape = {"actors": 1, "environments": 2}
    saved, _ = play(tmp_path / "a", range(2), **shape)
    play(tmp_path / "a", range(2, 4), saved, **shape)  # its checkpoint was never written
    before = recorded(tmp_path / "a")
    play(tmp_path / "a", range(2, 5), saved, **shape)
    after = recorded(tmp_path / "a")
    assert before.items() < after.items()
    assert len(Episodes(tmp_path / "a")) == len(after)


def test_other_episodes_of_the_same_names_are_recorded_beside_the_first(tmp_path):
    """Without `inline` a run that goes on twice from one checkpoint plays otherwise each time."""
    from cabochon.rl.environment import Arrival

    def episode(recorder, length):
        for step in range(length + 1):
            last = step == length
            rest = {"ended": np.array([0]), "final_observation": np.array([[9.0]])} if last else {}
            recorder(
                Arrival(
                    ids=np.array([0]), run=np.array([7]), episode=np.array([3]),
                    observation=np.array([[float(step)]]), reward=np.array([float(step)]),
                    first=np.array([step in (0, length)]), terminated=np.array([last]),
                    truncated=np.array([False]), **rest,
                ),
                np.array([1]),
            )  # fmt: skip

    for length in (2, 3, 2):
        with AgentRecorder(tmp_path, SPEC) as recorder:
            episode(recorder, length)
    assert sorted(len(each) for each in recorded(tmp_path).values()) == [3, 4]
    assert set(recorded(tmp_path)) == {"0-7-3", "0-7-3-again_1"}
