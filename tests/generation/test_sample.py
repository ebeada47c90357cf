"""The distribution that is cut, the draw from it, and the log-probability that is reported."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core import Key
from cabochon.core.errors import ConfigError, NonFinite
from cabochon.generation.sample import (
    broken_rows,
    draw,
    greedy,
    inverse_cdf,
    keep_top_k,
    keep_top_p,
    sampled_from,
    tempered,
)

LARGEST_UNIFORM = 1.0 - 2.0**-53


def row(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def uniform(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kept(logits: torch.Tensor) -> list[int]:
    return (logits[0] > -torch.inf).nonzero().flatten().tolist()


# --- the cuts, by hand ---


def test_without_cuts_and_at_temperature_one_the_distribution_is_the_softmax():
    logits = torch.randn(5, 33)
    expected = logits.double().log_softmax(-1).float()
    torch.testing.assert_close(sampled_from(logits), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(sampled_from(logits, top_k=33), expected, atol=1e-6, rtol=0)


def test_temperature_two_takes_square_roots_of_the_probabilities():
    # sqrt(.64), sqrt(.32), sqrt(.04) = .8, .5657, .2; their sum is 1.5657
    got = sampled_from(row(0.64, 0.32, 0.04), temperature=2.0).exp()[0]
    root = [0.8, math.sqrt(0.32), 0.2]
    assert got.tolist() == pytest.approx([r / sum(root) for r in root], rel=1e-6)


def test_top_k_keeps_the_k_most_probable_and_normalises():
    got = sampled_from(row(0.1, 0.5, 0.3, 0.1), top_k=2).exp()[0]
    assert got.tolist() == pytest.approx([0.0, 0.625, 0.375, 0.0], rel=1e-6)


def test_top_k_keeps_every_token_that_ties_with_the_kth():
    assert kept(keep_top_k(torch.tensor([[1.0, 0.0, 1.0, 2.0]]), 2)) == [0, 2, 3]


def test_top_k_of_zero_or_of_the_whole_vocabulary_or_more_keeps_all():
    logits = torch.randn(2, 7)
    for k in (0, 7, 8, 10**9):
        assert torch.equal(keep_top_k(logits, k), logits)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-30, [1]),  # never empty
        (0.49, [1]),
        (0.5, [1]),  # the mass of one token reaches one half exactly
        (0.51, [1, 2]),
        (0.75, [1, 2]),
        (0.76, [0, 1, 2, 3]),  # 0 and 3 tie: reached by the first of them, kept both
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p_and_its_ties(p, expected):
    assert kept(keep_top_p(row(0.125, 0.5, 0.25, 0.125), p)) == expected


def test_top_p_sees_what_top_k_left():
    # of .4 .3 .2 .1 top-2 leaves 4/7 and 3/7; 4/7 alone reaches .55, of the whole it would not
    logits = row(0.4, 0.3, 0.2, 0.1)
    assert kept(sampled_from(logits, top_k=2, top_p=0.55)) == [0]
    assert kept(sampled_from(logits, top_p=0.55)) == [0, 1]


def test_top_p_sees_the_distribution_after_temperature():
    logits = row(0.64, 0.32, 0.04)  # at temperature 2: .511, .361, .128
    assert kept(sampled_from(logits, top_p=0.6)) == [0]
    assert kept(sampled_from(logits, top_p=0.6, temperature=2.0)) == [0, 1]


def test_a_nucleus_wider_than_the_first_look_is_found_exactly():
    logits = torch.randn(3, 5000)
    logits[1] *= 8.0  # a narrow and two wide nuclei in one batch
    for p in (0.3, 0.9, 0.999999):
        ordered, order = logits.double().softmax(-1).sort(descending=True)
        reached = (ordered.cumsum(-1) < p).sum(-1)
        for index, got in enumerate(keep_top_p(logits, p) > -torch.inf):
            expected = set(order[index, : int(reached[index]) + 1].tolist())
            assert set(got.nonzero().flatten().tolist()) == expected


@given(
    st.lists(st.integers(-30, 30), min_size=1, max_size=12),
    st.integers(0, 14),
    st.floats(0.01, 1.0),
    st.floats(0.1, 5.0),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_cuts_do_not_depend_on_the_order_of_the_vocabulary(values, k, p, temperature):
    logits = torch.tensor([values], dtype=torch.float32) / 8.0
    order = torch.from_numpy(Key(len(values)).numpy().permutation(len(values)))
    cut = {"temperature": temperature, "top_k": k, "top_p": p}
    straight = sampled_from(logits, **cut)[:, order]
    permuted = sampled_from(logits[:, order], **cut)
    torch.testing.assert_close(straight, permuted, atol=1e-6, rtol=0)
    assert permuted.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


# --- the draw ---


def test_each_token_owns_its_interval_of_the_uniform():
    logits = row(0.25, 0.5, 0.25)
    below = float(np.nextafter(0.25, 0.0))
    edges = [(0.0, 0), (below, 0), (0.25, 1), (0.5, 1), (0.75, 2), (LARGEST_UNIFORM, 2)]
    for u, token in edges:
        assert draw(logits, uniform(u)).tokens.item() == token


@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, LARGEST_UNIFORM, 1.0])
def test_a_token_of_zero_probability_is_never_drawn(u):
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]])
    assert inverse_cdf(weights, uniform(u)).item() in (1, 3)
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 4] = -3.0
    assert draw(logits, uniform(u)).tokens.item() == 4


@given(st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=40), st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_the_weights_the_drawn_token_has_some(weights, u):
    total = sum(weights)
    if total == 0.0 or not math.isfinite(total):
        return
    token = inverse_cdf(torch.tensor([weights], dtype=torch.float32), uniform(u)).item()
    assert weights[token] > 0.0


def test_the_last_token_of_a_large_uniform_vocabulary_is_reached():
    # In float32 the cumulative sum near 1 has steps of 6e-8, 1.6% of one of these tokens.
    size = 262_144
    logits = torch.zeros(3, size)
    u = uniform(LARGEST_UNIFORM, (size - 1.5) / size, 12_345.5 / size)
    assert draw(logits, u).tokens.tolist() == [size - 1, size - 2, 12_345]


def test_equal_rows_and_uniforms_give_equal_tokens_whatever_the_neighbours():
    logits, u = torch.randn(6, 101), uniform(*Key(1).numpy().random(6))
    together = draw(logits, u, temperature=0.7, top_k=50, top_p=0.9)
    for index in range(6):
        alone = draw(
            logits[index : index + 1], u[index : index + 1], temperature=0.7, top_k=50, top_p=0.9
        )
        assert alone.tokens.item() == together.tokens[index].item()
        assert alone.logprob.item() == together.logprob[index].item()


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.9},
    ],
)
def test_frequencies_follow_the_distribution_by_a_chi_square_test(cut):
    logits = torch.linspace(-2.0, 1.5, 8).repeat(40_000, 1)
    u = torch.from_numpy(Key(7).fold("chi-square").numpy().random(len(logits)))
    counts = torch.bincount(draw(logits, u, **cut).tokens, minlength=8).double()
    expected = sampled_from(logits[:1], **cut)[0].double().exp() * len(logits)
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    statistic = ((counts - expected)[alive] ** 2 / expected[alive]).sum().item()
    freedom = int(alive.sum()) - 1
    # Laurent and Massart 2000, lemma 1: P(chi2 > f + 2 sqrt(f x) + 2 x) <= exp(-x); x = 14: 8e-7.
    assert statistic < freedom + 2 * math.sqrt(freedom * 14) + 2 * 14


# --- the log-probabilities ---


@pytest.mark.parametrize(
    "cut",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 3.0, "top_k": 9}],
)
def test_reported_log_probabilities_are_those_of_the_cut_and_of_the_whole_distribution(cut):
    logits = torch.randn(64, 50) * 3.0
    drawn = draw(logits, torch.from_numpy(Key(3).numpy().random(64)), **cut)
    token = drawn.tokens.unsqueeze(-1)
    expected = sampled_from(logits, **cut).gather(-1, token).squeeze(-1)
    model = logits.double().log_softmax(-1).float().gather(-1, token).squeeze(-1)
    torch.testing.assert_close(drawn.logprob, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(drawn.model_logprob, model, atol=2e-6, rtol=0)
    assert drawn.logprob.dtype == drawn.model_logprob.dtype == torch.float32


def test_greedy_takes_the_first_of_the_largest_and_reports_the_models_log_probability():
    drawn = greedy(row(0.2, 0.4, 0.4))
    assert drawn.tokens.item() == 1
    assert drawn.logprob.item() == pytest.approx(math.log(0.4), rel=1e-6)
    assert drawn.model_logprob.item() == drawn.logprob.item()


def test_temperature_zero_is_greedy_and_a_tiny_temperature_draws_the_same_tokens():
    logits, u = torch.randn(10, 30), uniform(*Key(2).numpy().random(10))
    best = greedy(logits)
    zero = draw(logits, u, temperature=0.0)
    assert torch.equal(zero.tokens, best.tokens)
    assert torch.equal(zero.logprob, best.logprob)
    for temperature in (1e-6, 1e-40, 5e-324):
        cold = draw(logits, u, temperature=temperature)
        assert torch.equal(cold.tokens, best.tokens)
        assert (cold.logprob == 0.0).all()


def test_the_models_log_probability_of_a_hot_draw_is_finite_however_small():
    drawn = draw(torch.tensor([[0.0, -200.0]]), uniform(0.9), temperature=1e6)
    assert drawn.tokens.item() == 1
    assert drawn.logprob.item() == pytest.approx(math.log(0.5), abs=1e-3)
    assert drawn.model_logprob.item() == pytest.approx(-200.0)


def test_an_enormous_temperature_makes_every_possible_token_equally_probable():
    logits = torch.tensor([[5.0, -torch.inf, -80.0, 0.0]])
    for temperature in (1e30, 1e300):
        probability = sampled_from(logits, temperature=temperature).exp()[0]
        assert probability.tolist() == pytest.approx([1 / 3, 0.0, 1 / 3, 1 / 3])


def test_adding_a_constant_to_a_row_changes_nothing():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert torch.equal(tempered(logits, 0.25), tempered(logits + 4096.0, 0.25))


def test_bfloat16_logits_are_worked_on_in_float32():
    logits = torch.randn(4, 20).bfloat16()
    u = uniform(0.1, 0.4, 0.7, 0.99)
    half, full = draw(logits, u, temperature=0.8), draw(logits.float(), u, temperature=0.8)
    assert torch.equal(half.tokens, full.tokens)
    assert torch.equal(half.logprob, full.logprob)


# --- bad input ---


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_or_an_infinite_logit_is_refused_with_its_row(bad):
    logits = torch.zeros(4, 5)
    logits[2, 3] = bad
    for attempt in (lambda: draw(logits, torch.rand(4)), lambda: greedy(logits)):
        with pytest.raises(NonFinite, match=r"rows \[2\]"):
            attempt()
    with pytest.raises(NonFinite, match=r"rows \[2\]"):
        sampled_from(logits)
    assert broken_rows(logits) == [2]


def test_a_row_without_any_finite_logit_is_refused_and_one_with_some_is_not():
    logits = torch.full((2, 5), -torch.inf)
    logits[0, 1] = 0.0
    with pytest.raises(NonFinite, match=r"rows \[1\]"):
        draw(logits, torch.rand(2))
    assert draw(logits[:1], uniform(0.3)).logprob.item() == 0.0


@pytest.mark.parametrize(
    ("cut", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(cut, word):
    with pytest.raises(ConfigError, match=word):
        draw(torch.zeros(1, 4), uniform(0.5), **cut)


# --- long rows are searched by blocks ---


@pytest.mark.parametrize("size", [1024, 1025, 1151, 4096])
def test_a_long_row_is_searched_as_a_short_one_is(size):
    generator = Key(size).generator()
    weights = torch.rand(64, size, generator=generator)
    weights[torch.rand(64, size, generator=generator) < 0.9] = 0.0
    weights[:, 0] = weights[:, 200:500] = weights[:, -1] = 0.0
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    uniforms[:3] = uniform(0.0, 1.0, LARGEST_UNIFORM)
    tokens = inverse_cdf(weights, uniforms)
    cumulative = weights.double().cumsum(-1)
    threshold = uniforms * cumulative[:, -1]
    rows = torch.arange(64)
    assert (weights[rows, tokens] > 0.0).all()
    # Block sums are float32: a threshold may fall on the other side by as much.
    slack = 1e-5 * cumulative[:, -1]
    assert (cumulative[rows, tokens] + slack >= threshold).all()
    assert (cumulative[rows, tokens] - weights[rows, tokens] - slack <= threshold).all()
    # Nearly always it is the very token that a plain search finds.
    plain = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    assert (tokens[3:] == plain[3:]).float().mean() > 0.95


@pytest.mark.parametrize("size", [1024, 1300])
def test_greedy_takes_the_first_of_equals_in_a_long_row_and_refuses_nan(size):
    logits = torch.randn(5, size, generator=Key(0).generator())
    logits[0, [77, 400, 1000]] = 9.0
    logits[1, [1020, 1021]] = 9.0
    taken = greedy(logits)
    assert taken.tokens[:2].tolist() == [77, 1020]
    assert torch.equal(logits[2:].argmax(-1), taken.tokens[2:])
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(taken.logprob, expected, atol=1e-6, rtol=0)
    logits[3, 700] = torch.nan
    with pytest.raises(NonFinite, match=r"rows \[3\]"):
        greedy(logits)
