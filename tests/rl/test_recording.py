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
