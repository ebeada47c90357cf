"""Rotary positions: pairs of channels turned by an angle that grows with the position.

Source: Su et al. 2021 (arXiv:2104.09864); the halves are paired as in the published Gemma weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cabochon.models.gemma.numerics import refuse_second_derivative

__all__ = ["rope", "rotate"]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """B T N H, each pair (i, i + H/2) rotated by its position's angle.

    Args:
        x: B T N H.
        cos: B T H/2, in the type of `x`.
        sin: B T H/2, in the type of `x`.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rotate(x, cos, sin, x.new_empty(x.shape))
    rotated: Tensor = _Rope.apply(x, cos, sin)
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """`x` with the pairs (i, i + H/2) of its last axis rotated, written into `out`.

    Args:
        x: ... H.
        cos: of each pair's angle, broadcast to ... H/2, in the type of `x`.
        sin: likewise; the negative sine rotates back.
        out: of the shape and type of `x`, not overlapping it; may be a view.
    """
    first, second = x.chunk(2, dim=-1)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin, torch.empty_like(grad)), None, None
