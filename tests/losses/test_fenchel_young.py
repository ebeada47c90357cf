"""Fenchel-Young losses against their definition, entmax, cross-entropy and themselves in chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import entmax
import pytest
import torch
from torch import Tensor

from cabochon.core import LinearPrediction, TokenBatch, soft_cap
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import cross_entropy, fenchel_young
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
    JensenShannon(0.5), JensenShannon(0.9), JensenShannon(1.0), JensenShannon(0.3, "paper"),
    Alpha(-1.0), Alpha(0.0), Alpha(0.4), Alpha(1.25), Alpha(1.5), Alpha(3.0),
]  # fmt: skip
every_f = pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)
N, V, D = 5, 11, 4


def normal(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def one_hot(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ids, V).double()


def measures() -> list[Measure]:
    return [1.0, 1.0 / V, normal(1, V).exp(), normal(2, N, V).exp()]


LOGITS, IDS = normal(0, N, V), torch.tensor([0, 3, 10, 3, 7])
TEACHER = normal(3, N, V).softmax(-1)


@every_f
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_its_definition_and_its_gradient_p_minus_y(
    f: FDivergence, temperature: float
) -> None:
    for q in measures():
        prob = f_softargmax(f, LOGITS, measure=q, temperature=temperature)
        for target in (IDS, TEACHER):
            y = target if target.is_floating_point() else one_hot(target)
            logits = LOGITS.clone().requires_grad_()
            found = fenchel_young.loss(f, logits, target, measure=q, temperature=temperature)
            (gradient,) = torch.autograd.grad(found.sum(), logits)
            torch.testing.assert_close(gradient, prob - y, rtol=0.0, atol=1e-12)
            whole = torch.ones_like(LOGITS) * q
            distance = temperature * (whole * f.f(y / whole)).sum(-1)
            maximum = f_softmax(f, LOGITS, measure=q, temperature=temperature)
            expected = maximum + distance - (LOGITS * y).sum(-1)
            if bool(expected.isfinite().all()):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
                assert found.min().item() >= 0.0
            else:
                assert not math.isfinite(f.at_zero)


@every_f
def test_a_prediction_that_is_its_target_costs_nothing(f: FDivergence) -> None:
    for q in measures():
        prob = f_softargmax(f, LOGITS, measure=q)
        found = fenchel_young.loss(f, LOGITS, prob, measure=q)
        torch.testing.assert_close(found, torch.zeros(N).double(), rtol=0.0, atol=1e-9)


@every_f
def test_where_the_divergence_is_infinite_the_loss_is_measured_from_equal_logits(
    f: FDivergence,
) -> None:
    equal = fenchel_young.loss(f, torch.zeros(N, V).double(), IDS)
    if math.isfinite(f.at_zero):
        assert equal.min().item() > 0.0
    else:
        torch.testing.assert_close(equal, torch.zeros(N).double(), rtol=0.0, atol=1e-12)
        ahead = fenchel_young.loss(f, 3.0 * one_hot(IDS), IDS)
        assert ahead.max().item() < 0.0


def test_known_losses() -> None:
    found = fenchel_young.loss(KL(), LOGITS, IDS)
    expected = torch.nn.functional.cross_entropy(LOGITS, IDS, reduction="none")
    torch.testing.assert_close(found, expected)
    divergence = (TEACHER * (TEACHER.log() - LOGITS.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(fenchel_young.loss(KL(), LOGITS, TEACHER), divergence)
    for f, a in ((Alpha(1.25), 1.25), (Alpha(1.5), 1.5), (ChiSquare(), 2.0), (Alpha(3.0), 3.0)):
        expected = entmax.entmax_bisect_loss(LOGITS, IDS, a, n_iter=80)
        torch.testing.assert_close(fenchel_young.loss(f, LOGITS, IDS), expected)
        single = fenchel_young.loss(f, LOGITS.float(), IDS).double()
        torch.testing.assert_close(single, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("f", "margin"), [(ChiSquare(), 1.0), (Alpha(1.5), 2.0)])
def test_a_sparse_loss_is_exactly_zero_beyond_its_margin(f: FDivergence, margin: float) -> None:
    for ahead, done in ((margin + 1e-3, True), (margin - 1e-2, False)):
        logits = torch.zeros(1, 50)
        logits[0, 7] = ahead
        logits.requires_grad_()
        value = fenchel_young.loss(f, logits, torch.tensor([7]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert (value.item() == 0.0) == done
        assert (gradient.abs().max().item() == 0.0) == done


@every_f
def test_first_and_second_derivatives(f: FDivergence) -> None:
    logits = LOGITS[:2, :4].clone().requires_grad_()
    own = measures()[3]
    assert isinstance(own, Tensor)
    for target in (torch.tensor([1, 3]), normal(5, 2, 4).softmax(-1)):

        def call(t: Tensor, target: Tensor = target) -> Tensor:
            return fenchel_young.loss(f, t, target, measure=own[:2, :4], temperature=0.7)

        assert torch.autograd.gradcheck(call, logits)
        assert torch.autograd.gradgradcheck(call, logits)


@every_f
def test_float32_at_a_large_vocabulary_is_that_of_float64(f: FDivergence) -> None:
    logits = 4.0 * torch.randn(2, 65_536, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([17, 40_000])
    found = fenchel_young.loss(f, logits, ids).double()
    exact = fenchel_young.loss(f, logits.double(), ids)
    # Two large parts of the value cancel where the unit measure makes ratios of 1 / V.
    large = abs(f.slope(torch.tensor([1.0 / 65_536])).item()) if not f.sparse else 1.0
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * max(10.0, large))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1]), "do not fit logits"),
        (torch.tensor([0, 1, 2, 3, V]), "classes lie in"),
        (torch.tensor([0, 1, 2, 3, -1]), "classes lie in"),
        (torch.ones(N, V - 1), "do not fit logits"),
        (torch.ones(N, V), "does not sum to 1"),
        (2.0 * torch.eye(N, V) - torch.eye(N, V).roll(1, -1), "negative entry"),
    ],
)
def test_targets_that_cannot_be_are_refused(target: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fenchel_young.loss(Alpha(1.5), LOGITS, target)


def test_a_target_that_is_left_out_is_refused() -> None:
    masked = LOGITS.clone()
    masked[1, 3] = -math.inf
    weights = torch.ones(V)
    weights[3] = 0.0
    for f in (KL(), Alpha(1.5), ReverseKL()):
        with pytest.raises(DataError, match="target 3 of row 1 is left out"):
            fenchel_young.loss(f, masked, IDS)
        with pytest.raises(DataError, match="target 3 of row 1 is left out"):
            fenchel_young.loss(f, LOGITS, IDS, measure=weights)
        with pytest.raises(DataError, match="class that is left out"):
            fenchel_young.loss(f, masked, TEACHER)


# Hidden states and head.

B, T = 3, 7


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(V, (B, T), generator=generator)
    return TokenBatch(
        tokens=tokens,
        positions=torch.arange(T).expand(B, T),
        documents=torch.zeros(B, T, dtype=torch.int64),
        targets=tokens.roll(-1, 1),
        mask=torch.rand(B, T, generator=generator) < 0.6,
    )


def prediction(cap: float | None, temperature: float) -> LinearPrediction:
    return LinearPrediction(
        hidden=normal(6, B, T, D).requires_grad_(),
        head=normal(7, V, D, spread=1.0).requires_grad_(),
        cap=cap,
        temperature=temperature,
    )


@dataclass(frozen=True)
class Dense:
    """A prediction that is not linear."""

    all_logits: Tensor

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.all_logits.flatten(0, 1)[rows]


@every_f
@pytest.mark.parametrize(("cap", "temperature"), [(None, 1.0), (3.0, 0.7), (200.0, 1.3)])
def test_chunks_of_hidden_states_give_the_loss_of_all_logits(
    f: FDivergence, cap: float | None, temperature: float
) -> None:
    rows, model = batch(), prediction(cap, temperature)
    logits = soft_cap(model.hidden @ model.head.T, cap) / temperature
    for q in (1.0, normal(8, V).exp()):
        dense = fenchel_young.loss(f, logits[rows.mask], rows.targets[rows.mask], measure=q)
        wanted = torch.autograd.grad(dense.sum(), (model.hidden, model.head), retain_graph=True)
        for chunk in (1, 4, None):
            loss = fenchel_young.linear(model, rows, f, measure=q, chunk=chunk)
            torch.testing.assert_close(loss.total, dense.sum())
            assert loss.weight.item() == rows.mask.sum().item()
            found = torch.autograd.grad(loss.total, (model.hidden, model.head))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)
            assert found[0][~rows.mask].abs().max().item() == 0.0
        other = fenchel_young.linear(Dense(logits), rows, f, measure=q, chunk=4)
        torch.testing.assert_close(other.total, dense.sum())
        (by_hidden,) = torch.autograd.grad(other.total, model.hidden, retain_graph=True)
        torch.testing.assert_close(by_hidden, wanted[0])


def test_the_report_counts_hits_and_supports() -> None:
    rows, model = batch(), prediction(3.0, 0.7)
    logits = model.logits(slice(None)).double()[rows.mask.flatten()]
    loss = fenchel_young.linear(model, rows, Alpha(1.5))
    hits = (logits.argmax(-1) == rows.targets[rows.mask]).sum().item()
    assert loss.report["accuracy"].item() == hits
    support = (f_softargmax(Alpha(1.5), logits) > 0.0).sum().item()
    assert loss.report["support"].item() == support
    assert "support" not in fenchel_young.linear(model, rows, KL()).report


def test_kl_is_the_cross_entropy_of_the_models_own_loss() -> None:
    rows, model = batch(), prediction(3.0, 1.0)
    torch.testing.assert_close(
        fenchel_young.linear(model, rows, KL()).total, cross_entropy(model, rows).total
    )


def test_a_broken_row_makes_the_loss_nan_and_does_not_hang() -> None:
    rows = batch()
    for f in ALL:
        model = prediction(3.0, 1.0)
        with torch.no_grad():
            model.hidden[rows.mask.nonzero()[0].tolist()[0], rows.mask.nonzero()[0].tolist()[1]] = (
                math.nan
            )
        loss = fenchel_young.linear(model, rows, f)
        assert loss.total.isnan()
        assert torch.autograd.grad(loss.total, model.head)[0].isnan().any()


def test_nothing_to_learn_gives_zero() -> None:
    rows = batch()
    empty = TokenBatch(**{**vars(rows), "mask": torch.zeros_like(rows.mask)})
    model = prediction(3.0, 1.0)
    loss = fenchel_young.linear(model, empty, Alpha(1.5))
    loss.total.backward()
    assert (loss.total.item(), loss.weight.item()) == (0.0, 0.0)
    assert model.head.grad is not None
    assert model.head.grad.abs().max().item() == 0.0


def test_losses_of_configs() -> None:
    rows, model = batch(), prediction(3.0, 1.0)
    assert fenchel_young.named("cross_entropy") is cross_entropy
    found = fenchel_young.named("alpha", 1.5)(model, rows)
    torch.testing.assert_close(found.total, fenchel_young.linear(model, rows, Alpha(1.5)).total)
    with pytest.raises(ConfigError, match="cross_entropy takes no loss_parameter"):
        fenchel_young.named("cross_entropy", 1.0)
    with pytest.raises(ConfigError, match="loss_parameter: beta must lie in"):
        fenchel_young.named("jsd", 2.0)
