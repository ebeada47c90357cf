"""The arithmetic of a Gemma block, with backward passes written by hand: norm and gated unit.

Attention and rotation have files of their own and are offered here too.

What the backward pass needs is kept as small as it can be: a normalised or gated activation is
made again from its input, which costs far less than the memory. Elementwise work happens in
float32 on blocks of rows that stay in the processor's cache, in buffers that are used again.

Source: Gemma 2 report section 2; Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020 (GeGLU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from cabochon.models.gemma.attention import (
    attention,
    attention_cached,
    rotated_attention,
)
from cabochon.models.gemma.numerics import refuse_second_derivative, wide_dtype
from cabochon.models.gemma.rotation import rope
from cabochon.models.gemma.visibility import Visibility

__all__ = [
    "Visibility",
    "attention",
    "attention_cached",
    "geglu",
    "geglu_linear",
    "norm_linear",
    "rms_norm",
    "rope",
    "rotated_attention",
]

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Activations worked on at once; a few blocks of this many float32 fit in a CPU's cache."""
_PRODUCT_ELEMENTS = {"cpu": 2**20, "cuda": 2**62}
"""Gated activations multiplied at once: all of them would be the largest tensor of a block, and
allocating and freeing it beside tensors that stay tears holes into the heap."""

# gelu(x) = x s(x (a + b x^2)) with the logistic function s, as 1 + tanh(u) = 2 s(2 u).
_GELU_A = 2.0 * math.sqrt(2.0 / math.pi)
_GELU_B = 0.044715 * _GELU_A


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis, in float32; type of `x`.

    Args:
        x: ... D.
        weight: D; 0 scales by 1.
        eps: added to the mean square.
    """
    normed: Tensor = _RmsNorm.apply(x, weight, eps)
    return normed


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) @ weight.T, of which only `x` is kept for the backward pass.

    Args:
        x: ... D.
        norm: D, the weight of the norm.
        weight: E D.
        eps: of the norm.
    """
    product: Tensor = _NormLinear.apply(x, norm, weight, eps)
    return product


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, where the last axis holds the gate, then as much of up (tanh GELU).

    Args:
        gate_up: ... 2F.
    """
    if not _differentiated(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gelu(gate, approximate="tanh").mul_(up)
    gated: Tensor = _Geglu.apply(gate_up)
    return gated


def geglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """geglu(gate_up) @ weight.T, of which only `gate_up` is kept for the backward pass.

    Args:
        gate_up: ... 2F.
        weight: D F.
    """
    product: Tensor = _GegluLinear.apply(gate_up, weight)
    return product


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = _normalised(flat, weight, eps)
        ctx.save_for_backward(flat, weight, inverse)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        flat, weight, inverse = ctx.saved_tensors
        by_x, by_weight = _norm_gradients(grad.reshape(flat.shape), flat, weight, inverse)
        return by_x.view(grad.shape), by_weight, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = _normalised(flat, norm, eps)
        ctx.save_for_backward(flat, norm, weight, inverse)
        return (normed @ weight.T).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        flat, norm, weight, inverse = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        by_weight = None
        if ctx.needs_input_grad[2]:
            by_weight = flat_grad.T @ _rescaled(flat, norm, inverse)
        by_x, by_norm = None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            by_x, by_norm = _norm_gradients(flat_grad @ weight, flat, norm, inverse)
            by_x = by_x.view(*grad.shape[:-1], flat.shape[1])
        return by_x, by_norm, by_weight, None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        ctx.save_for_backward(flat)
        return _gated(flat).view(*gate_up.shape[:-1], flat.shape[1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative()
        (flat,) = ctx.saved_tensors
        by_gate_up = _gated_gradients(grad.reshape(-1, grad.shape[-1]), flat, None)
        return by_gate_up.view(*grad.shape[:-1], flat.shape[1])


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        ctx.save_for_backward(flat, weight)
        product = flat.new_empty(len(flat), len(weight))
        for block in _blocks(flat, weight.shape[1], _PRODUCT_ELEMENTS):
            torch.mm(_gated(flat[block]), weight.T, out=product[block])
        return product.view(*gate_up.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        flat, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        gated = flat_grad @ weight  # as yet their gradient, which they replace block by block
        by_gate_up = _gated_gradients(gated, flat, gated)
        by_weight = flat_grad.T @ gated if ctx.needs_input_grad[1] else None
        return by_gate_up.view(*grad.shape[:-1], flat.shape[1]), by_weight


def _differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _normalised(flat: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed in the type of `flat`, 1 / root mean square in float32, n 1)."""
    normed = torch.empty_like(flat)
    inverse = flat.new_empty(len(flat), 1, dtype=wide_dtype(flat.dtype))
    scale = _scale(weight)
    (buffer,) = _buffers(flat, flat.shape[1], 1)
    for block in _blocks(flat, flat.shape[1], _BLOCK_ELEMENTS):
        x, over = _widened(flat[block], buffer), inverse[block]
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=over)
        over.square_().div_(flat.shape[1]).add_(eps).rsqrt_()
        _scaled(x, over, scale, normed[block])
    return normed, inverse


def _rescaled(flat: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    normed = torch.empty_like(flat)
    scale = _scale(weight)
    (buffer,) = _buffers(flat, flat.shape[1], 1)
    for block in _blocks(flat, flat.shape[1], _BLOCK_ELEMENTS):
        _scaled(_widened(flat[block], buffer), inverse[block], scale, normed[block])
    return normed


def _scaled(x: Tensor, over: Tensor, scale: Tensor, out: Tensor) -> None:
    """X * over * scale into `out`; `x` is used up where `out` is of another type."""
    if out.dtype == x.dtype:
        torch.mul(x, over, out=out).mul_(scale)
    else:
        out.copy_(x.mul_(over).mul_(scale))


def _norm_gradients(
    grad: Tensor, flat: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by the norm's input and by its weight."""
    by_x = torch.empty_like(flat)
    scale = _scale(weight)
    by_weight = torch.zeros_like(scale)
    buffers = _buffers(flat, flat.shape[1], 3)
    for block in _blocks(flat, flat.shape[1], _BLOCK_ELEMENTS):
        unit, by_unit, product = (buffer[: block.stop - block.start] for buffer in buffers)
        over = inverse[block]
        torch.mul(_widened(flat[block], unit), over, out=unit)
        by_unit = _widened(grad[block], by_unit)
        torch.mul(by_unit, unit, out=product)
        by_weight += product.sum(0)
        along = torch.mv(product, scale).div_(-flat.shape[1]).unsqueeze_(-1)
        torch.addcmul(unit.mul_(along), by_unit, scale, out=product)
        _multiplied(product, over, by_x[block])
    return by_x, by_weight.to(weight.dtype)


def _scale(weight: Tensor) -> Tensor:
    return weight.to(wide_dtype(weight.dtype)) + 1.0


def _gated(flat: Tensor) -> Tensor:
    """n F: gelu(gate) * up."""
    rows, width = flat.shape[0], flat.shape[1] // 2
    gated = flat.new_empty(rows, width)
    a = torch.full((), _GELU_A, dtype=wide_dtype(flat.dtype), device=flat.device)
    x, s = _buffers(flat, width, 2)
    for block in _blocks(flat, width, _BLOCK_ELEMENTS):
        gate, slope = _widened(flat[block, :width], x), s[: block.stop - block.start]
        torch.addcmul(a, gate, gate, value=_GELU_B, out=slope).mul_(gate).sigmoid_().mul_(gate)
        _multiplied(slope, _widened(flat[block, width:], x), gated[block])
    return gated


def _gated_gradients(grad: Tensor, flat: Tensor, gated: Tensor | None) -> Tensor:
    """Gradient by gate and up (n 2F); the activations themselves into `gated` where it is given."""
    width = grad.shape[1]
    by_gate_up = torch.empty_like(flat)
    a = torch.full((), _GELU_A, dtype=wide_dtype(flat.dtype), device=flat.device)
    buffers = _buffers(flat, width, 5)
    for block in _blocks(flat, width, _BLOCK_ELEMENTS):
        parts = flat[block, :width], flat[block, width:], grad[block]
        x, up, by_gated = map(_widened, parts, buffers)
        s, slope = (buffer[: block.stop - block.start] for buffer in buffers[3:])
        torch.addcmul(a, x, x, value=_GELU_B, out=s).mul_(x).sigmoid_()
        torch.addcmul(a, x, x, value=3.0 * _GELU_B, out=slope).mul_(x)
        torch.ops.aten.sigmoid_backward.grad_input(slope, s, grad_input=slope).add_(s)
        gelu = s.mul_(x)
        _multiplied(slope.mul_(up), by_gated, by_gate_up[block, :width])
        _multiplied(by_gated, gelu, by_gate_up[block, width:])
        if gated is not None:  # last: it may lie where `grad` does
            _multiplied(gelu, up, gated[block])
    return by_gate_up


def _multiplied(one: Tensor, other: Tensor, out: Tensor) -> None:
    """One * other into `out`; `one` is used up where `out` is of another type."""
    if out.dtype == one.dtype:
        torch.mul(one, other, out=out)
    else:
        out.copy_(one.mul_(other))


def _widened(part: Tensor, buffer: Tensor) -> Tensor:
    """`part` in the type of a buffer of at least its rows: itself, or copied there."""
    return part if part.dtype == buffer.dtype else buffer[: len(part)].copy_(part)


def _buffers(flat: Tensor, width: int, count: int) -> tuple[Tensor, ...]:
    """Memory for a block of `flat`, `count` times, in the type that is computed in."""
    rows = min(len(flat), _block_rows(flat, width, _BLOCK_ELEMENTS))
    return flat.new_empty(count, rows, width, dtype=wide_dtype(flat.dtype)).unbind()


def _blocks(flat: Tensor, width: int, elements: dict[str, int]) -> Iterator[slice]:
    step = _block_rows(flat, width, elements)
    for start in range(0, len(flat), step):
        yield slice(start, min(start + step, len(flat)))


def _block_rows(flat: Tensor, width: int, elements: dict[str, int]) -> int:
    return max(1, elements["cuda" if flat.is_cuda else "cpu"] // width)
