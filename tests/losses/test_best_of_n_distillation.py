"""What draws say of best-of-N, and the gradients of Jeffreys, against enumeration and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.best_of_n import best_of_n_logprob, divergence, log_quantiles
from cabochon.losses.best_of_n_distillation import (
    jeffreys_gains,
    learned_tilt,
    log_level_factor,
    log_quantile,
    log_tilt,
    quantile_loss,
    reference_divergence,
)

DISTINCT = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0, 4.0])
TIED = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0, 1.0])


def space(size: int, seed: int = 0) -> Tensor:
    logits = torch.randn(size, generator=Key(seed).generator(), dtype=torch.float64)
    return logits.log_softmax(-1)


def tilt_of(reference: Tensor, reward: Tensor, n: int, *, factor: bool = True) -> Tensor:
    below, at_most = log_quantiles(reference, reward)
    counted = log_level_factor(below.exp(), at_most.exp(), n) if factor else None
    return log_tilt(at_most, n, counted)


def mean_over_draws(p: float, draws: int, estimate: str) -> float:
    counts = torch.arange(draws + 1)
    found = log_quantile(counts, draws, estimate).tolist()
    return sum(
        math.comb(draws, c) * p**c * (1 - p) ** (draws - c) * found[c] for c in range(draws + 1)
    )


# --- quantiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "expected"), [(0.1, -2.246), (0.3, -1.359), (0.5, -0.693), (0.7, -0.250), (0.9, -0.028)]
)
def test_the_mean_of_j_bonds_reward_is_its_formula(p: float, expected: float) -> None:
    """Equation 17: of the four outcomes of two comparisons only "below both" counts."""
    found = mean_over_draws(p, 2, "two_draws")
    assert found == pytest.approx(-math.log(16) * (1 - p) ** 2, abs=1e-6)
    assert found == pytest.approx(expected, abs=5e-4)
    assert mean_over_draws(0.5, 2, "two_draws") == pytest.approx(math.log(0.5), abs=1e-6)


def test_below_means_strictly_below() -> None:
    """Of a deterministic anchor every draw equals its own: at most, not below; no punishment."""
    assert log_quantile(torch.tensor([2, 1, 0]), 2, "two_draws").tolist() == [
        0.0,
        0.0,
        pytest.approx(-math.log(16)),
    ]


@pytest.mark.parametrize(
    ("p", "estimate", "expected"),
    [(0.05, "floor", -2.93), (0.05, "add_one", -2.41), (0.3, "floor", -1.29),
     (0.3, "add_one", -1.19)],
)  # fmt: skip
def test_the_bias_of_each_way_to_count_zero_of_sixteen(
    p: float, estimate: str, expected: float
) -> None:
    assert mean_over_draws(p, 16, estimate) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("estimate", ["floor", "add_one"])
def test_with_ever_more_draws_every_treatment_of_zero_is_the_logarithm(estimate: str) -> None:
    for p in (0.05, 0.3, 1.0):
        assert mean_over_draws(p, 800, estimate) == pytest.approx(math.log(p), abs=0.02)


def test_counts_and_estimates_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="of 4 draws"):
        log_quantile(torch.tensor([5]), 4, "floor")
    with pytest.raises(ConfigError, match="cannot be told from 4 draws"):
        log_quantile(torch.tensor([1]), 4, "two_draws")
    with pytest.raises(ConfigError, match="must be one of"):
        log_quantile(torch.tensor([1]), 4, "median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="best of 1"):
        log_tilt(torch.zeros(1), 1)


def test_the_loss_of_a_learned_quantile_is_least_at_the_quantile() -> None:
    """One draw of the reference for each y; the expectation over draws is exact here."""
    reference = space(6)
    _, at_most = log_quantiles(reference, TIED)
    logit = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    wins = TIED[None, :] <= TIED[:, None]  # y, draw
    for _ in range(400):
        losses = quantile_loss(logit[:, None].expand(6, 6), wins)
        (slope,) = torch.autograd.grad((losses * reference.exp()).sum(), logit)
        logit = (logit - 4.0 * slope).detach().requires_grad_()
    top = TIED == 2.0
    assert bool((logit[top] > 5.0).all()), "where all draws are at most y it has no end"
    torch.testing.assert_close(logit.sigmoid()[~top], at_most.exp()[~top], atol=1e-4, rtol=0)
    shares = (wins * reference.exp()).sum(1)  # of endlessly many draws
    expected = (quantile_loss(logit[:, None].expand(6, 6), wins) * reference.exp()).sum(1)
    torch.testing.assert_close(quantile_loss(logit, shares).double(), expected)
    log_p, tilt, loss = learned_tilt(logit, shares, 4)
    torch.testing.assert_close(tilt, log_tilt(log_p, 4))
    assert not tilt.requires_grad
    assert loss.requires_grad


# --- the tilt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 9])
@pytest.mark.parametrize("reward", [DISTINCT, TIED, torch.zeros(6)])
def test_the_tilt_is_what_best_of_n_adds(reward: Tensor, n: int) -> None:
    reference = space(6)
    law = best_of_n_logprob(reference, reward, n)
    torch.testing.assert_close(
        tilt_of(reference, reward, n), law - reference, atol=1e-6, rtol=1e-6, check_dtype=False
    )


def test_without_the_factor_a_reward_of_two_values_teaches_next_to_nothing() -> None:
    """A success of 5%, n = 4: best-of-N makes it 3.7 times likelier, which is nearly all B."""
    reference = torch.tensor([0.95, 0.05], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0])
    whole, bare = (tilt_of(reference, reward, 4, factor=factor) for factor in (True, False))
    success, failure = (1 - 0.95**4) / 0.05, 0.95**4 / 0.95
    assert float(whole[1] - whole[0]) == pytest.approx(math.log(success / failure), abs=1e-6)
    assert float(bare[1] - bare[0]) == pytest.approx(3 * 0.0513, abs=1e-3)
    assert float(whole[1] - whole[0]) > 9 * float(bare[1] - bare[0])


def test_the_factor_is_n_where_nothing_is_equal_and_from_1_to_n_otherwise() -> None:
    seen = torch.tensor([0, 1, 7, 16])
    torch.testing.assert_close(log_level_factor(seen, seen, 5), torch.full((4,), math.log(5)))
    ends = log_level_factor(torch.tensor([0, 8]), torch.tensor([16, 16]), 3)
    torch.testing.assert_close(ends, torch.tensor([1.0, 1.75]).log())


@pytest.mark.parametrize("n", [2, 4])
def test_equation_15_is_the_gradient_of_the_backward_divergence(n: int) -> None:
    """With B exactly; without it the direction is nearly the same where no two are equal."""
    reference, logits = space(6), space(6, seed=3).clone().requires_grad_()
    law = best_of_n_logprob(reference, DISTINCT, n)
    logprob = logits.log_softmax(-1)
    exact = torch.autograd.grad((logprob.exp() * (logprob - law)).sum(), logits, retain_graph=True)[
        0
    ]
    found = []
    for factor in (True, False):
        gain = tilt_of(reference, DISTINCT, n, factor=factor) - (logprob - reference).detach()
        loss = -(logprob.exp().detach() * gain * logprob).sum()
        found.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
    torch.testing.assert_close(found[0], exact, atol=1e-6, rtol=1e-5)
    cosine = torch.cosine_similarity(found[1], exact, dim=0)
    assert 0.98 < float(cosine) < 1.0


def test_the_reference_divergence_is_that_of_many_different_draws() -> None:
    fine = torch.full((100_000,), -math.log(100_000), dtype=torch.float64)
    for n in (2, 4, 16):
        assert float(divergence(fine, torch.arange(100_000), n)) == pytest.approx(
            reference_divergence(n), abs=1e-3
        )


# --- Jeffreys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("within_prompt", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_expected_update_descends_what_it_says(
    beta: float, gamma: float, within_prompt: bool
) -> None:
    """All pairs of draws of the policy, and all best ones; a wrong sign of gamma would show.

    Two prompts with one sample each, or one with two, so that the baselines differ.
    """
    reference, logits = space(4), space(4, seed=3).clone().requires_grad_()
    reward = torch.tensor([0.0, 2.0, 1.0, 1.0])
    law = best_of_n_logprob(reference, reward, 2)
    tilt = tilt_of(reference, reward, 2).float()
    logprob = logits.log_softmax(-1)
    prob, ratio = logprob.detach().exp(), (logprob - reference).detach().float()
    forward = (law.exp() * (law - logprob)).sum()
    backward = (logprob.exp() * (logprob - law)).sum()
    anchored = (logprob.exp() * (logprob - reference)).sum()
    exact = (1 - beta) * forward + beta * backward + gamma * anchored
    total = torch.zeros((), dtype=torch.float64)
    shape = (1, 2) if within_prompt else (2, 1)
    for pair in itertools.product(range(4), repeat=2):
        drawn = torch.tensor(pair)
        gain = jeffreys_gains(
            tilt[drawn].view(shape), ratio[drawn].view(shape), backward=beta,
            regularisation=gamma, within_prompt=within_prompt,
        )  # fmt: skip
        own, best = gain[:, :-1].flatten(), gain[:, -1].sum()
        chance = prob[drawn].prod()
        total = total - chance * (own * logprob[drawn]).sum()
        total = total - chance * best * (law.exp() * logprob).sum()
    prompts = shape[0]
    torch.testing.assert_close(
        torch.autograd.grad(total / prompts, logits, retain_graph=True)[0],
        torch.autograd.grad(exact, logits)[0],
        atol=1e-6,
        rtol=1e-5,
    )


def test_beta_0_does_not_look_at_the_policys_samples_nor_beta_1_at_the_anchors_best() -> None:
    tilt, ratio = torch.tensor([[0.3], [-1.0]]), torch.tensor([[0.1], [torch.inf]])
    assert jeffreys_gains(tilt, ratio, backward=0.0).tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert jeffreys_gains(tilt, torch.zeros(2, 1), backward=1.0)[:, 1].tolist() == [0.0, 0.0]


def test_constants_in_tilt_and_ratio_are_baselines() -> None:
    tilt, ratio = torch.randn(5, 2), torch.randn(5, 2)
    for within_prompt in (False, True):
        found, moved = (
            jeffreys_gains(
                tilt + by, ratio - by, backward=0.7, regularisation=0.2, within_prompt=within_prompt
            )
            for by in (0.0, 3.0)
        )
        torch.testing.assert_close(found, moved, atol=1e-5, rtol=1e-5)


def test_a_sample_without_others_is_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="no others to be compared with"):
        jeffreys_gains(one, one, backward=0.5)
    with pytest.raises(ConfigError, match="1 sample of 3 prompts"):
        jeffreys_gains(torch.zeros(3, 1), torch.zeros(3, 1), backward=0.5, within_prompt=True)
    assert jeffreys_gains(one, one, backward=0.0).tolist() == [[0.0, 1.0]]
