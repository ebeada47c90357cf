"""The formulas of merges: the coefficient that each model has in a group of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cabochon.weights.geometry import (
    Mean,
    Per,
    TaskVectors,
    convex,
    ema_coefficients,
    fraction,
    slerp_coefficients,
)

__all__ = ["Formula", "averaged", "ema", "slerp", "towards"]


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What a merge computes: theta = (1 - sum of c_m) theta_base + sum of c_m theta_m.

    Without a base the coefficients sum to 1.
    """

    method: str
    text: str
    """For a reader of the record."""
    settings: Mapping[str, object]
    per: Per | None
    """What has one angle; None where the coefficients need none."""
    coefficients: Callable[[str, TaskVectors | None], list[float]]
    """Of the models, in a group of tensors with these task vectors."""


def averaged(count: int, weights: Sequence[float] | None = None) -> Formula:
    """sum of w_m theta_m.

    Raises:
        ConfigError: the weights are not as `convex` wants them.
    """
    shares = convex(weights, count)
    return Formula(
        method="average",
        text="theta = sum of w_m theta_m",
        settings={"weights": shares},
        per=None,
        coefficients=lambda _group, _vectors: shares,
    )


def ema(count: int, decay: float) -> Formula:
    """The moving average of successive weights: a_0 = theta_0, a_i = d a_(i-1) + (1 - d) theta_i.

    Raises:
        ConfigError: the decay is outside [0, 1].
    """
    shares = ema_coefficients(count, decay)
    return Formula(
        method="ema",
        text="a_0 = theta_0, a_i = d a_(i-1) + (1 - d) theta_i; theta is the last a",
        settings={"decay": decay},
        per=None,
        coefficients=lambda _group, _vectors: shares,
    )


def towards(eta: float) -> Formula:
    """(1 - eta) theta_start + eta theta: LITI. The start takes the place of the base.

    Raises:
        ConfigError: eta is outside [0, 1].
    """
    fraction(eta, "eta")
    return Formula(
        method="towards",
        text="theta = (1 - eta) theta_base + eta theta_1",
        settings={"eta": eta},
        per=None,
        coefficients=lambda _group, _vectors: [eta],
    )


def slerp(
    count: int, weights: Sequence[float] | None = None, *, per: Per = "block",
    mean: Mean = "recursion",
) -> Formula:  # fmt: skip
    """theta_base + the spherical interpolation of task vectors, see `slerp_coefficients`.

    Raises:
        ConfigError: the weights are not as `convex` wants them.
    """
    shares = convex(weights, count)

    def coefficients(group: str, vectors: TaskVectors | None) -> list[float]:
        assert vectors is not None
        return slerp_coefficients(vectors, shares, mean, group)

    return Formula(
        method="slerp",
        text={
            "recursion": "theta = theta_base + delta_M; delta_1 = theta_1 - theta_base, delta_m = "
            "slerp(delta_(m-1), theta_m - theta_base, t = w_m / (w_1 + ... + w_m)); "
            "slerp(a, b, t) = sin((1 - t) Om) / sin Om a + sin(t Om) / sin Om b, Om the angle of a "
            "and b",
            "symmetric": "theta = theta_base + sum of c_m (theta_m - theta_base); sum of c_m u_m "
            "is the weighted Frechet mean, on the sphere, of the task vectors' directions u_m",
        }[mean],
        settings={"weights": shares, "per": per, "mean": mean},
        per=per,
        coefficients=coefficients,
    )
