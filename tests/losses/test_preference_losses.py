"""Bradley-Terry and f-DPO: hand-derived numbers, the exact optimum, TRL's losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses.f_divergences import (
    KL,
    Alpha,
    ChiSquare,
    FDivergence,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SquaredHellinger,
    named,
)
from cabochon.losses.preference import bradley_terry, dpo, gained, preference_probability

EVERY_F: list[FDivergence] = [
    KL(), ReverseKL(), JensenShannon(0.0, "rescaled"), JensenShannon(0.3, "rescaled"),
    JensenShannon(0.5, "paper"), JensenShannon(1.0, "rescaled"), SquaredHellinger(), ChiSquare(),
    Alpha(0.5), Alpha(1.0), Alpha(1.5), Alpha(-0.5), Jeffreys(),
]  # fmt: skip


def drawn(count: int, scale: float = 1.0, name: str = "x") -> torch.Tensor:
    generator = Key(7).fold(name).generator()
    return torch.randn(count, generator=generator, dtype=torch.float64) * scale


def test_bradley_terry_by_hand() -> None:
    # sigmoid(log 3) = 3/4, so scores that differ by log 3 cost log 4/3.
    loss = bradley_terry(torch.tensor([math.log(3.0), 0.0]), torch.tensor([0.0, math.log(3.0)]))
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4.0)])
    assert bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2.0))
    centred = bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), centre=0.5)
    assert centred.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.5 * 9.0)


def test_bradley_terry_does_not_see_what_both_answers_share() -> None:
    chosen, rejected, shared = drawn(9), drawn(9, name="y"), drawn(9, 10.0, "f")
    torch.testing.assert_close(
        bradley_terry(chosen + shared, rejected + shared), bradley_terry(chosen, rejected)
    )


def test_the_gradient_is_one_minus_the_probability_and_saturates_nowhere() -> None:
    chosen = torch.tensor([0.3, -200.0, 200.0], requires_grad=True)
    loss = bradley_terry(chosen, torch.zeros(3))
    loss.sum().backward()
    assert chosen.grad is not None
    expected = preference_probability(chosen.detach(), torch.zeros(3)) - 1.0
    torch.testing.assert_close(chosen.grad, expected)
    assert bool(loss.isfinite().all())


def test_dpo_by_hand() -> None:
    # log ratios log 2 and -log 2 at strength 1/2: margin log 2, sigmoid 2/3.
    loss = dpo(torch.tensor([math.log(2.0)]), torch.tensor([-math.log(2.0)]), 0.5)
    assert loss.item() == pytest.approx(math.log(1.5))
    # f' of the reverse KL is 1 - 1/u: 1 - 1/2 and 1 - 2 differ by 3/2.
    loss = dpo(torch.tensor([math.log(2.0)]), torch.tensor([-math.log(2.0)]), 2.0, ReverseKL())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)))


@pytest.mark.parametrize("f", EVERY_F, ids=lambda f: f.name)
def test_what_is_gained_is_the_slope_of_f(f: FDivergence) -> None:
    log_ratio = drawn(40, 2.0)
    torch.testing.assert_close(gained(log_ratio, f), f.slope(log_ratio.exp()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("f", EVERY_F, ids=lambda f: f.name)
def test_ratios_of_whole_sequences_do_not_overflow_where_the_slope_does_not(f: FDivergence) -> None:
    far = torch.tensor([-50.0, -8.0, 8.0, 80.0])
    values = gained(far, f)
    assert bool(values.isfinite().all())
    assert bool((values.diff() >= 0.0).all())


def test_an_f_of_ones_own_is_asked_for_its_slope() -> None:
    class Own:
        def __getattr__(self, name: str) -> Any:
            return getattr(KL(), name)

    log_ratio = drawn(5)
    torch.testing.assert_close(gained(log_ratio, Own()), log_ratio)


@pytest.mark.parametrize("f", [KL(), ReverseKL(), JensenShannon(0.5, "rescaled"), Alpha(0.5)],
                         ids=lambda f: f.name)  # fmt: skip
def test_the_minimum_over_all_pairs_is_the_optimum_of_the_regularised_reward(
    f: FDivergence,
) -> None:
    """On four answers: the f-DPO minimiser maximises E r - strength D_f(policy, reference)."""
    reward, strength = torch.tensor([0.0, 0.4, 1.0, 1.3], dtype=torch.float64), 0.7
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    learned = _minimised(lambda logits: _dpo_over_pairs(logits, reward, reference, strength, f))
    best = _minimised(lambda logits: -_objective(logits, reward, reference, strength, f))
    torch.testing.assert_close(learned, best, rtol=1e-5, atol=1e-6)


def _dpo_over_pairs(
    logits: torch.Tensor,
    reward: torch.Tensor,
    reference: torch.Tensor,
    strength: float,
    f: FDivergence,
) -> torch.Tensor:
    """The loss expected where Bradley-Terry labels every pair."""
    log_ratio = logits.log_softmax(0) - reference.log()
    left, right = torch.combinations(torch.arange(len(reward)), 2).unbind(1)
    prefer = preference_probability(reward[left], reward[right])
    return (
        prefer * dpo(log_ratio[left], log_ratio[right], strength, f)
        + (1.0 - prefer) * dpo(log_ratio[right], log_ratio[left], strength, f)
    ).sum()


def _objective(
    logits: torch.Tensor,
    reward: torch.Tensor,
    reference: torch.Tensor,
    strength: float,
    f: FDivergence,
) -> torch.Tensor:
    policy = logits.softmax(0)
    return (policy * reward).sum() - strength * (reference * f.f(policy / reference)).sum()


def _minimised(loss: Any) -> torch.Tensor:
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="a pair has one of each"):
        bradley_terry(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ConfigError, match="above 0"):
        dpo(torch.zeros(1), torch.zeros(1), 0.0)


@pytest.mark.parametrize(
    ("theirs", "ours", "factor"),
    [
        ("reverse_kl", named("forward_kl"), 1.0),
        ("forward_kl", named("reverse_kl"), 1.0),
        ("js_divergence", named("jsd", 0.5), 0.5),  # their f is half of the rescaled one
        ("js_divergence", named("jsd_paper", 0.5), 2.0),
        ("alpha_divergence", named("alpha", 0.5), 1.0),
    ],
)
def test_losses_equal_those_of_trl_on_the_same_tensors(
    theirs: str, ours: FDivergence, factor: float
) -> None:
    """TRL's own trainer code, run on log-probabilities that a stand-in model gives."""
    pytest.importorskip("trl")
    from trl_losses import trl_bradley_terry, trl_dpo

    logps = {name: drawn(6, 8.0, name).float() for name in ("c", "r", "rc", "rr")}
    expected = trl_dpo(logps, beta=0.3, divergence=theirs, alpha=0.5)
    found = dpo(logps["c"] - logps["rc"], logps["r"] - logps["rr"], 0.3 * factor, ours)
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)
    scored = bradley_terry(logps["c"], logps["r"], centre=0.01).mean().item()
    assert scored == pytest.approx(trl_bradley_terry(logps["c"], logps["r"], centre=0.01), rel=1e-5)
