"""The replay draws in proportion to priorities, forgets the oldest, and lies in its arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.rl.replay import Replay, SumTree, inserts_before, replay_bytes

SPEC: Any = {"observation": ((3, 2), np.uint8), "state": ((), np.float32)}


def items(first: int, count: int) -> dict[str, np.ndarray]:
    numbers = np.arange(first, first + count)
    return {
        "observation": np.broadcast_to(numbers[:, None, None], (count, 3, 2)).astype(np.uint8),
        "state": numbers.astype(np.float32),
    }


def filled(priorities: list[float], capacity: int = 8, exponent: float = 0.9) -> Replay:
    replay = Replay(SPEC, capacity, exponent)
    for number, priority in enumerate(priorities):
        replay.insert(items(number, 1), np.array([priority]))
    return replay


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0.0, 1e6)), max_size=40))
def test_every_inner_sum_is_that_of_the_leaves_below_it(changes: list[tuple[int, float]]) -> None:
    tree, plain = SumTree(13), np.zeros(13)
    for leaf, mass in changes:
        tree.put(np.array([leaf]), np.array([mass]))
        plain[leaf] = mass
    np.testing.assert_array_equal(tree.masses(np.arange(13)), plain)
    assert tree.total == pytest.approx(plain.sum(), rel=1e-14)
    assert tree.nodes[2] == pytest.approx(plain[:8].sum(), rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=17),
    st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=20),
)
def test_a_place_is_found_in_the_leaf_whose_mass_covers_it(
    masses: list[float], shares: list[float]
) -> None:
    plain = np.array(masses)
    if plain.sum() == 0.0:
        return
    tree = SumTree(len(plain))
    tree.put(np.arange(len(plain)), plain)
    places = np.array(shares) * tree.total
    found = tree.find(places)
    assert (plain[found] > 0.0).all()
    ends = plain.cumsum()
    slack = 1e-12 * ends[-1]
    assert (places <= ends[found] + slack).all()
    assert (places >= ends[found] - plain[found] - slack).all()


def test_many_leaves_at_once_are_the_same_as_one_after_another() -> None:
    draw = Key(0).fold("leaves").numpy()
    one, many = SumTree(1000), SumTree(1000)
    leaves, masses = draw.permutation(1000)[:300], draw.random(300)
    for leaf, mass in zip(leaves, masses, strict=True):
        one.put(np.array([leaf]), np.array([mass]))
    many.put(leaves, masses)
    np.testing.assert_array_equal(one.nodes, many.nodes)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.9, 1.0])
def test_items_are_drawn_in_proportion_to_their_priorities(exponent: float) -> None:
    priorities = np.array([0.1, 5.0, 1.0, 1.0, 0.4, 20.0, 3.0])
    replay = filled(priorities.tolist(), exponent=exponent)
    drawn = replay.draw(20_000, Key(1).fold("draws").numpy())
    chance = priorities**exponent / (priorities**exponent).sum()
    np.testing.assert_allclose(drawn.probabilities, chance[drawn.numbers], rtol=1e-12)
    counts = np.bincount(drawn.numbers, minlength=7)
    chi_square = ((counts - 20_000 * chance) ** 2 / (20_000 * chance)).sum()
    assert chi_square < 22.46  # the 0.999 quantile with 6 degrees of freedom
    assert drawn.items["state"].tolist() == drawn.numbers.tolist()


def test_an_item_without_priority_is_never_drawn_unless_priorities_do_not_count() -> None:
    replay = filled([0.0, 1.0, 0.0, 2.0])
    assert set(replay.draw(500, Key(2).numpy()).numbers) == {1, 3}
    flat = filled([0.0, 1.0, 0.0, 2.0], exponent=0.0)
    assert set(flat.draw(500, Key(2).numpy()).numbers) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="all 0"):
        filled([0.0, 0.0]).draw(1, Key(2).numpy())
    with pytest.raises(DataError, match="replay of 0 items"):
        Replay(SPEC, 4).draw(1, Key(2).numpy())


def test_the_oldest_make_room_and_late_priorities_never_hit_their_successors() -> None:
    replay = filled([1.0] * 11, capacity=4)
    assert (len(replay), replay.inserted) == (4, 11)
    drawn = replay.draw(400, Key(3).numpy())
    assert set(drawn.numbers) == {7, 8, 9, 10}
    assert drawn.items["observation"][:, 0, 0].tolist() == drawn.numbers.tolist()
    gone_and_here = np.array([3, 6, 7, 10])  # 3 shared a slot with 7, 6 with 10
    assert replay.prioritise(gone_and_here, np.array([99.0, 99.0, 0.0, 0.0])) == 2
    assert set(replay.draw(400, Key(4).numpy()).numbers) == {8, 9}
    with pytest.raises(DataError, match="of 11"):
        replay.prioritise(np.array([11]), np.ones(1))


def test_several_items_may_come_at_once_and_wrap_around() -> None:
    replay = Replay(SPEC, 5)
    replay.insert(items(0, 3), np.ones(3))
    replay.insert(items(3, 4), np.ones(4))
    drawn = replay.draw(300, Key(5).numpy())
    assert set(drawn.numbers) == {2, 3, 4, 5, 6}
    assert drawn.items["state"].tolist() == drawn.numbers.tolist()
    with pytest.raises(DataError, match="do not fit"):
        replay.insert(items(7, 6), np.ones(6))


def test_what_is_drawn_stays_what_it_was() -> None:
    replay = filled([1.0])
    drawn = replay.draw(1, Key(6).numpy())
    for number in range(1, 9):
        replay.insert(items(number, 1), np.ones(1))
    assert drawn.items["state"].tolist() == [0.0]


def test_a_replay_is_its_arrays() -> None:
    replay, other = filled([1.0, 4.0, 2.0] * 5, capacity=6), Replay(SPEC, 6)
    saved = {name: tensor.clone() for name, tensor in replay.state.items()}
    for name, tensor in other.state.items():
        tensor.copy_(saved[name])
    for number in range(15, 18):
        for one in (replay, other):
            one.insert(items(number, 1), np.array([3.0]))
            one.prioritise(np.array([number - 2]), np.array([0.5]))
    mine, theirs = (one.draw(50, Key(7).numpy()) for one in (replay, other))
    np.testing.assert_array_equal(mine.numbers, theirs.numbers)
    np.testing.assert_array_equal(mine.items["observation"], theirs.items["observation"])


@pytest.mark.parametrize("priority", [np.nan, np.inf, -1.0])
def test_priorities_that_are_none_are_refused_before_anything_changes(priority: float) -> None:
    replay = filled([1.0, 2.0])
    before = {name: tensor.clone() for name, tensor in replay.state.items()}
    with pytest.raises(NonFinite, match="at least 0"):
        replay.insert(items(2, 2), np.array([1.0, priority]))
    with pytest.raises(NonFinite, match="at least 0"):
        replay.prioritise(np.array([0, 1]), np.array([1.0, priority]))
    assert all(bool((before[name] == now).all()) for name, now in replay.state.items())


def test_items_of_another_form_are_refused_by_the_name_of_their_field() -> None:
    replay = Replay(SPEC, 4)
    with pytest.raises(DataError, match=r"'state' is float64"):
        replay.insert(items(0, 1) | {"state": np.zeros(1)}, np.ones(1))
    with pytest.raises(DataError, match=r"'observation' is uint8 of shape \(1, 2, 2\)"):
        replay.insert(items(0, 1) | {"observation": np.zeros((1, 2, 2), np.uint8)}, np.ones(1))
    with pytest.raises(DataError, match=r"fields \['state'\]"):
        replay.insert({"state": np.zeros(1, np.float32)}, np.ones(1))
    for capacity, exponent in ((0, 0.9), (4, -1.0), (4, np.nan)):
        with pytest.raises(ConfigError, match="capacity"):
            Replay(SPEC, capacity, exponent)


@pytest.mark.parametrize(("batch", "ratio"), [(64, 1.5), (32, 0.75), (16, 4.0), (8, 100.0)])
def test_the_replay_ratio_is_exact_in_the_long_run(batch: int, ratio: float) -> None:
    updates = 3000
    inserted = inserts_before(updates, batch=batch, ratio=ratio, minimum=50) - 50
    assert updates * batch / ratio - 1 < inserted <= updates * batch / ratio
    steps = [inserts_before(u, batch=batch, ratio=ratio, minimum=50) for u in range(100)]
    assert steps[0] == 50
    gaps = np.diff(steps)
    assert set(gaps) <= {int(batch / ratio), int(batch / ratio) + 1}


def test_the_memory_is_told_beforehand() -> None:
    replay = Replay(SPEC, 100)
    held = sum(tensor.numel() * tensor.element_size() for tensor in replay.state.values())
    assert replay_bytes(SPEC, 100) == held - 8  # the counter
