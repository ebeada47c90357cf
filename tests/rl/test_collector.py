"""Unrolls for a learner: exact lags inline, bounded lags elsewhere, the same after a restart."""

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError
from cabochon.models.agents.networks import NetworkConfig, PolicyAndValue, build
from cabochon.rl.collector import Collector, Cutting
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.inference import sample
from cabochon.rl.server import ActingConfig

ACTING = ActingConfig(actors=2, environments=2)


def collector(runtime="inline", name="Counting", acting=ACTING, notice=None, observe=None, **cut):
    options = {"length": 6, "spread": 5} if name == "Counting" else {}
    spec = EnvironmentSpec(name=f"small_environments:cabochon-tests/{name}-v0", options=options)
    config = NetworkConfig(hidden=(8,), lstm=4)
    network = build(config, signature_of(spec), PolicyAndValue, Key(0))
    cutting = Cutting(**{"length": 4, "batch": 4, **cut})
    return Collector(
        network, spec, sample, Key(1), acting=acting, cutting=cutting, runtime=runtime,
        notice=notice, observe=observe,
    )  # fmt: skip


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_inline_every_unroll_is_exactly_so_many_updates_old(lag):
    with collector(lag=lag) as unrolls:
        for version in range(8):
            versions = {int(v) for u in unrolls.take(4, version) for v in u.version}
            assert versions == {max(0, version - lag)}
            assert unrolls.report()["lag"] == min(lag, version)


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize("length", [4, 7])
def test_inline_no_unroll_is_older_than_it_may_be(length, max_lag):
    acting = ActingConfig(actors=4, environments=4)  # more than are taken: the rest grows old
    with collector(acting=acting, length=length, max_lag=max_lag) as unrolls:
        taken = 0
        for version in range(12):
            taken += len(unrolls.take(4, version))
            assert max(unrolls.lags) <= max_lag
        told = unrolls.report()
        complete = told["frames"] // (16 * length) * 16
        assert told["dropped"] > 0
        assert taken + told["dropped"] + len(unrolls.waiting) in {complete - 16, complete}


@pytest.mark.parametrize("runtime", ["threads", "processes"])
def test_elsewhere_no_unroll_is_older_than_it_may_be(runtime):
    with collector(runtime, max_lag=1) as unrolls:
        for version in range(20):
            for unroll in unrolls.take(4, version):
                assert version - unroll.version[0] <= 1
            assert unrolls.report()["lag_max"] <= 1
        assert unrolls.report()["frames"] >= 20 * 16


@pytest.mark.parametrize("cut", [{"lag": 1}, {"batch": 3, "max_lag": 1}])
def test_inline_it_is_the_same_after_every_interruption(cut):
    saved, broken = None, []
    with collector(**cut) as unrolls:
        straight = [(unrolls.take(4, version), unrolls.report()) for version in range(12)]
    for version in range(12):  # another process for every update
        with collector(**cut) as unrolls:
            if saved is not None:
                unrolls.restore(saved, version)
            broken.append((unrolls.take(4, version), unrolls.report()))
            saved = unrolls.state()
    for (ours, said), (theirs, told) in zip(straight, broken, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            for name in ("observation", "action", "reward", "first", "version"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
            np.testing.assert_array_equal(one.outputs["logits"], two.outputs["logits"])
            for part, again in zip(one.state, two.state, strict=True):
                np.testing.assert_array_equal(part, again)
        for name in ("frames", "episodes", "lag", "return", "dropped"):
            assert said.get(name) == told.get(name)


def test_elsewhere_counts_go_on_and_episodes_begin_anew():
    with collector("threads") as unrolls:
        unrolls.take(8, 0)
        saved = unrolls.state()
    with collector("threads") as again:
        again.restore(saved, 5)
        taken = again.take(4, 5)
        assert all(unroll.run >= 5_000_000 for unroll in taken)
        assert again.report()["frames"] > saved["counts"][0]


def test_environments_that_cannot_be_brought_back_are_told_of():
    told = []
    with collector(name="Forgetful") as unrolls:
        unrolls.take(4, 0)
        saved = unrolls.state()
    with collector(name="Forgetful", notice=told.append) as again:
        again.restore(saved, 1)
        again.take(4, 1)
    assert "2 actors begin their environments anew" in told[0]


@pytest.mark.parametrize("runtime", ["inline", "threads"])
def test_what_ends_the_acting_ends_the_learning_too(runtime):
    acting = ActingConfig(actors=1, environments=1, replacements=0)
    with (
        collector(runtime, name="Broken", acting=acting) as unrolls,
        pytest.raises(DataError, match="the joystick is gone"),
    ):
        unrolls.take(1, 0)


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="--max-lag"):
        collector("threads", lag=2)
