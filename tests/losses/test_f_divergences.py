"""Every f: its calculus against itself, autograd and closed forms; its divergence's properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.core.errors import ConfigError
from cabochon.losses.f_divergences import (
    KL,
    Alpha,
    ChiSquare,
    FDivergence,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SquaredHellinger,
    divergence,
    is_kl,
    named,
)

ALL: list[FDivergence] = [
    KL(), ReverseKL(), SquaredHellinger(), ChiSquare(), Jeffreys(),
    JensenShannon(0.5), JensenShannon(0.1), JensenShannon(0.9), JensenShannon(0.0),
    JensenShannon(1.0), JensenShannon(0.3, "paper"),
    Alpha(-1.0), Alpha(0.0), Alpha(0.4), Alpha(0.95), Alpha(1.0), Alpha(1.25), Alpha(1.5),
    Alpha(2.0), Alpha(3.0),
]  # fmt: skip
every_f = pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
RATIOS = torch.logspace(-4, 4, 33, dtype=torch.float64)
EXACT = 1e-10


def logprob(seed: int, rows: int = 6, classes: int = 9, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return (spread * logits).log_softmax(-1)


@every_f
def test_f_and_its_slope_vanish_at_one(f: FDivergence) -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert f.f(one).item() == 0.0
    assert f.slope(one).item() == pytest.approx(0.0, abs=1e-15)


@every_f
def test_the_slope_is_the_derivative_of_f(f: FDivergence) -> None:
    step = 1e-5 * RATIOS
    numeric = (f.f(RATIOS + step) - f.f(RATIOS - step)) / (2 * step)
    torch.testing.assert_close(f.slope(RATIOS), numeric, rtol=1e-5, atol=1e-6)


@every_f
def test_the_conjugate_inverts_the_slope_and_meets_young_with_equality(f: FDivergence) -> None:
    near = RATIOS[8:-8]  # further out the slope of a dense f says u to fewer digits
    v = f.slope(near)
    torch.testing.assert_close(f.conjugate_slope(v), near, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(f.conjugate(v), near * v - f.f(near), rtol=1e-9, atol=1e-9)


@every_f
def test_the_conjugate_is_the_maximum(f: FDivergence) -> None:
    v = f.slope(RATIOS[8:-8])
    others = RATIOS[:, None] * v - f.f(RATIOS)[:, None]
    assert bool((others <= f.conjugate(v) + 1e-9 * (1 + v.abs())).all())


@every_f
def test_limits_are_what_the_object_says(f: FDivergence) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert f.f(zero).item() == pytest.approx(f.at_zero)
    assert f.slope(zero).item() == pytest.approx(f.slope_at_zero)
    assert f.sparse == math.isfinite(f.slope_at_zero)
    far = f.slope(torch.tensor([1e300], dtype=torch.float64)).item()
    assert far == pytest.approx(f.sup, abs=1e-4) if math.isfinite(f.sup) else far > 15.0
    if math.isfinite(f.sup):
        beyond = torch.tensor([f.sup, f.sup + 1.0], dtype=torch.float64)
        assert bool((f.conjugate_slope(beyond) > 1e12).all())
    if f.sparse:
        below = torch.tensor([f.slope_at_zero - 1.0], dtype=torch.float64)
        assert f.conjugate_slope(below).item() == 0.0
        assert f.conjugate(below).item() == pytest.approx(-f.at_zero)


@every_f
def test_a_lowered_ratio_has_the_lower_slope(f: FDivergence) -> None:
    top = torch.tensor([[0.03], [1.0], [20.0]], dtype=torch.float64)
    gap = torch.tensor([[0.0, 1e-3, 0.2, 1.0, 4.0]], dtype=torch.float64)
    found = f.lowered(top, f.warped(gap))
    expected = f.conjugate_slope(f.slope(top) - gap)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    nothing = f.lowered(top, f.warped(torch.full_like(gap, math.inf)))
    assert nothing.abs().max().item() == 0.0


@every_f
def test_the_response_is_one_over_the_second_derivative(f: FDivergence) -> None:
    u = RATIOS[8:-8].clone().requires_grad_()
    (second,) = torch.autograd.grad(f.slope(u).sum(), u)
    torch.testing.assert_close(f.response(u).detach(), 1.0 / second, rtol=1e-8, atol=0.0)
    step = 1e-6 * u.detach()
    numeric = (f.response(u + step) - f.response(u - step)) / (2 * step)
    torch.testing.assert_close(f.response_slope(u), numeric, rtol=1e-6, atol=1e-7)


@every_f
def test_the_surplus_is_the_conjugate_above_its_floor(f: FDivergence) -> None:
    u = RATIOS[8:-8]
    floor = f.at_zero if math.isfinite(f.at_zero) else 0.0
    torch.testing.assert_close(f.surplus(u), f.conjugate(f.slope(u)) + floor, rtol=1e-8, atol=1e-8)


@every_f
def test_pointwise_is_f_of_the_ratio_and_its_derivative(f: FDivergence) -> None:
    log_p, log_q = logprob(0), logprob(1)
    value, by_log_q = f.pointwise(log_p, log_q)
    ratio = (log_p - log_q).exp()
    torch.testing.assert_close(value, log_q.exp() * f.f(ratio), rtol=1e-8, atol=1e-10)
    expected = log_q.exp() * (f.f(ratio) - ratio * f.slope(ratio))
    torch.testing.assert_close(by_log_q, expected, rtol=1e-8, atol=1e-9)


@every_f
def test_pointwise_in_float32_is_that_of_float64(f: FDivergence) -> None:
    log_p, log_q = logprob(2, spread=8.0).float(), logprob(3, spread=8.0).float()
    for found, exact in zip(
        f.pointwise(log_p, log_q), f.pointwise(log_p.double(), log_q.double()), strict=True
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@every_f
def test_pointwise_is_never_nan_and_keeps_finite_limits(f: FDivergence) -> None:
    nothing, some = torch.tensor([-math.inf]), torch.tensor([math.log(0.25)])
    value, by_log_q = f.pointwise(nothing, nothing)
    assert (value.item(), by_log_q.item()) == (0.0, 0.0)
    value, by_log_q = f.pointwise(nothing, some)  # q f(0)
    assert value.item() == pytest.approx(0.25 * f.at_zero, rel=1e-5)
    assert by_log_q.item() == pytest.approx(0.25 * f.at_zero, rel=1e-5)
    value, by_log_q = f.pointwise(some, nothing)  # p times the slope at infinity
    assert value.item() == pytest.approx(0.25 * f.sup, rel=1e-5)
    assert not by_log_q.isnan().any()
    for far in (-150.0, -1e4):
        for pair in ((far, -1.0), (-1.0, far), (far, far), (far, 2 * far)):
            answer = f.pointwise(*(torch.tensor([x]) for x in pair))
            assert not torch.cat(answer).isnan().any()
            assert answer[0].item() >= 0.0


@every_f
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-4, 1e-2, 1.0, 6.0]))
def test_no_term_is_negative_and_only_equality_is_zero(
    f: FDivergence, seed: int, spread: float
) -> None:
    for dtype in (torch.float32, torch.float64):
        start = logprob(seed, spread=3.0)
        log_p = start.to(dtype)
        log_q = (start + spread * logprob(seed + 1)).log_softmax(-1).to(dtype)
        value, _ = f.pointwise(log_p, log_q)
        assert value.min().item() >= 0.0
        assert bool((value.sum(-1) > 0.0).all())
        assert f.pointwise(log_p, log_p)[0].abs().max().item() == 0.0


@every_f
def test_the_divergence_of_logits_has_the_gradient_of_finite_differences(f: FDivergence) -> None:
    p, q = (logprob(s, rows=2, classes=4).clone().requires_grad_() for s in (4, 5))
    assert torch.autograd.gradcheck(lambda a, b: divergence(f, a, b), (p, q))


@every_f
def test_the_divergence_does_not_see_a_shift_of_the_logits(f: FDivergence) -> None:
    p, q = logprob(6), logprob(7)
    torch.testing.assert_close(divergence(f, p + 3.0, q - 5.0), divergence(f, p, q))


def test_masked_classes_leave_gradients_finite() -> None:
    p, q = logprob(8).clone(), logprob(9).clone()
    p[:, 0] = q[:, 0] = -math.inf
    p.requires_grad_(), q.requires_grad_()
    for f in ALL:
        value = divergence(f, p, q)
        torch.testing.assert_close(value, divergence(f, p[:, 1:], q[:, 1:]))
        gradients = torch.autograd.grad(value.sum(), (p, q))
        assert all(bool(g.isfinite().all()) for g in gradients)


def test_the_divergences_are_the_textbook_ones() -> None:
    log_p, log_q = logprob(10), logprob(11)
    p, q = log_p.exp(), log_q.exp()
    m = 0.3 * p + 0.7 * q
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    skewed = 0.3 * (p * (log_p - m.log())).sum(-1) + 0.7 * (q * (log_q - m.log())).sum(-1)
    expected = {
        KL(): forward,
        ReverseKL(): reverse,
        Jeffreys(): forward + reverse,
        SquaredHellinger(): (p.sqrt() - q.sqrt()).square().sum(-1),
        ChiSquare(): ((p - q).square() / q).sum(-1) / 2,
        JensenShannon(0.3, "paper"): skewed,
        JensenShannon(0.3): skewed / 0.21,
        Alpha(-1.0): ((p - q).square() / p).sum(-1) / 2,
        Alpha(0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
    }
    for f, value in expected.items():
        torch.testing.assert_close(divergence(f, log_p, log_q), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [0.0, 1.0])
@pytest.mark.parametrize("family", [Alpha, JensenShannon])
def test_the_families_are_continuous_at_their_kl_limits(family: type, at: float) -> None:
    log_p, log_q = logprob(12), logprob(13)
    forward = (at == 1.0) == (family is Alpha)
    limit = divergence(KL() if forward else ReverseKL(), log_p, log_q)
    torch.testing.assert_close(divergence(family(at), log_p, log_q), limit)
    # Alpha: the divergence moves by about 1e-5 x its derivative. JSD likewise.
    beside = at + (1e-5 if at == 0.0 or family is Alpha else -1e-5)
    torch.testing.assert_close(divergence(family(beside), log_p, log_q), limit, rtol=1e-3, atol=0)
    for dtype in (torch.float32, torch.float64):  # and no cancellation on the way there
        tiny = at + (1e-9 if at == 0.0 or family is Alpha else -1e-9)
        found = divergence(family(tiny), log_p.to(dtype), log_q.to(dtype))
        torch.testing.assert_close(found.double(), limit, rtol=1e-5, atol=1e-6)


def test_the_papers_jsd_vanishes_at_its_ends_and_the_rescaled_one_does_not() -> None:
    log_p, log_q = logprob(14), logprob(15)
    for beta in (1e-6, 1 - 1e-6):
        assert divergence(JensenShannon(beta, "paper"), log_p, log_q).max().item() < 1e-4
        assert divergence(JensenShannon(beta), log_p, log_q).min().item() > 0.1


def test_names_of_configs() -> None:
    assert named("forward_kl") == KL()
    assert named("reverse_kl") == ReverseKL()
    assert named("hellinger") == SquaredHellinger()
    assert named("chi_square") == ChiSquare()
    assert named("jeffreys") == Jeffreys()
    assert named("alpha", 1.5) == Alpha(1.5)
    assert named("jsd", 0.0) == JensenShannon(0.0)
    assert named("jsd_paper", 0.5) == JensenShannon(0.5, "paper")
    assert [f.name for f in ALL if is_kl(f)] == ["forward_kl", "jsd(0)", "alpha(1)"]


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("kl", None, "no divergence is called 'kl'"),
        ("total_variation", None, "choose one of forward_kl"),
        ("jsd", None, "beta, in"),
        ("alpha", None, "a, any number"),
        ("forward_kl", 0.5, "takes no parameter"),
        ("jsd", -0.1, r"beta must lie in \[0, 1\]"),
        ("jsd", 1.1, r"beta must lie in \[0, 1\]"),
        ("jsd", math.nan, r"beta must lie in \[0, 1\]"),
        ("jsd_paper", 0.0, "forward KL there"),
        ("jsd_paper", 1.0, "reverse KL there"),
        ("alpha", math.inf, "finite"),
    ],
)
def test_wrong_names_and_parameters_are_refused(
    name: str, parameter: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        named(name, parameter)
