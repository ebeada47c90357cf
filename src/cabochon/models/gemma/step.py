"""The decoder's step for generation: few new tokens a row, the weights laid out for it once.

The same arithmetic as `Block`, without autograd and with fewer, fused calls. On a CPU the matrices
are reordered for oneDNN: for a few rows its products read them two to three times faster than the
plain layout allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import gelu, linear

from cabochon.core.errors import ConfigError
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.few import AttendFew, curve
from cabochon.models.gemma.numerics import LARGEST_LOGISTIC_CAP

__all__ = ["Layout", "PackedPrediction", "Step", "int8", "packed"]

Product = Callable[[Tensor], Tensor]
"""x (n I) -> n O."""

Layout = Callable[[Tensor, int], Product]
"""A weight (O I) and for about how many rows -> the product with it."""

PACKED_BYTES = 4 * 1024**3
"""Models larger than this are not copied into another layout."""
GATED_ROWS = 4
"""From so many rows on, gate and up are two products with the gating done inside them."""


@dataclass(frozen=True, kw_only=True)
class PackedPrediction:
    """Next-token logits of a step: `LinearPrediction` with a head laid out for few rows."""

    hidden: Tensor
    """B T D: after the final norm."""
    head: Product
    cap: float | None

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: of the chosen rows of the flattened (B T) positions."""
        hidden = self.hidden.flatten(0, 1)[rows]
        if self.cap is None:
            return self.head(hidden).float()
        if self.cap > LARGEST_LOGISTIC_CAP:
            return self.head(hidden).float().div_(self.cap).tanh_().mul_(self.cap)
        bent = self.head(hidden).float().mul_(2.0 / self.cap).sigmoid_()
        if torch.compiler.is_compiling():  # which knows no `out`, and needs none
            return bent.mul_(2.0 * self.cap).sub_(self.cap)
        lowest = torch.tensor(-self.cap, device=bent.device)
        return torch.add(lowest, bent, alpha=2.0 * self.cap, out=bent)


class Step:
    """A model's weights as they were when this was made, ready for single tokens."""

    def __init__(
        self,
        config: GemmaConfig,
        blocks: Iterable[nn.Module],
        embedding: Tensor,
        final_norm: Tensor,
        rows: int,
        turns: tuple[Tensor, Tensor],
        layout: Layout,
        opaque: Callable[[Product, int], Product] | None = None,
    ) -> None:
        """Lay out a decoder's weights for about `rows` rows.

        Args:
            config: of the decoder.
            blocks: its layers.
            embedding: V D, the head as well.
            final_norm: D.
            rows: a hint.
            turns: cosine and sine, each P H/2, of the angles of all positions there will be.
            layout: how matrices are multiplied with.
            opaque: makes of a product and its O another call of it; None: the call itself.
        """
        kept = list(blocks)
        size = embedding.nbytes + sum(w.nbytes for block in kept for w in block.parameters())
        product = _plain if layout is packed and size > PACKED_BYTES else layout
        self.config = config
        self._weights = _weights(kept, embedding, final_norm)
        self._version = _version(self._weights)
        # |x|^2 + this is D (mean(x^2) + eps): the root is one call, where the mean is many.
        least = torch.full((), math.sqrt(config.width * config.norm_eps), device=embedding.device)
        self._unit = partial(_unit, least)
        call = opaque or _itself
        self._layers = [_Layer.of(block, product, rows, self._unit, call) for block in kept]
        self._final = _scale(final_norm)
        self._head = call(product(embedding, rows), len(embedding))
        self._turns = _turns(*turns, config)
        kinds = [0] * config.heads + [1] * config.kv_heads + [2] * config.kv_heads
        self._kinds = torch.tensor(kinds, device=embedding.device)

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
        self, x: Tensor, positions: Tensor, attends: Sequence[AttendFew]
    ) -> PackedPrediction:
        """Predictions after the new tokens.

        Args:
            x: B T D: their scaled embeddings.
            positions: B T.
            attends: of the cache, one a layer.
        """
        config, batch = self.config, x.shape[:2]
        x = x.flatten(0, 1)
        split = [config.heads, 2 * config.kv_heads]
        shape = (len(x), sum(split), config.head_width)
        place, kinds = positions.reshape(-1), self._kinds
        same, across = (turn.index_select(0, place).index_select(1, kinds) for turn in self._turns)
        for layer, attend in zip(self._layers, attends, strict=True):
            qkv = layer.qkv(x).view(shape)
            turned = torch.addcmul(qkv * same, qkv.roll(config.head_width // 2, -1), across)
            mixed = layer.attention_out(attend(*turned.split(split, 1)))
            x = self._added(x, mixed, layer.attention_post_norm)
            x = self._added(x, layer.ffn_out(layer.gated(x)), layer.ffn_post_norm)
        hidden = self._unit(x).mul_(self._final).to(x.dtype).unflatten(0, batch)
        return PackedPrediction(hidden=hidden, head=self._head, cap=config.final_cap)

    def _added(self, x: Tensor, change: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return x + change
        if x.dtype == torch.float32:
            return torch.addcmul(x, self._unit(change), scale)
        return x + self._unit(change).mul_(scale).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One block: matrices as products with what precedes them, norms after them as scales."""

    qkv: Product
    """x -> the first norm, then the projections."""
    attention_out: Product
    attention_post_norm: Tensor | None
    gated: Product
    """x -> the second norm, then gelu(gate) * up."""
    ffn_out: Product
    ffn_post_norm: Tensor | None

    @staticmethod
    def of(
        block: nn.Module,
        layout: Layout,
        rows: int,
        unit: Callable[[Tensor], Tensor],
        call: Callable[[Product, int], Product],
    ) -> _Layer:
        weights = dict(block.named_parameters())
        # Where a copy is made anyway. (Eight bits are best spent on the weights as they are: scales
        # would widen their rows.)
        first = weights["qkv"]
        fold = layout is packed and _reorders(first) and first.dtype == torch.float32

        def normed(norm: str, weight: str, product: Callable[[Tensor], Product]) -> Product:
            return _normed(weights[weight], weights[norm], product, unit, fold=fold)

        def plain(weight: Tensor) -> Product:
            return call(layout(weight, rows), len(weight))

        def gated(weight: Tensor) -> Product:
            return call(_gated(weight, rows, layout), len(weight) // 2)

        return _Layer(
            qkv=normed("attention_norm", "qkv", plain),
            attention_out=plain(weights["attention_out"]),
            attention_post_norm=_scale(weights.get("attention_post_norm")),
            gated=normed("ffn_norm", "gate_up", gated),
            ffn_out=plain(weights["ffn_out"]),
            ffn_post_norm=_scale(weights.get("ffn_post_norm")),
        )


def _itself(product: Product, width: int) -> Product:  # noqa: ARG001
    return product


def _unit(least: Tensor, x: Tensor) -> Tensor:
    """n D float32: x / |x|, `least` (a length) inside the root; fresh memory."""
    length: Tensor = vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / length.hypot(least)


def _normed(
    weight: Tensor,
    norm: Tensor,
    product: Callable[[Tensor], Product],
    unit: Callable[[Tensor], Tensor],
    *,
    fold: bool,
) -> Product:
    """x -> RMSNorm(x) @ weight.T, the norm's scale inside the weight where it may be."""
    scale = _scale(norm)
    if fold:
        folded = product(weight.detach() * scale)
        return lambda x: folded(unit(x))
    multiply = product(weight)
    return lambda x: multiply(unit(x).mul_(scale).to(x.dtype))


def _turns(cos: Tensor, sin: Tensor, config: GemmaConfig) -> tuple[Tensor, Tensor]:
    """Two factors, n 3 H, for q, k and v: x times one, plus x rolled by H/2 times the other.

    q and k are so rotated, and q gets `curve`'s gain as well; v stays.

    Args:
        cos: n H/2, of every position's angles.
        sin: n H/2.
        config: for the gain.
    """
    _, gain, _ = curve(config.scale, config.attention_cap)
    same, across = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return (
        torch.stack([same * gain, same, torch.ones_like(same)], 1),
        torch.stack([across * gain, across, torch.zeros_like(across)], 1),
    )


def packed(weight: Tensor, rows: int) -> Product:
    """The product with `weight` (O I), reordered for about `rows` rows where that can be done."""
    if not _reorders(weight):
        return _plain(weight, rows)
    if rows == 1 and weight.dtype == torch.float32 and _is_intel():
        # For one row MKL on Intel's own processors reads a transposed weight faster still.
        transposed = weight.detach().t().contiguous()
        return lambda x: torch.mm(x, transposed)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        result: Tensor = product(x, reordered, None, "none", [], "")
        return result

    return apply


def int8(weight: Tensor, rows: int) -> Product:  # noqa: ARG001
    """The product with `weight` (O I) in 8 bits, one scale a row; inputs are rounded to bfloat16.

    A weight is off by at most half a step, the largest of its row / 254.

    Raises:
        ConfigError: the weight is not on the CPU.
    """
    if weight.device.type != "cpu":
        raise ConfigError(
            f"int8 weights are multiplied with on the CPU alone, these are on {weight.device}; "
            "decode in bfloat16 there"
        )
    wide = weight.detach().float()
    # A row of zeros has no scale of its own; any will do.
    scale = wide.abs().amax(1).div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
    quantized = (wide / scale.unsqueeze(1)).round_().to(torch.int8)
    scales, product = scale.to(torch.bfloat16), torch.ops.aten._weight_int8pack_mm

    def apply(x: Tensor) -> Tensor:
        result: Tensor = product(x.to(torch.bfloat16), quantized, scales)
        return result.to(x.dtype)

    return apply


def _gated(weight: Tensor, rows: int, layout: Layout) -> Product:
    """x -> gelu(gate) * up, with `weight` (2F D) holding the gate's rows, then those of up."""
    if layout is packed and rows >= GATED_ROWS and _reorders(weight):
        gate, up = (
            torch.ops.mkldnn._reorder_linear_weight(half, rows) for half in weight.detach().chunk(2)
        )
        product = torch.ops.mkldnn._linear_pointwise

        def inside(x: Tensor) -> Tensor:
            opened = product(x, gate, None, "gelu", [], "tanh")
            result: Tensor = product.binary(x, opened, up, None, "mul")
            return result

        return inside
    both = layout(weight, rows)

    def after(x: Tensor) -> Tensor:
        opened, result = both(x).chunk(2, dim=-1)
        return gelu(opened, approximate="tanh").mul_(result)

    return after


def _reorders(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with such a weight."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


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


def _scale(norm: Tensor | None) -> Any:
    """root(D) (1 + w) in float32: what x / |x| is multiplied by."""
    return None if norm is None else (1.0 + norm.detach().float()) * math.sqrt(len(norm))
