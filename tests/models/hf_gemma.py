"""Gemmas made by transformers with random weights: the oracle, and folders to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch

SHAPES: dict[str, dict[str, Any]] = {
    "gemma2, some key heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2, one key head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma2, as many key heads as heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "gemma2, no window": {"layer_types": ["full_attention"] * 3},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2, other base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "gemma, one key head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gemma, as many key heads as heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
}
"""Heads times head width is never the width, the scalar never the head width."""


def hf_gemma(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small eager model whose every weight, norms included, is drawn at random."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

    second = name.startswith("gemma2")
    values: dict[str, Any] = {
        "vocab_size": 120,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    if second:
        # Small caps, so that they bend scores and logits as much as a large model's do.
        values |= {
            "query_pre_attn_scalar": 7, "sliding_window": 6,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
        }  # fmt: skip
    values |= SHAPES[name]
    config = (Gemma2Config if second else GemmaConfig)(**values)
    model = (Gemma2ForCausalLM if second else GemmaForCausalLM)(config).eval()
    generator = Key(5).fold(name).generator()
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5))
    return model.to(dtype)


def hf_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """The same, saved into `folder` by transformers."""
    model = hf_gemma(name, dtype)
    model.save_pretrained(folder, **save)
    return model


def random_rows(*lengths: int, vocab: int = 120) -> list[Tensor]:
    generator = Key(3).fold("rows", *lengths).generator()
    return [torch.randint(3, vocab, (length,), generator=generator) for length in lengths]


def row_logits(model: Any, tokens: Tensor) -> Tensor:
    """T V: ours, for one document alone."""
    return model(TokenBatch.of([tokens])).logits(slice(None))


@torch.no_grad()
def hf_logits(model: Any, tokens: Tensor) -> Tensor:
    """T V: transformers', for one document alone."""
    return model(tokens[None]).logits[0].float()
