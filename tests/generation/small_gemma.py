"""A small Gemma 2 whose every weight is random, so that nothing is near a special value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cabochon.core import Key
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma

CONFIG = GemmaConfig(
    vocab_size=61,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=12,
    ffn_width=40,
    query_scalar=9,
    window=6,
    attention_cap=4.0,
    final_cap=5.0,
    post_norms=True,
    context=64,
)


def small_gemma(config: GemmaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Gemma:
    model = Gemma(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=Key(11).fold(name).generator())
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5))
    return model


def random_prompts(*lengths: int) -> list[torch.Tensor]:
    return [
        torch.randint(3, CONFIG.vocab_size, (length,), generator=Key(12).fold(place).generator())
        for place, length in enumerate(lengths)
    ]


def small_llama(context: int, **changes: Any) -> Any:
    """A model of transformers with the same vocabulary; large weights, so that it has opinions."""
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.4,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes))
