"""Fronts by hand: areas that a pencil gives, and nothing beyond what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError, DataError
from cabochon.evaluation.pareto import (
    Point,
    dominated,
    hypervolume,
    mean_reward,
    undominated,
    value_at_kl,
)


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(kl=kl, reward=reward) for kl, reward in pairs]


STAIRS = points((1, 1), (2, 3), (4, 4))


def test_a_point_is_dominated_by_one_that_is_nowhere_worse() -> None:
    found = dominated(points((1, 1), (2, 1), (2, 3), (3, 2), (1, 1), (0.5, 0.5)))
    assert found == [False, True, False, True, False, False]
    kept = undominated(points((2, 3), (3, 2), (1, 1), (2, 1)))
    assert [(each.kl, each.reward) for each in kept] == [(1, 1), (2, 3)]


def test_between_points_a_front_is_straight_and_at_them_it_is_them() -> None:
    assert value_at_kl(STAIRS, 1) == 1
    assert value_at_kl(STAIRS, 2) == 3
    assert value_at_kl(STAIRS, 1.5) == 2
    assert value_at_kl(STAIRS, 3.5) == pytest.approx(3.75)
    assert value_at_kl(points((3, 2), (1, 0)), 2) == 1  # in any order
    assert value_at_kl(points((1, 0), (1, 5), (3, 5)), 1) == 5  # the best of one KL


@pytest.mark.parametrize("kl", [0.999, 4.001, -1.0, float("nan"), float("inf")])
def test_beyond_its_ends_a_front_says_nothing(kl: float) -> None:
    with pytest.raises(ConfigError, match="from KL 1 to 4 and says nothing"):
        value_at_kl(STAIRS, kl)


def test_no_front_and_no_number_are_refused() -> None:
    with pytest.raises(DataError, match="at least one point"):
        value_at_kl([], 1.0)
    with pytest.raises(DataError, match=r"finite KL and reward, got nan and 1\.0 of run 3"):
        Point(kl=float("nan"), reward=1.0, label="run 3")


def test_the_hypervolume_of_stairs_is_the_sum_of_their_stripes() -> None:
    """Reference (5, 0): stripes of height 1, 2, 1 and widths 4, 3, 1."""
    assert hypervolume(STAIRS, kl=5, reward=0) == 4 * 1 + 3 * 2 + 1 * 1
    assert hypervolume(STAIRS[:1], kl=5, reward=0) == 4
    assert hypervolume([], kl=5, reward=0) == 0
    # A reference of reward 2 cuts the lowest step off and half of the second.
    assert hypervolume(STAIRS, kl=5, reward=2) == 3 * 1 + 1 * 1
    # One of KL 3 leaves the third out.
    assert hypervolume(STAIRS, kl=3, reward=0) == 2 * 1 + 1 * 2
    assert hypervolume(points((6, 9), (1, -1)), kl=5, reward=0) == 0


def test_points_that_are_dominated_or_twice_there_add_nothing() -> None:
    more = [*STAIRS, *points((3, 2), (4, 4), (2, 3))]
    assert hypervolume(more, kl=5, reward=0) == hypervolume(STAIRS, kl=5, reward=0)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8),
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_the_hypervolume_counts_the_cells_that_some_point_is_as_good_as(
    pairs: list[tuple[int, int]], another: tuple[int, int]
) -> None:
    """On a grid of unit cells the area is a count; a further point never lessens it."""
    cells = sum(
        any(kl <= x and reward >= y + 1 for kl, reward in pairs) for x in range(8) for y in range(8)
    )
    assert hypervolume(points(*pairs), kl=8, reward=0) == cells
    assert hypervolume(points(*pairs, another), kl=8, reward=0) >= cells


def test_the_mean_over_a_stretch_is_that_of_the_trapezes() -> None:
    """1 to 2: mean 2 over 1 nat; 2 to 4: mean 3.5 over 2 nats."""
    assert mean_reward(STAIRS, low=1, high=4) == pytest.approx((2 * 1 + 3.5 * 2) / 3)
    assert mean_reward(STAIRS, low=1.5, high=2) == pytest.approx(2.5)
    assert mean_reward(points((0, 2), (9, 2)), low=3, high=7) == pytest.approx(2)
    with pytest.raises(ConfigError, match="says nothing about 0"):
        mean_reward(STAIRS, low=0, high=2)
    with pytest.raises(ConfigError, match="low below high"):
        mean_reward(STAIRS, low=2, high=2)
