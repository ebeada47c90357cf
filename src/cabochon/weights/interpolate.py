"""Averages and arcs between models: pure functions on named tensors.

Sums are taken in float64 and rounded once, into the type of the first model's tensors: a model
averaged with itself is itself, the order of the models does not matter, and an end is returned bit
for bit. Tensors that are no floating-point numbers (counters, masks) must be equal in all models.
The same on folders that need not fit into memory: `cabochon.weights.folders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cabochon.core.errors import NonFinite, WeightsMismatch
from cabochon.weights.geometry import (
    Mean,
    Per,
    TaskVectors,
    convex,
    fraction,
    group_of,
    grouped,
    slerp_coefficients,
)

__all__ = ["average", "lerp", "slerp", "task_vectors", "towards"]

Weights = Mapping[str, Tensor]


def average(models: Sequence[Weights], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """sum of w_m theta_m, the mean where no weights are given.

    Args:
        models: the same names and shapes.
        weights: one for each, at least 0, of sum 1.

    Returns:
        New tensors in the types of the first model.

    Raises:
        ConfigError: the weights are no such weights.
        WeightsMismatch: names or shapes differ, or a tensor that cannot be averaged.
        NonFinite: a tensor holds NaN or an infinity.

    Source: WARM, Rame et al. 2024, arXiv:2401.12187 (the mean); rewarded soups, LERP (weights).
    """
    coefficients = convex(weights, len(models))
    _check(models)
    return {name: _sum(name, models, coefficients) for name in models[0]}


def lerp(start: Weights, end: Weights, t: float) -> dict[str, Tensor]:
    """(1 - t) start + t end, t in [0, 1]; as `average` otherwise."""
    fraction(t, "t")
    return average([start, end], [1.0 - t, t])


def towards(start: Weights, model: Weights, eta: float) -> dict[str, Tensor]:
    """(1 - eta) start + eta model: LITI, linear interpolation towards the initialisation.

    eta = 1 is the model (much reward, far from the start), 0 the start; WARP's next iteration
    begins at eta = 0.3.

    Source: Rame et al. 2024 (WARP), arXiv:2406.16768, section 3.3. As `lerp` otherwise.
    """
    fraction(eta, "eta")
    return average([start, model], [1.0 - eta, eta])


def slerp(
    base: Weights,
    models: Sequence[Weights],
    weights: Sequence[float] | None = None,
    *,
    per: Per = "block",
    mean: Mean = "recursion",
) -> dict[str, Tensor]:
    """base + the spherical interpolation of the models' task vectors, theta_m - base.

    On the weights themselves an arc is nearly its chord, for models of one origin are nearly
    parallel; their task vectors are not.

    Args:
        base: what the models were trained from.
        models: the same names and shapes.
        weights: one for each, at least 0, of sum 1; of two models the second's is t.
        per: what has one angle.
        mean: how more than two models combine, see `slerp_coefficients`.

    Returns:
        New tensors in the types of the first model.

    Raises:
        ConfigError: the weights are no such weights.
        WeightsMismatch: names or shapes differ, or task vectors are opposite.
        NonFinite: a tensor holds NaN or an infinity.

    Source: Rame et al. 2024 (WARP), arXiv:2406.16768, section 3.2.
    """
    shares = convex(weights, len(models))
    _check([*models, base])
    groups = _groups([*models, base], per)
    found = {
        group: slerp_coefficients(vectors, shares, mean, group)
        for group, vectors in grouped(_products(base, models), groups).items()
    }
    result = {}
    for name in models[0]:
        taken = found.get(groups[name], shares)
        result[name] = _sum(name, [*models, base], [*taken, 1.0 - sum(taken)])
    return result


def task_vectors(
    base: Weights, models: Sequence[Weights], per: Per = "block"
) -> dict[str, TaskVectors]:
    """Lengths and cosines of the models' task vectors, group by group.

    Raises:
        WeightsMismatch: names or shapes differ.
        NonFinite: a tensor holds NaN or an infinity.
    """
    _check([*models, base])
    return grouped(_products(base, models), _groups([*models, base], per))


@torch.no_grad()
def _sum(name: str, models: Sequence[Weights], coefficients: Sequence[float]) -> Tensor:
    first = models[0][name]
    if not first.is_floating_point():
        if any(not torch.equal(first, model[name]) for model in models[1:]):
            raise WeightsMismatch(
                f"{name} is of type {first.dtype} and differs between the models; only "
                "floating-point tensors can be merged, others must be equal"
            )
        return first.clone()
    result: Tensor | None = None
    for model, coefficient in zip(models, coefficients, strict=True):
        if coefficient:  # an end stays as it is, signs of zeros included
            term = coefficient * model[name].double()
            result = term if result is None else result.add_(term)
    assert result is not None
    rounded = result.to(first.dtype)
    if not rounded.isfinite().all():
        raise NonFinite(
            f"{name} of the merge is not finite: a model holds NaN or an infinity there, or the "
            f"result is too large for {first.dtype}"
        )
    return rounded


@torch.no_grad()
def _products(base: Weights, models: Sequence[Weights]) -> dict[str, TaskVectors]:
    """Of every floating-point tensor; of those that share memory in all models, the first."""
    copies = _shared([*models, base])
    result = {}
    for name, origin in base.items():
        if not origin.is_floating_point() or name in copies:
            continue
        deltas = [(model[name].double() - origin.double()).flatten() for model in models]
        products = torch.stack([torch.stack([a @ b for b in deltas]) for a in deltas])
        if not products.isfinite().all():
            raise NonFinite(f"{name} holds NaN or an infinity in a model or in the base")
        result[name] = TaskVectors(
            products=products.cpu().numpy().astype(np.float64), elements=origin.numel()
        )
    return result


def _groups(models: Sequence[Weights], per: Per) -> dict[str, str]:
    copies = _shared(models)
    return {name: group_of(copies.get(name, name), per) for name in models[0]}


def _shared(models: Sequence[Weights]) -> dict[str, str]:
    """Names of tensors that are another's memory in every model, as tied embeddings are."""
    seen: dict[tuple[object, ...], str] = {}
    copies = {}
    for name in models[0]:
        place = tuple(
            (model[name].data_ptr(), model[name].shape, model[name].stride()) for model in models
        )
        if models[0][name].numel() and place in seen:
            copies[name] = seen[place]
        seen.setdefault(place, name)
    return copies


def _check(models: Sequence[Weights]) -> None:
    first = models[0]
    for model in models[1:]:
        if model.keys() != first.keys():
            odd = sorted(model.keys() ^ first.keys())
            raise WeightsMismatch(f"models must have the same names; only some have {odd[:5]}")
        for name, tensor in model.items():
            if tensor.shape != first[name].shape:
                raise WeightsMismatch(
                    f"{name} has shape {tuple(tensor.shape)} in one model and "
                    f"{tuple(first[name].shape)} in another"
                )
