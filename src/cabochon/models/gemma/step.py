"""The decoder's step for generation: one new token a row, the weights laid out for it once.

The same arithmetic as `Block`, without autograd and with fewer, fused calls. On a CPU the matrices
are reordered for oneDNN: for a few rows its products read them two to three times faster than the
plain layout allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, rms_norm

from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.numerics import LARGEST_LOGISTIC_CAP

__all__ = ["AttendOne", "PackedPrediction", "Step", "curve", "packed"]

AttendOne = Callable[[Tensor], Tensor]
"""Rotated q, k, v of one new token a row (B N+2K H) -> B (N H), what attention mixes for it."""

Product = Callable[[Tensor], Tensor]
"""x (n I) -> n O."""

PACKED_BYTES = 4 * 1024**3
"""Models larger than this are not copied into another layout."""


@dataclass(frozen=True, kw_only=True)
class PackedPrediction:
    """Next-token logits of a step: `LinearPrediction` with a head laid out for few rows."""

    hidden: Tensor
    """B 1 D: after the final norm."""
    head: Product
    cap: float | None

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: of the chosen rows of the flattened (B 1) positions."""
        logits = self.head(self.hidden.flatten(0, 1)[rows]).float()
        if self.cap is None:
            return logits
        if self.cap > LARGEST_LOGISTIC_CAP:
            return logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits.mul_(2.0 / self.cap).sigmoid_().mul_(2.0 * self.cap).sub_(self.cap)


class Step:
    """A model's weights as they were when this was made, ready for single tokens."""

    def __init__(
        self,
        config: GemmaConfig,
        blocks: Iterable[nn.Module],
        embedding: Tensor,
        final_norm: Tensor,
        rows: int,
    ) -> None:
        """Lay out a decoder's weights for about `rows` rows."""
        kept = list(blocks)
        size = embedding.nbytes + sum(w.nbytes for block in kept for w in block.parameters())
        product = packed if size <= PACKED_BYTES else _plain
        self._config = config
        self._weights = _weights(kept, embedding, final_norm)
        self._version = _version(self._weights)
        self._layers = [_Layer.of(block, product, rows) for block in kept]
        self._final = _scale(final_norm)
        self._head = product(embedding, rows)

    def is_of(self, blocks: Iterable[nn.Module], embedding: Tensor, final_norm: Tensor) -> bool:
        """Whether these are the weights it was made of, unchanged since.

        What an optimizer, `copy_` or `load_state_dict` does is seen; what is written through
        `.data` is not, nor are changes of tensors made in inference mode: torch counts neither.
        """
        weights = _weights(blocks, embedding, final_norm)
        return (
            len(weights) == len(self._weights)
            and all(map(is_, weights, self._weights))
            and _version(weights) == self._version
        )

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, attends: Sequence[AttendOne]
    ) -> PackedPrediction:
        """Predictions after the new tokens.

        Args:
            x: B 1 D: their scaled embeddings.
            cos: B 1 H/2, of their positions' angles.
            sin: B 1 H/2, likewise.
            attends: of the cache, one a layer.
        """
        config = self._config
        shape = (len(x), config.heads + 2 * config.kv_heads, config.head_width)
        same, across = _turns(cos, sin, config)
        x = x.squeeze(1)
        for layer, attend in zip(self._layers, attends, strict=True):
            qkv = layer.qkv(self._norm(x, layer.attention_norm)).view(shape)
            turned = torch.addcmul(qkv * same, qkv.roll(config.head_width // 2, -1), across)
            x = x + self._norm(layer.attention_out(attend(turned)), layer.attention_post_norm)
            gate, up = layer.gate_up(self._norm(x, layer.ffn_norm)).chunk(2, dim=-1)
            change = layer.ffn_out(gelu(gate, approximate="tanh").mul_(up))
            x = x + self._norm(change, layer.ffn_post_norm)
        hidden = self._norm(x, self._final).unsqueeze(1)
        return PackedPrediction(hidden=hidden, head=self._head, cap=config.final_cap)

    def _norm(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x
        return rms_norm(x.float(), x.shape[-1:], scale, self._config.norm_eps).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One block: norms as 1 + w in float32 (None: no such norm), matrices as products."""

    attention_norm: Tensor | None
    qkv: Product
    attention_out: Product
    attention_post_norm: Tensor | None
    ffn_norm: Tensor | None
    gate_up: Product
    ffn_out: Product
    ffn_post_norm: Tensor | None

    @staticmethod
    def of(block: nn.Module, product: Callable[[Tensor, int], Product], rows: int) -> _Layer:
        weights = dict(block.named_parameters())
        return _Layer(
            attention_norm=_scale(weights["attention_norm"]),
            qkv=product(weights["qkv"], rows),
            attention_out=product(weights["attention_out"], rows),
            attention_post_norm=_scale(weights.get("attention_post_norm")),
            ffn_norm=_scale(weights["ffn_norm"]),
            gate_up=product(weights["gate_up"], rows),
            ffn_out=product(weights["ffn_out"], rows),
            ffn_post_norm=_scale(weights.get("ffn_post_norm")),
        )


def curve(scale: float, cap: float | None) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """(f, gain, unit) such that unit f(gain q.k), up to a constant, is the soft-capped score.

    cap tanh(z / cap) = 2 cap s(2 z / cap) - cap with the logistic function s, which is several
    times faster; a softmax does not see the constant.
    """
    if cap is None:
        return _unbent, scale, 1.0
    if cap > LARGEST_LOGISTIC_CAP:
        return torch.tanh_, scale / cap, cap
    return torch.sigmoid_, 2.0 * scale / cap, 2.0 * cap


def _unbent(scores: Tensor) -> Tensor:
    return scores


def _turns(cos: Tensor, sin: Tensor, config: GemmaConfig) -> tuple[Tensor, Tensor]:
    """Two factors, B (N + 2K) H: x times one, plus x rolled by H/2 times the other, is rotated.

    For v they are 1 and 0, so that q, k and v are turned in one go.
    """
    values = (len(cos), config.kv_heads, config.head_width)
    heads = config.heads + config.kv_heads
    same = torch.cat([cos, cos], dim=-1).expand(-1, heads, -1)
    across = torch.cat([-sin, sin], dim=-1).expand(-1, heads, -1)
    return torch.cat([same, same.new_ones(values)], 1), torch.cat(
        [across, sin.new_zeros(values)], 1
    )


def packed(weight: Tensor, rows: int) -> Product:
    """The product with `weight` (O I), reordered for about `rows` rows where that can be done."""
    supported = (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    if not supported:
        return _plain(weight, rows)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        result: Tensor = product(x, reordered, None, "none", [], "")
        return result

    return apply


def _plain(weight: Tensor, rows: int) -> Product:  # noqa: ARG001
    detached = weight.detach()
    return lambda x: linear(x, detached)


def _weights(blocks: Iterable[nn.Module], embedding: Tensor, final_norm: Tensor) -> list[Tensor]:
    # Straight from the dictionaries: `parameters()` takes longer than all the rest of the check.
    held = [w for block in blocks for w in block._parameters.values() if w is not None]
    return [embedding, final_norm, *held]


def _version(weights: Iterable[Tensor]) -> int:
    """Grows whenever one of them is written to."""
    return sum(0 if weight.is_inference() else weight._version for weight in weights)


def _scale(norm: Tensor | None) -> Tensor | None:
    """1 + w in float32: what a normalised vector is multiplied by."""
    return None if norm is None else 1.0 + norm.detach().float()
