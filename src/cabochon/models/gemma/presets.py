"""Gemma shapes by name: the five published ones, and small ones of the same make.

Source: Gemma report table 1, Gemma 2 report table 1. The small ones are ours.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from cabochon.core.errors import ConfigError
from cabochon.models.gemma.config import GemmaConfig

__all__ = ["PRESETS", "preset"]

_GEMMA_2B = GemmaConfig(
    vocab_size=256000,
    width=2048,
    layers=18,
    heads=8,
    kv_heads=1,
    head_width=256,
    ffn_width=16384,
    query_scalar=256,
    window=None,
    attention_cap=None,
    final_cap=None,
    post_norms=False,
)
_GEMMA2_2B = GemmaConfig(
    vocab_size=256000,
    width=2304,
    layers=26,
    heads=8,
    kv_heads=4,
    head_width=256,
    ffn_width=9216,
    query_scalar=256,
    window=4096,
    attention_cap=50.0,
    final_cap=30.0,
    post_norms=True,
)


def _small(
    vocab_size: int, width: int, layers: int, heads: int, head_width: int, context: int
) -> GemmaConfig:
    """A Gemma 2 with two query heads a key head, FFN of four widths and a window of a quarter."""
    return replace(
        _GEMMA2_2B,
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        head_width=head_width,
        ffn_width=4 * width,
        query_scalar=head_width,
        window=context // 4,
        context=context,
    )


PRESETS: dict[str, GemmaConfig] = {
    "gemma-2b": _GEMMA_2B,
    "gemma-7b": replace(_GEMMA_2B, width=3072, layers=28, heads=16, kv_heads=16, ffn_width=24576),
    "gemma2-2b": _GEMMA2_2B,
    "gemma2-9b": replace(_GEMMA2_2B, width=3584, layers=42, heads=16, kv_heads=8, ffn_width=14336),
    "gemma2-27b": replace(
        _GEMMA2_2B,
        width=4608,
        layers=46,
        heads=32,
        kv_heads=16,
        head_width=128,
        ffn_width=36864,
        query_scalar=144,
    ),
    "gemma2-nano": _small(2048, 64, 2, 2, 32, 256),
    "gemma2-micro": _small(4096, 128, 4, 4, 32, 512),
    "gemma2-mini": _small(8192, 256, 4, 4, 64, 1024),
    "gemma2-small": _small(32768, 512, 12, 8, 64, 2048),
    "gemma2-medium": _small(32768, 1024, 16, 8, 128, 4096),
    "gemma-nano": replace(
        _GEMMA_2B,
        vocab_size=2048,
        width=64,
        layers=2,
        heads=2,
        head_width=32,
        ffn_width=256,
        query_scalar=32,
        context=256,
    ),
}
"""Every preset by name; `dataclasses.replace` makes any other size."""


def preset(name: str) -> GemmaConfig:
    """The shape called `name`.

    Raises:
        ConfigError: there is none of that name; the nearest is suggested.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ConfigError(f"no preset {name!r}; nearest: {near[0]}; all: {', '.join(PRESETS)}")
