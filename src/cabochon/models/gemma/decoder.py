"""Gemma 1 and Gemma 2: one decoder, of which the configuration chooses the generation.

Source: Gemma report (arXiv:2403.08295) section 2, Gemma 2 report (arXiv:2408.00118) section 2.
Differs: q, k, v are one matrix, and so are gate and up; what is computed is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from cabochon.core.autocast import without_autocast
from cabochon.core.errors import DataError
from cabochon.core.keys import Key
from cabochon.core.types import LinearPrediction, TokenBatch
from cabochon.models.gemma.cache import Attend, GemmaCache
from cabochon.models.gemma.compiled import CompiledStep, Logits, refuse_without_compiler
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.distinct import Distinct, distinct_tokens
from cabochon.models.gemma.kernels import (
    Visibility,
    geglu_linear,
    norm_linear,
    rms_norm,
    rope,
    rotated_attention,
)
from cabochon.models.gemma.step import Layout, PackedPrediction, Product, Step, int8, packed

__all__ = ["Block", "Gemma"]

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""qkv (B T (N + 2K) H), cosine and sine (B T H/2) -> B T N H, what attention mixes."""


class Block(nn.Module):
    """Attention, then the gated unit, each normalised before (and, in Gemma 2, after)."""

    def __init__(
        self, config: GemmaConfig, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width, heads, kv_heads = config.width, config.heads, config.kv_heads
        self._shape = (heads, kv_heads, config.head_width)
        self._eps = config.norm_eps

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.attention_norm = zeros(width)
        self.qkv = zeros((heads + 2 * kv_heads) * config.head_width, width)
        """Rows: all of q (head by head), of k, of v."""
        self.attention_out = zeros(width, heads * config.head_width)
        self.ffn_norm = zeros(width)
        self.gate_up = zeros(2 * config.ffn_width, width)
        """Rows: the gate, then up."""
        self.ffn_out = zeros(width, config.ffn_width)
        self.attention_post_norm = zeros(width) if config.post_norms else None
        self.ffn_post_norm = zeros(width) if config.post_norms else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mix: Mix) -> Tensor:
        """B T D: the residual stream after this block.

        Args:
            x: B T D: the stream before it.
            cos: B T H/2, of the positions' angles.
            sin: B T H/2, likewise.
            mix: rotates queries and keys and mixes values, of the batch itself or of a cache.
        """
        heads, kv_heads, head_width = self._shape
        qkv = norm_linear(x, self.attention_norm, self.qkv, self._eps)
        mixed = mix(qkv.unflatten(-1, (heads + 2 * kv_heads, head_width)), cos, sin)
        change = linear(mixed.flatten(-2), self.attention_out)
        if self.attention_post_norm is not None:
            change = rms_norm(change, self.attention_post_norm, self._eps)
        x = x + change
        gate_up = norm_linear(x, self.ffn_norm, self.gate_up, self._eps)
        change = geglu_linear(gate_up, self.ffn_out)
        if self.ffn_post_norm is not None:
            change = rms_norm(change, self.ffn_post_norm, self._eps)
        return x + change


class Gemma(nn.Module):
    """A Gemma 1 or Gemma 2, with zeros for weights until some are drawn or read.

    Built on the device "meta" it costs nothing and still knows its shapes.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        checkpoint_activations: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        """Keep only the stream between blocks for the backward pass and compute the rest again."""
        size = (config.vocab_size, config.width)
        self.embedding = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.blocks = nn.ModuleList(
            Block(config, device=device, dtype=dtype) for _ in range(config.layers)
        )
        self.final_norm = nn.Parameter(torch.zeros(config.width, device=device, dtype=dtype))
        self._layout: Layout = packed
        self._compiled: CompiledStep | None = None

    @classmethod
    def init(
        cls,
        config: GemmaConfig,
        key: Key,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
    ) -> Gemma:
        """A new model: matrices normal with standard deviation 0.02, norm weights 0.

        Each tensor has its own stream of `key`, drawn in float32 on the CPU, so that the weights
        depend on neither device nor type.
        """
        model = cls(config, device=device, dtype=dtype)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                drawn = torch.randn(weight.shape, generator=key.fold(name).generator())
                weight.data.copy_(drawn.mul_(0.02))
        return model

    def forward(
        self, batch: TokenBatch, cache: GemmaCache | None = None
    ) -> LinearPrediction | PackedPrediction | Logits:
        """Predictions for every token of `batch`, computed in the type of the weights.

        With a cache the past comes from it, the new tokens go into it, and no gradient is made.
        Autocast is left aside: kernels written by hand do without it. For bfloat16 products, give
        the model bfloat16 weights.

        Raises:
            DataError: the cache is of another configuration, or the tokens do not follow its past.
        """
        with without_autocast(batch.tokens.device):
            return self._forward(batch, cache)

    def _forward(
        self, batch: TokenBatch, cache: GemmaCache | None
    ) -> LinearPrediction | PackedPrediction | Logits:
        if cache is None:
            return self._predict(batch, self._mixes(batch), distinct_tokens(batch))
        if cache.config is not self.config and cache.config != self.config:
            raise DataError(
                "the cache is of a model of another configuration (its window, perhaps); make it "
                "with new_cache of the model that decodes"
            )
        with torch.no_grad():
            if batch.shape[1] <= 1 + cache.ahead:
                return self._step(batch, cache)
            heads = self.config.heads
            return self._predict(batch, [_rotated(a, heads) for a in cache.attends(batch)])

    @property
    def context(self) -> int:
        """Tokens of the longest document the model is meant for."""
        return self.config.context

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> GemmaCache:
        """An empty cache for `rows` sequences of at most `capacity` tokens.

        Its `rewind` can take back up to `ahead` tokens of a row, and as many more than one may be
        read at the speed of one.
        """
        weight = self.embedding
        return GemmaCache(
            self.config, rows, capacity, ahead, device=weight.device, dtype=weight.dtype
        )

    def with_window(self, window: int | None) -> Gemma:
        """The same parameters (shared, not copied) with another window in the sliding layers."""
        other = copy.copy(self)
        other.config = replace(self.config, window=window)
        return other

    def with_int8_decoding(self) -> Gemma:
        """The same parameters (shared, not copied), decoded with weights rounded to 8 bits.

        Prompts are read, and gradients made, with the parameters as they are; single tokens after
        them with a copy in 8 bits (one scale a row), which follows the parameters' changes. What is
        drawn, and its log-probability, is that of the rounded model. On the CPU alone.
        """
        other = copy.copy(self)
        other._layout = int8
        return other

    def with_compiled_decoding(self, backend: str = "inductor") -> Gemma:
        """The same parameters (shared, not copied), decoded by a compiled step.

        The first tokens wait for the compiler, seconds to a minute; it serves every later call,
        whatever the lengths and numbers of rows. Results differ from the ordinary step's by
        rounding. On CUDA the step is recorded as a graph as well. The weights laid out for the
        step stay as long as this model does.

        Args:
            backend: of `torch.compile`.

        Raises:
            ConfigError: no C++ compiler is found, which the CPU needs.
        """
        if backend == "inductor" and self.embedding.device.type == "cpu":
            refuse_without_compiler()
        other = copy.copy(self)
        other._compiled = CompiledStep(backend)
        return other

    def _step(self, batch: TokenBatch, cache: GemmaCache) -> PackedPrediction | Logits:
        weight, scale = self.embedding, _embedding_scale(self.config.width, self.embedding.dtype)
        compiled = self._compiled if batch.shape[1] == 1 else None
        if compiled is not None:
            if compiled.rows != cache.room or self._is_stale(compiled.step):
                compiled.rows = cache.room
                opaque = compiled.opaque() if weight.device.type == "cpu" else None
                compiled.step = self._laid_out(cache.room, self.config.context, opaque)
            return compiled(batch, cache, weight, scale)
        step = cache.step
        if step is None or self._is_stale(step):
            rows = cache.room * (1 + cache.ahead)
            step = cache.step = self._laid_out(rows, cache.capacity, None)
        x = embedding(batch.tokens, weight) * scale
        return step(x, batch.positions, cache.attends_few(batch))

    def _is_stale(self, step: Step | None) -> bool:
        return step is None or not step.is_of(self.blocks, self.embedding, self.final_norm)

    def _laid_out(
        self, rows: int, positions: int, opaque: Callable[[Product, int], Product] | None
    ) -> Step:
        weight, config = self.embedding, self.config
        angles = _rotation(torch.arange(positions, device=weight.device), config, weight.dtype)
        return Step(
            config, self.blocks, weight, self.final_norm, rows, angles, self._layout, opaque
        )

    def _mixes(self, batch: TokenBatch) -> list[Mix]:
        config = self.config
        sights = {
            window: Visibility(batch.documents, batch.positions, window)
            for window in set(config.layer_windows)
        }
        return [
            partial(
                rotated_attention,
                visibility=sights[window],
                heads=config.heads,
                scale=config.scale,
                cap=config.attention_cap,
            )
            for window in config.layer_windows
        ]

    def _predict(
        self, batch: TokenBatch, mixes: list[Mix], distinct: Distinct | None = None
    ) -> LinearPrediction:
        config, weight, tokens = self.config, self.embedding, batch.tokens
        if distinct is not None:
            tokens, mixes = distinct.gather(tokens), [_spread(mix, distinct) for mix in mixes]
        x = embedding(tokens, weight) * _embedding_scale(config.width, weight.dtype)
        cos, sin = _rotation(batch.positions, config, weight.dtype)
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block, mix in zip(self.blocks, mixes, strict=True):
            if again:
                x = checkpoint(block, x, cos, sin, mix, use_reentrant=False)
            else:
                x = block(x, cos, sin, mix)
        hidden = rms_norm(x, self.final_norm, config.norm_eps)
        if distinct is not None:
            hidden = distinct.spread(hidden)
        return LinearPrediction(hidden=hidden, head=weight, cap=config.final_cap)


def _spread(mix: Mix, distinct: Distinct) -> Mix:
    """What mixes the tokens of a batch, for the distinct ones alone."""

    def mix_distinct(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return distinct.gather(mix(distinct.spread(qkv), cos, sin))

    return mix_distinct


def _rotated(attend: Attend, heads: int) -> Mix:
    """What attends to a cache, for queries and keys that are not yet rotated."""

    def mix(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = (heads + qkv.shape[2]) // 2
        qk = rope(qkv[:, :, :turned], cos, sin)
        return attend(qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, turned:])

    return mix


@lru_cache(maxsize=64)
def _embedding_scale(width: int, dtype: torch.dtype) -> float:
    """sqrt(width), rounded to the type of the activations as the published models were trained."""
    return float(torch.tensor(math.sqrt(width), dtype=dtype))


@lru_cache(maxsize=64)
def _frequencies(head_width: int, base: float, device: torch.device) -> Tensor:
    """H/2 float32: radians per position of each pair."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / base**exponents


def _rotation(positions: Tensor, config: GemmaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each B T H/2, of every position's angles, computed in float32."""
    frequencies = _frequencies(config.head_width, config.rope_base, positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
