"""The f-softargmax against closed forms, entmax, float64 and its own definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import f_softargmax as module
from cabochon.losses.f_divergences import (
    KL,
    Alpha,
    ChiSquare,
    FDivergence,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SquaredHellinger,
)
from cabochon.losses.f_softargmax import Measure, f_softargmax, f_softmax

ALL: list[FDivergence] = [
    KL(), ReverseKL(), SquaredHellinger(), ChiSquare(), Jeffreys(),
    JensenShannon(0.5), JensenShannon(0.1), JensenShannon(0.9), JensenShannon(0.0),
    JensenShannon(1.0), JensenShannon(0.3, "paper"),
    Alpha(-1.0), Alpha(0.0), Alpha(0.4), Alpha(0.95), Alpha(1.05), Alpha(1.25), Alpha(1.5),
    Alpha(2.0), Alpha(3.0),
]  # fmt: skip
SPARSE = [f for f in ALL if f.sparse]
every_f = pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
every_sparse = pytest.mark.parametrize("f", SPARSE, ids=lambda f: f.name)
V = 11
LARGE = 262_144


def logits_of(
    seed: int = 0,
    rows: int = 5,
    classes: int = V,
    spread: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, classes, generator=generator, dtype=dtype)


def measures(rows: int = 5, classes: int = V) -> list[Measure]:
    generator = torch.Generator().manual_seed(99)
    shared, own = torch.rand(classes, generator=generator), torch.rand(rows, classes)
    return [1.0, 1.0 / classes, shared.double() + 0.05, own.double() + 0.05]


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (KL(), lambda t: t.softmax(-1)),
        (Alpha(1.0), lambda t: t.softmax(-1)),
        (ChiSquare(), lambda t: entmax.sparsemax(t, -1)),
        (Alpha(2.0), lambda t: entmax.sparsemax(t, -1)),
        (Alpha(1.5), lambda t: entmax.entmax15(t, -1)),
        (Alpha(1.25), lambda t: entmax.entmax_bisect(t, 1.25, n_iter=80)),
        (Alpha(1.05), lambda t: entmax.entmax_bisect(t, 1.05, n_iter=80)),
        (Alpha(3.0), lambda t: entmax.entmax_bisect(t, 3.0, n_iter=80)),
        (SquaredHellinger(), lambda t: f_softargmax(Alpha(0.5), 2.0 * t)),
        (JensenShannon(0.0), lambda t: t.softmax(-1)),
        (JensenShannon(1.0), lambda t: f_softargmax(ReverseKL(), t)),
        (JensenShannon(0.3, "paper"), lambda t: f_softargmax(JensenShannon(0.3), t / 0.21)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_named_operators(f: FDivergence, expected: Callable[[Tensor], Tensor]) -> None:
    for spread, classes in ((0.1, V), (2.0, V), (3.0, 3000)):
        logits = logits_of(spread=spread, classes=classes)
        found, wanted = f_softargmax(f, logits), expected(logits)
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)
        single = f_softargmax(f, logits.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), wanted, rtol=0.0, atol=1e-6)


def test_a_prior_adjusts_the_logits_of_softmax() -> None:
    logits, prior = logits_of(), logits_of(1).softmax(-1)[0]
    found = f_softargmax(KL(), logits, measure=prior)
    torch.testing.assert_close(found, (logits + prior.log()).softmax(-1))


def test_a_uniform_measure_is_a_temperature_for_alpha() -> None:
    logits = logits_of(spread=4.0)
    for a in (0.5, 1.5, 2.0):
        found = f_softargmax(Alpha(a), logits, measure=1.0 / V)
        torch.testing.assert_close(found, f_softargmax(Alpha(a), logits * V ** (1.0 - a)))


@every_f
@pytest.mark.parametrize("spread", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("measure", [1.0, 1.0 / LARGE])
def test_float32_is_exact_at_a_large_vocabulary(
    f: FDivergence, spread: float, measure: float
) -> None:
    logits = logits_of(rows=1, classes=LARGE, spread=spread, dtype=torch.float32)
    found = f_softargmax(f, logits, measure=measure)
    assert found.min().item() >= 0.0
    assert abs(found.double().sum().item() - 1.0) < 1e-6
    exact = f_softargmax(f, logits.double(), measure=measure)
    assert (found - exact).abs().sum().item() < 2e-6  # over all classes together


@every_f
def test_it_is_the_maximum(f: FDivergence) -> None:
    logits = logits_of(2)
    for q in measures():
        for temperature in (1.0, 0.3):
            prob = f_softargmax(f, logits, measure=q, temperature=temperature)
            value = f_softmax(f, logits, measure=q, temperature=temperature)
            whole = torch.ones_like(logits) * q

            def objective(p: Tensor, whole: Tensor = whole, beta: float = temperature) -> Tensor:
                return (p * logits).sum(-1) - beta * (whole * f.f(p / whole)).sum(-1)

            torch.testing.assert_close(value, objective(prob), rtol=1e-9, atol=1e-9)
            for seed in range(20):
                other = logits_of(seed, spread=3.0).softmax(-1)
                for step in (1e-3, 0.1, 1.0):
                    moved = (1.0 - step) * prob + step * other
                    assert bool((objective(moved) <= value + 1e-10).all())


@every_f
def test_shifts_temperatures_and_permutations(f: FDivergence) -> None:
    logits = logits_of(3)
    prob, value = f_softargmax(f, logits), f_softmax(f, logits)
    torch.testing.assert_close(f_softargmax(f, logits + 7.0), prob, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(f_softmax(f, logits + 7.0), value + 7.0)
    order = torch.randperm(V)
    torch.testing.assert_close(f_softargmax(f, logits[:, order]), prob[:, order])
    torch.testing.assert_close(
        f_softargmax(f, logits / 0.7), f_softargmax(f, logits, temperature=0.7)
    )
    torch.testing.assert_close(
        f_softmax(f, logits, temperature=0.7), 0.7 * f_softmax(f, logits / 0.7)
    )
    ordered = prob.gather(-1, logits.argsort(-1))
    assert bool((ordered.diff(dim=-1) >= -1e-15).all())
    raised = logits.clone()
    raised[:, 4] += 0.5
    assert bool((f_softargmax(f, raised)[:, 4] >= prob[:, 4]).all())


@every_f
def test_first_and_second_derivatives(f: FDivergence) -> None:
    logits = logits_of(4, rows=2, classes=4, spread=1.0).requires_grad_()
    for q in (1.0, measures(2, 4)[3]):
        for operator in (f_softargmax, f_softmax):

            def call(t: Tensor, q: Measure = q, operator: Callable = operator) -> Tensor:
                return operator(f, t, measure=q, temperature=0.8)

            assert torch.autograd.gradcheck(call, logits)
            assert torch.autograd.gradgradcheck(call, logits)


@every_f
def test_the_operator_is_the_gradient_of_the_maximum(f: FDivergence) -> None:
    logits = logits_of(5).requires_grad_()
    (gradient,) = torch.autograd.grad(f_softmax(f, logits, temperature=1.7).sum(), logits)
    torch.testing.assert_close(gradient, f_softargmax(f, logits, temperature=1.7))


@every_f
def test_classes_at_minus_infinity_are_left_out(f: FDivergence) -> None:
    logits = logits_of(6)
    masked = logits.clone()
    masked[:, [0, 4]] = -math.inf
    masked[1, 7] = -math.inf
    rest = [c for c in range(V) if c not in (0, 4)]
    prob = f_softargmax(f, masked)
    assert prob[:, [0, 4]].abs().max().item() == 0.0
    assert prob[1, 7].item() == 0.0
    torch.testing.assert_close(prob[0, rest], f_softargmax(f, logits[0, rest]))
    torch.testing.assert_close(f_softmax(f, masked)[0], f_softmax(f, logits[0, rest]))
    weights = torch.ones(V, dtype=torch.float64)
    weights[[0, 4]] = 0.0
    torch.testing.assert_close(f_softargmax(f, logits, measure=weights)[0], prob[0])
    masked.requires_grad_()
    (gradient,) = torch.autograd.grad(f_softargmax(f, masked)[:, 1].sum(), masked)
    assert bool(gradient.isfinite().all())
    assert gradient[:, [0, 4]].abs().max().item() == 0.0


@every_f
def test_ties_single_classes_and_far_logits(f: FDivergence) -> None:
    torch.testing.assert_close(f_softargmax(f, torch.zeros(2, 8)), torch.full((2, 8), 1 / 8))
    assert f_softargmax(f, torch.tensor([[-3.0]])).item() == 1.0
    assert f_softargmax(f, torch.tensor([5.0, 5.0, -1e4]), measure=0.5).isfinite().all()
    pair = f_softargmax(f, torch.tensor([[2.0, 2.0, -1e4], [1e4, -1e4, 0.0]]))
    torch.testing.assert_close(pair[0, 0], pair[0, 1])
    torch.testing.assert_close(pair.sum(-1), torch.ones(2))
    assert pair[1, 0] > 0.98
    only = f_softargmax(f, torch.tensor([[-math.inf, 3.0, -math.inf]]))
    assert only.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@every_f
def test_a_row_without_a_distribution_is_refused(f: FDivergence, bad: float) -> None:
    logits = logits_of(7, rows=4)
    logits[2] = -math.inf
    logits[2, 3] = bad
    with pytest.raises(DataError, match=r"row 2 .* no distribution belongs to it"):
        f_softargmax(f, logits)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"measure": 0.0}, "positive and finite"),
        ({"measure": -1.0}, "positive and finite"),
        ({"measure": math.inf}, "positive and finite"),
        ({"measure": torch.ones(V + 1)}, "does not fit logits"),
        ({"measure": -torch.ones(V)}, "nowhere negative"),
        ({"measure": torch.zeros(V)}, "not 0 for all"),
        ({"measure": torch.full((V,), math.nan)}, "finite"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"temperature": math.nan}, "temperature must be a positive number"),
    ],
)
def test_wrong_settings_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        f_softargmax(ChiSquare(), logits_of(), **settings_)


@every_sparse
def test_few_candidates_and_all_logits_give_the_same(
    f: FDivergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of which few logits can matter, some, and all, in blocks of two rows."""
    logits = torch.cat([logits_of(8, 3, 4000, spread) for spread in (0.02, 0.3, 1.0, 5.0)])
    own = torch.rand(12, 4000, dtype=torch.float64) + 0.1
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", {"cpu": 8000, "cuda": 8000})
    for q in (1.0, own[0], own):
        found = [f_softargmax(f, logits, measure=q), f_softmax(f, logits, measure=q)]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_candidates", lambda *_: None)
            whole = [f_softargmax(f, logits, measure=q), f_softmax(f, logits, measure=q)]
        for a, b in zip(found, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_f
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3e3]),
    power=st.integers(-6, 6),
)
def test_any_row_gives_a_distribution(
    f: FDivergence, seed: int, classes: int, spread: float, power: int
) -> None:
    logits = logits_of(seed, 3, classes, spread, torch.float32)
    prob = f_softargmax(f, logits, measure=10.0**power)
    assert prob.min().item() >= 0.0
    torch.testing.assert_close(prob.double().sum(-1), torch.ones(3).double(), atol=1e-6, rtol=0)


def test_low_precision_is_computed_in_float32_and_shapes_are_kept() -> None:
    logits = logits_of(9, 6).view(2, 3, V).bfloat16().requires_grad_()
    prob = f_softargmax(Alpha(1.5), logits)
    assert (prob.dtype, prob.shape) == (torch.float32, (2, 3, V))
    torch.testing.assert_close(prob, f_softargmax(Alpha(1.5), logits.float()))
    prob[..., 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_nothing_in_nothing_out() -> None:
    for f in (KL(), Alpha(1.5), ReverseKL()):
        assert f_softargmax(f, torch.zeros(0, 4)).shape == (0, 4)
        assert f_softmax(f, torch.zeros(0, 4)).shape == (0,)
