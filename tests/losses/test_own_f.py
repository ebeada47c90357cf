"""An f of one's own gives what a built-in one gives, and a wrong one is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.core import LinearPrediction, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import linear
from cabochon.losses.f_divergences import KL, ChiSquare, FDivergence, ReverseKL, divergence
from cabochon.losses.f_softargmax import f_softargmax
from cabochon.losses.own_f import OwnF

LE_CAM = OwnF(
    name="le_cam",
    f=lambda u: (u - 1) ** 2 / (u + 1),
    slope=lambda u: 1 - 4 / (u + 1) ** 2,
    inverse=lambda v: 2 / (1 - v).sqrt() - 1,
    slope_at_zero=-3.0,
    at_zero=1.0,
    sup=1.0,
)
PAIRS: list[tuple[OwnF, FDivergence]] = [
    (OwnF(name="kl", f=lambda u: u * u.log() - u + 1, slope=torch.log, inverse=torch.exp,
          at_zero=1.0), KL()),
    (OwnF(name="reverse", f=lambda u: u - 1 - u.log(), slope=lambda u: 1 - 1 / u,
          inverse=lambda v: 1 / (1 - v), sup=1.0), ReverseKL()),
    (OwnF(name="chi", f=lambda u: (u - 1) ** 2 / 2, slope=lambda u: u - 1,
          inverse=lambda v: 1 + v, slope_at_zero=-1.0, at_zero=0.5), ChiSquare()),
]  # fmt: skip


def logits(seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(5, 11, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("own", "known"), PAIRS, ids=lambda f: f.name)
def test_it_is_the_built_in_one(own: OwnF, known: FDivergence) -> None:
    log_p, log_q = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    log_p[0, 0] = log_q[1, 1] = -math.inf
    for found, expected in zip(
        own.pointwise(log_p, log_q), known.pointwise(log_p, log_q), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(f_softargmax(own, logits(2)), f_softargmax(known, logits(2)))
    for name in ("response", "response_slope", "surplus"):
        u = torch.logspace(-2, 2, 9, dtype=torch.float64)
        torch.testing.assert_close(getattr(own, name)(u), getattr(known, name)(u))


def test_le_cam_is_the_triangular_discrimination() -> None:
    p, q = logits(0).softmax(-1), logits(1).softmax(-1)
    found = divergence(LE_CAM, logits(0), logits(1))
    torch.testing.assert_close(found, ((p - q) ** 2 / (p + q)).sum(-1))


def test_its_softargmax_is_sparse_sums_to_one_and_has_the_right_gradient() -> None:
    theta = logits(3, spread=4.0).requires_grad_()
    prob = f_softargmax(LE_CAM, theta)
    torch.testing.assert_close(prob.sum(-1), torch.ones(5, dtype=torch.float64))
    assert bool((prob == 0.0).any())
    assert torch.autograd.gradcheck(lambda t: f_softargmax(LE_CAM, t), theta)


def test_hidden_states_and_heads_take_it() -> None:
    def of(seed: int) -> LinearPrediction:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)
        head = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        return LinearPrediction(hidden=hidden, head=head)

    batch = TokenBatch.of([[1, 2, 3, 4]])
    student, teacher = of(1), of(2)
    every = [(p.hidden[0] @ p.head.T)[:3] for p in (teacher, student)]
    found = linear.divergence(student, teacher, batch, LE_CAM).total
    assert float(found) == pytest.approx(float(divergence(LE_CAM, *every).sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"f": lambda u: (u - 1) ** 2 / (u + 1) + 1}, r"f\(1\)"),
        ({"slope": lambda u: 0.5 - 2 / (u + 1) ** 2}, "derivative"),
        ({"inverse": lambda v: 2 / (1 - v) - 1}, "inverse"),
        ({"slope_at_zero": 0.0}, "slope_at_zero"),
        ({"sup": 0.5}, "sup"),
        ({"f": lambda u: -((u - 1) ** 2), "slope": lambda u: -2 * (u - 1)}, "convex"),
    ],
)
def test_what_it_claims_is_checked(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"le_cam: .*{words}"):
        replace(LE_CAM, **change)  # type: ignore[arg-type]
