"""Coefficients of merges from lengths and angles alone: hand-derived numbers and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError, WeightsMismatch
from cabochon.weights.geometry import (
    TaskVectors,
    convex,
    ema_coefficients,
    group_of,
    slerp_coefficients,
    together,
)


def vectors(*rows: list[float]) -> TaskVectors:
    deltas = np.array(rows, dtype=np.float64)
    return TaskVectors(products=deltas @ deltas.T, elements=deltas.shape[1])


def merged(rows: list[list[float]], weights: list[float], mean: str = "recursion") -> np.ndarray:
    found = slerp_coefficients(vectors(*rows), weights, mean, "g")  # type: ignore[arg-type]
    return np.array(found) @ np.array(rows)


MEANS = ("recursion", "symmetric")


@pytest.mark.parametrize("mean", MEANS)
def test_two_vectors_at_60_degrees_by_hand(mean: str) -> None:
    """At t = 1/2: sin 30 / sin 60 = 1 / sqrt 3 of each; at 1/3: sin 40 and sin 20 over sin 60."""
    rows = [[2.0, 0.0], [2 * math.cos(math.pi / 3), 2 * math.sin(math.pi / 3)]]
    half = slerp_coefficients(vectors(*rows), [0.5, 0.5], mean, "g")
    assert half == pytest.approx([1 / math.sqrt(3)] * 2, abs=1e-12)
    third = slerp_coefficients(vectors(*rows), [2 / 3, 1 / 3], mean, "g")
    sines = [math.sin(math.radians(angle)) for angle in (40, 20, 60)]
    assert third == pytest.approx([sines[0] / sines[2], sines[1] / sines[2]], abs=1e-12)


@pytest.mark.parametrize("mean", MEANS)
def test_the_ends_are_exact_even_where_an_angle_has_no_arc(mean: str) -> None:
    for rows in ([[1.0, 0.2], [0.3, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]):
        for weights in ([1.0, 0.0], [0.0, 1.0]):
            assert slerp_coefficients(vectors(*rows), weights, mean, "g") == weights


@given(cosine=st.floats(-0.99, 0.99), t=st.floats(0, 1), length=st.floats(0.1, 10))
def test_equal_lengths_are_kept_all_the_way_and_a_chord_falls_short(
    cosine: float, t: float, length: float
) -> None:
    """WARP's lemma: the straight line has length l sqrt(1 - 2 (1 - cos) (t - t^2))."""
    rows = [[length, 0.0], [length * cosine, length * math.sqrt(1 - cosine**2)]]
    for mean in MEANS:
        assert np.linalg.norm(merged(rows, [1 - t, t], mean)) == pytest.approx(length, rel=1e-9)
    chord = (1 - t) * np.array(rows[0]) + t * np.array(rows[1])
    expected = length * math.sqrt(1 - 2 * (1 - cosine) * (t - t**2))
    assert np.linalg.norm(chord) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(t=st.floats(0, 1), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_swapping_two_models_and_their_weights_swaps_the_coefficients(
    t: float, seed: int, scale: float
) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 5))
    for mean in MEANS:
        one = slerp_coefficients(vectors(a, scale * b), [1 - t, t], mean, "g")
        two = slerp_coefficients(vectors(scale * b, a), [t, 1 - t], mean, "g")
        assert one == pytest.approx(two[::-1], abs=1e-9)


@given(t=st.floats(0, 1), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_for_two_models_the_symmetric_mean_is_the_arc(t: float, seed: int, scale: float) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 4))
    both = [slerp_coefficients(vectors(a, scale * b), [1 - t, t], mean, "g") for mean in MEANS]
    assert both[0] == pytest.approx(both[1], abs=1e-8)


def test_orthogonal_models_keep_length_1_and_the_recursion_favours_the_first() -> None:
    rows = np.eye(5).tolist()
    recursion = slerp_coefficients(vectors(*rows), [0.2] * 5, "recursion", "g")
    # by hand: the m-th enters at sin(90 degrees / m), each later one turns away by its own angle
    turns = [math.pi / 2 / m for m in range(1, 6)]
    by_hand = [math.sin(turns[m]) * math.prod(map(math.cos, turns[m + 1 :])) for m in range(5)]
    assert recursion == pytest.approx(by_hand)
    assert np.linalg.norm(recursion) == pytest.approx(1)
    symmetric = slerp_coefficients(vectors(*rows), [0.2] * 5, "symmetric", "g")
    assert symmetric == pytest.approx([1 / math.sqrt(5)] * 5)


@given(seed=st.integers(0, 50), order=st.permutations(range(4)))
def test_the_symmetric_mean_does_not_know_an_order(seed: int, order: list[int]) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((4, 6)) + 1.0
    weights = generator.dirichlet(np.ones(4))
    one = merged(rows.tolist(), weights.tolist(), "symmetric")
    two = merged(rows[list(order)].tolist(), weights[list(order)].tolist(), "symmetric")
    np.testing.assert_allclose(one, two, atol=1e-8)


@given(seed=st.integers(0, 50))
def test_at_the_symmetric_mean_the_weighted_arcs_cancel(seed: int) -> None:
    """The defining property, in the space of the vectors themselves."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((3, 5)) + 1.0
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    weights = generator.dirichlet(np.ones(3))
    centre = merged(unit.tolist(), weights.tolist(), "symmetric")
    assert np.linalg.norm(centre) == pytest.approx(1)
    arcs = unit - (unit @ centre)[:, None] * centre
    angles = np.arccos(np.clip(unit @ centre, -1, 1))
    arcs *= (angles / np.linalg.norm(arcs, axis=1))[:, None]
    np.testing.assert_allclose(weights @ arcs, 0, atol=1e-8)


@pytest.mark.parametrize("mean", MEANS)
def test_parallel_zero_and_single_numbers_go_straight(mean: str) -> None:
    weights = [0.25, 0.75]
    for rows in ([[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [1.0, 2.0 + 1e-9]]):
        assert slerp_coefficients(vectors(*rows), weights, mean, "g") == pytest.approx(weights)
    for rows in ([[0.0, 0.0], [3.0, 6.0]], [[3.0, 6.0], [0.0, 0.0]], [[0.0, 0.0]] * 2):
        assert merged(rows, weights, mean) == pytest.approx(np.array(weights) @ np.array(rows))
    assert merged([[1.0], [-4.0]], weights, mean).tolist() == [0.25 - 3.0]


@given(angle=st.floats(1e-9, 1e-2), t=st.floats(0, 1))
def test_a_small_angle_tends_to_the_straight_line(angle: float, t: float) -> None:
    rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
    found = slerp_coefficients(vectors(*rows), [1 - t, t], "recursion", "g")
    assert found == pytest.approx([1 - t, t], abs=angle**2 + 1e-12)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("rows", [[[1.0, 2.0], [-2.0, -4.0]], [[1.0, 0.0], [-1.0, 1e-7]]])
def test_opposite_directions_are_refused_with_what_to_do(mean: str, rows: list) -> None:
    with pytest.raises(WeightsMismatch, match=r"model\.layers\.3 point away.*whole model"):
        slerp_coefficients(vectors(*rows), [0.5, 0.5], mean, "model.layers.3")


def test_directions_that_cancel_have_no_symmetric_mean() -> None:
    third = [[math.cos(a), math.sin(a)] for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(WeightsMismatch, match="point away"):
        slerp_coefficients(vectors(*third), [1 / 3] * 3, "symmetric", "g")


@given(seed=st.integers(0, 200))
def test_no_coefficient_is_ever_nan(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((3, 4)) * 10.0 ** generator.integers(-150, 150, (3, 1))
    weights = generator.dirichlet(np.ones(3)).tolist()
    for mean in MEANS:
        try:
            found = slerp_coefficients(vectors(*rows.tolist()), weights, mean, "g")
        except WeightsMismatch:
            continue
        assert all(map(math.isfinite, found))


def test_the_moving_average_in_closed_form_is_its_recursion() -> None:
    values, average = [3.0, -1.0, 4.0, 1.5], 3.0
    for value in values[1:]:
        average = 0.9 * average + 0.1 * value
    coefficients = ema_coefficients(4, 0.9)
    assert np.dot(coefficients, values) == pytest.approx(average)
    assert sum(coefficients) == pytest.approx(1)
    assert ema_coefficients(3, 0.0) == [0, 0, 1]
    assert ema_coefficients(3, 1.0) == [1, 0, 0]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0, 1.0], r"sum to 2; divided by that they are 0\.5, 0\.5"),
        ([0.0, 0.0], "sum to 0"),
        ([1.5, -0.5], "at least 0"),
        ([math.nan, 1.0], "must be numbers"),
        ([math.inf, 0.0], "must be numbers"),
        ([1.0], "2 models need 2 weights"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        convex(weights, 2)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_weights_of_sum_1_are_kept(raw: list[float]) -> None:
    assume(sum(raw) > 0.01)
    weights = [each / sum(raw) for each in raw]
    assert convex(weights, len(weights)) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.12.mlp.experts.0.w1.weight", "model.layers.12"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0"),
        ("gpt_neox.layers.5.attention.rotary.inv_freq", "gpt_neox.layers.5"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_blocks_are_found_by_name_in_any_family(name: str, block: str) -> None:
    assert group_of(name, "block") == block
    assert group_of(name, "tensor") == name
    assert group_of(name, "whole") == "all"


def test_products_of_parts_are_those_of_the_whole() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10))
    whole = together([vectors(*rows[:, :4]), vectors(*rows[:, 4:])])
    np.testing.assert_allclose(whole.products, vectors(*rows).products)
    assert whole.elements == 10
    assert np.isnan(vectors([0.0, 0.0], [1.0, 0.0]).cosines[0, 1])
