"""What the kernels written by hand have in common: the type they compute in, and a refusal."""

from __future__ import annotations

import torch

__all__ = ["LARGEST_LOGISTIC_CAP", "refuse_second_derivative", "wide_dtype"]

LARGEST_LOGISTIC_CAP = 100.0
"""Above it a soft-cap through the logistic function would err by more than about 1e-5."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 for float64: what norms, gates and probabilities are computed in."""
    return torch.promote_types(dtype, torch.float32)


def refuse_second_derivative() -> None:
    """Does nothing in a backward pass, unless that is itself to be differentiated.

    Raises:
        NotImplementedError: it is; formulas written by hand have no second derivative.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "Gemma's kernels have no second derivative (create_graph=True was asked for)"
        )
