"""Unrolls are cut so that every transition counts once and every state fits its first step."""

from itertools import pairwise

import numpy as np
import pytest

from cabochon.core.errors import ConfigError, DataError
from cabochon.rl.environment import Arrival
from cabochon.rl.unrolls import UnrollStore, stack


def arrival(ids, time, *, run=0, first=False, cut=()):
    """Every number says of which environment and time it is."""
    ids = np.array(ids)
    truncated = np.isin(ids, cut)
    ended = np.flatnonzero(truncated)
    return Arrival(
        ids=ids,
        run=np.full(len(ids), run),
        episode=np.zeros(len(ids), np.int64),
        observation=np.stack([ids, np.broadcast_to(time, ids.shape)], 1).astype(np.float32),
        reward=np.broadcast_to(np.float32(time), ids.shape),
        first=truncated | first,
        terminated=np.zeros(len(ids), bool),
        truncated=truncated,
        ended=ended,
        final_observation=np.stack([ids[ended], np.full(len(ended), -time)], 1).astype(np.float32),
        episode_return=np.zeros(len(ended)),
        episode_length=np.zeros(len(ended), np.int64),
    )


def append(store, step):
    """Actions, values and states say the time, too."""
    time = step.observation[:, 1]
    unrolls = store.arrive(step, (time[:, None] + 1000,))
    store.choose(step.ids, time.astype(np.int64) % 7, {"value": time * 10}, 3)
    return unrolls


@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (4, 0), (4, 3), (3, 5)])
def test_every_transition_is_counted_once_and_in_order(length, overlap):
    store, found = UnrollStore(3, length=length, overlap=overlap), []
    for time in range(60):
        found += append(store, arrival([2, 0, 1], time, first=time == 0))
    for environment in range(3):
        own = [each for each in found if each.environment == environment]
        assert own[0].begins
        assert not any(each.begins for each in own[1:])
        counted = [int(t) for u in own for t in u.observation[overlap : overlap + length, 1]]
        assert counted == list(range(overlap, overlap + len(own) * length))
        assert (np.diff([u.observation[:, 1] for u in own]) == 1).all()
        for one, two in pairwise(own):
            np.testing.assert_array_equal(one.observation[length:], two.observation[: overlap + 1])
            np.testing.assert_array_equal(one.action[length:], two.action[:overlap])
        for unroll in own:
            # The state is the one from before the step that is now the unroll's first.
            assert unroll.state[0][0] == unroll.observation[0, 1] + 1000
            np.testing.assert_array_equal(unroll.previous_action[1:], unroll.action)
            np.testing.assert_array_equal(unroll.outputs["value"], unroll.observation[:-1, 1] * 10)
            assert (unroll.version == 3).all()


def test_partial_batches_change_no_environments_unrolls():
    together, apart = UnrollStore(4, length=3, overlap=1), UnrollStore(4, length=3, overlap=1)
    one, two = [], []
    draw = np.random.default_rng(0)
    for time in range(30):
        one += append(together, arrival(range(4), time))
        cut = draw.permutation(4)
        split = int(draw.integers(1, 4))
        for ids in (cut[:split], cut[split:]):
            two += append(apart, arrival(ids, time))
    key = lambda unroll: (unroll.environment, unroll.observation[0, 1])  # noqa: E731
    assert len(one) == len(two)
    for a, b in zip(sorted(one, key=key), sorted(two, key=key), strict=True):
        for name in ("observation", "action", "reward"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_new_run_drops_what_was_under_way():
    store = UnrollStore(2, length=4)
    for time in range(4):
        assert not append(store, arrival([0, 1], time))
    assert [u.environment for u in append(store, arrival([1], 4))] == [1]
    for time in range(10, 14):  # environment 0 was begun anew before it was done
        assert not append(store, arrival([0], time, run=9, first=time == 10))
    (unroll,) = append(store, arrival([0], 14, run=9))
    assert unroll.begins
    assert unroll.run == 9
    np.testing.assert_array_equal(unroll.observation[:, 1], range(10, 15))


@pytest.mark.parametrize(("length", "overlap"), [(4, 0), (4, 2)])
def test_final_observations_stand_where_the_next_episode_begins(length, overlap):
    store, found = UnrollStore(2, length=length, overlap=overlap), []
    for time in range(41):
        cut = [0] if time % 3 == 2 else []
        found += append(store, arrival([0, 1], time, cut=cut, first=time == 0))
    for unroll in found:
        cuts = np.flatnonzero(unroll.truncated)
        np.testing.assert_array_equal(unroll.final_step, cuts[cuts > 0])
        times = unroll.observation[unroll.final_step, 1]
        np.testing.assert_array_equal(unroll.final_observation[:, 1], -times)
    batch = stack(found[:4])
    for time, row, seen in zip(*batch.finals, strict=True):
        assert batch.truncated[time, row]
        assert seen[1] == -batch.observation[time, row, 1]
    assert batch.observation.shape == (overlap + length + 1, 4, 2)


def test_what_is_under_way_survives_being_saved():
    store, found = UnrollStore(3, length=3, overlap=1), {True: [], False: []}
    for time in range(8):
        append(store, arrival([0, 2], time, cut=[2] if time == 7 else []))
    saved = store.state()
    other = UnrollStore(3, length=3, overlap=1)
    other.restore(saved)
    for time in range(8, 20):
        for again, each in ((False, store), (True, other)):
            found[again] += append(each, arrival([0, 2, 1], time))
    assert len(found[True]) == len(found[False]) > 5
    for a, b in zip(found[True], found[False], strict=True):
        assert a.begins == b.begins
        for name in ("observation", "action", "final_step", "final_observation"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_array_equal(a.state[0], b.state[0])


def test_an_environment_may_stand_in_a_batch_once():
    store = UnrollStore(2, length=3)
    with pytest.raises(DataError, match="twice"):
        append(store, arrival([1, 1], 0))
    with pytest.raises(DataError, match="there are 2"):
        append(store, arrival([2], 0))
    with pytest.raises(ConfigError, match="overlap"):
        UnrollStore(2, length=3, overlap=-1)
    with pytest.raises(DataError, match="one length"):
        stack([])
