"""What WARP's paper proves of its averages, on numbers that can be checked (lemmas 1 to 3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cabochon.weights.interpolate import average, lerp, slerp, towards


def at_cosine(cosine: float, length: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a = torch.zeros(50, dtype=torch.float64)
    b = torch.zeros(50, dtype=torch.float64)
    a[3], b[3], b[7] = length, length * cosine, length * math.sqrt(1 - cosine**2)
    return {"w": a}, {"w": b}


@pytest.mark.parametrize(("t", "shrunk"), [(0.25, 0.8638), (0.5, 0.8134), (0.75, 0.8638)])
def test_an_arc_keeps_the_length_of_task_vectors_and_a_chord_has_that_of_lemma_2(
    t: float, shrunk: float
) -> None:
    length, cosine = 2.5, 0.323
    a, b = at_cosine(cosine, length)
    base = {"w": torch.zeros(50, dtype=torch.float64)}
    assert slerp(base, [a, b], [1 - t, t])["w"].norm().item() == pytest.approx(length)
    chord = lerp(a, b, t)["w"].norm().item() / length
    assert chord == pytest.approx(math.sqrt(1 - 2 * (1 - cosine) * (t - t * t)))
    assert chord == pytest.approx(shrunk, abs=1e-4)


def test_of_one_model_the_recursion_is_that_model() -> None:
    a, base = {"w": torch.randn(9)}, {"w": torch.randn(9)}
    for mean in ("recursion", "symmetric"):
        assert torch.equal(slerp(base, [a], mean=mean)["w"], a["w"])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_going_back_halfway_commutes_with_a_chord_and_with_an_arc(eta: float) -> None:
    """What is moved back keeps its angles, so task vectors only shrink."""
    base, a, b = ({"w": torch.randn(40, dtype=torch.float64)} for _ in range(3))
    nearer = [towards(base, each, eta) for each in (a, b)]
    for merge in (lambda models: average(models), lambda models: slerp(base, models)):
        torch.testing.assert_close(towards(base, merge([a, b]), eta)["w"], merge(nearer)["w"])


@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_of_a_mixture_is_at_most_the_mixture_of_divergences(seed: int) -> None:
    """Lemma 3, which speaks of probabilities, not of weights: why averages stay near the start."""
    generator = torch.Generator().manual_seed(seed)
    laws = torch.randn(3, 20, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    start, one, two = laws

    def kl(p: Tensor) -> float:
        return (p * (p / start).log()).sum().item()

    for share in (0.1, 0.5, 0.8):
        mixed = (1 - share) * one + share * two
        assert kl(mixed) <= (1 - share) * kl(one) + share * kl(two)
