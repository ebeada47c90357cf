"""Exponential moving average of named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError, WeightsMismatch

__all__ = ["ema"]


@torch.no_grad()
def ema(
    average: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    decay: float,
    *,
    out: Mapping[str, Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """decay * average + (1 - decay) * weights, tensor by tensor, in float32.

    Written as average + (1 - decay) (weights - average), so that averaging weights with themselves
    changes nothing.

    Args:
        average: the average so far; begin with the weights themselves.
        weights: the same names and shapes, of any floating type.
        decay: in [0, 1]; 0 is the weights, 1 the old average.
        out: float32 tensors of those names and shapes that take the result, `average` itself for
            one; new tensors when absent.

    Raises:
        ConfigError: `decay` is outside [0, 1].
        WeightsMismatch: names or shapes differ.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"decay must lie in [0, 1], got {decay}")
    if average.keys() != weights.keys():
        odd = sorted(average.keys() ^ weights.keys())
        raise WeightsMismatch(f"average and weights must have the same names; only one has {odd}")
    for name, tensor in weights.items():
        if tensor.shape != average[name].shape:
            raise WeightsMismatch(
                f"{name} has shape {tuple(tensor.shape)} in the weights "
                f"and {tuple(average[name].shape)} in the average"
            )
    result = {}
    for name, tensor in weights.items():
        target = None if out is None else out[name]
        result[name] = torch.lerp(average[name].float(), tensor.float(), 1.0 - decay, out=target)
    return result if out is None else out
