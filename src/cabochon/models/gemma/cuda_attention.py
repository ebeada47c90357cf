"""Attention on CUDA: flex_attention with a soft-cap, the fused kernel without one.

Source: Dong et al. 2024 (arXiv:2412.05496) for score and mask functions over blocks.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cabochon.core.types import soft_cap
from cabochon.models.gemma.numerics import wide_dtype
from cabochon.models.gemma.visibility import Visibility

__all__ = ["NARROWEST_FLEX_HEAD", "cuda_attention", "flex_parts", "plain_attention"]

NARROWEST_FLEX_HEAD = 16


def cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """B T N H, by the best kernel there is for these shapes and types.

    Args:
        q: B T N H.
        k: B T K H.
        v: B T K H.
        visibility: what each query sees.
        scale: multiplies the scores, before the cap.
        cap: soft-cap of the scores, before the mask.
    """
    if cap is None:
        # Keys are repeated because the fused kernels that take a mask take no grouped heads.
        keys, values = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
        fused = scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=visibility.visible()[:, None], scale=scale
        )
        return fused.transpose(1, 2)
    flex = _compiled_flex() if _flex_takes(q) else None
    if flex is None:
        return plain_attention(q, k, v, visibility, scale=scale, cap=cap)
    score, blocks = flex_parts(visibility, cap)
    mixed: Tensor = flex(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        score_mod=score, block_mask=blocks, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return mixed.transpose(1, 2)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float, cap: float | None
) -> Tensor:
    """B T N H: the same in a few lines that hold every score at once, for autograd."""
    keys, values = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    scores = (q.transpose(1, 2) @ keys.mT).to(wide_dtype(q.dtype)) * scale
    scores = soft_cap(scores, cap).masked_fill(~visibility.visible()[:, None], float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ values).transpose(1, 2)


def flex_parts(visibility: Visibility, cap: float) -> tuple[Any, Any]:
    """The score function and the block mask that tell flex_attention what to do."""
    if visibility.blocks is None:
        visibility.blocks = _block_mask(visibility)
    return _capped(cap), visibility.blocks


@lru_cache(maxsize=16)
def _capped(cap: float) -> Any:
    """One function a cap, so that a compiled kernel meets the same one again."""

    def score(raw: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return cap * torch.tanh(raw / cap)

    return score


def _block_mask(visibility: Visibility) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    documents, positions = visibility.documents, visibility.positions
    rows, length = visibility.shape
    window = length if visibility.window is None else visibility.window

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        distance = positions[row, query] - positions[row, key]
        same = documents[row, query] == documents[row, key]
        return same & (distance >= 0) & (distance < window)

    return create_block_mask(seen, rows, None, length, length, device=documents.device)


def _flex_takes(q: Tensor) -> bool:
    wide_enough = q.shape[-1] >= NARROWEST_FLEX_HEAD
    return wide_enough and q.dtype in {torch.float32, torch.bfloat16, torch.float16}


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    """flex_attention compiled, without which it holds every score; None where triton is missing."""
    if find_spec("triton") is None:
        return None
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """B N T H from B T K H."""
    return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)
