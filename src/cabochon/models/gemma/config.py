"""The shape of a Gemma 1 or Gemma 2 model, and how many parameters that shape has.

Source: Gemma report (arXiv:2403.08295, table 1) and Gemma 2 report (arXiv:2408.00118, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from cabochon.core.errors import ConfigError

__all__ = ["GemmaConfig", "parameter_counts"]


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Everything that fixes a Gemma's tensors and what is computed with them.

    With `post_norms` it is a Gemma 2: windows, soft-caps and an own query scale are possible.
    Without, it is a Gemma 1, which has none of them.
    """

    vocab_size: int
    """V: rows of the embedding, which is the unembedding too."""
    width: int
    """D: of the residual stream."""
    layers: int
    heads: int
    """N: query heads."""
    kv_heads: int
    """K: key and value heads; N is a multiple of K."""
    head_width: int
    """H: of one head; even. N H need not be D."""
    ffn_width: int
    """Of one branch (gate or up); the reports print both branches together."""
    query_scalar: int
    """Attention scores are multiplied by query_scalar ** -0.5."""
    window: int | None
    """Tokens that the even layers see, the current one included; None: every layer sees all."""
    attention_cap: float | None
    """Attention scores stay below it (soft-cap before the mask); None: no cap."""
    final_cap: float | None
    """Logits stay below it (soft-cap); None: no cap."""
    post_norms: bool
    """Normalise the output of each sub-layer too, as Gemma 2 does."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    context: int = 8192
    """Tokens of the longest sequence the model is meant for; nothing is allocated for it."""
    pad_id: int | None = 0
    """Changes no result. Some folders pad with EOS, or name nothing: these models can be used, but
    a tokenizer that pads with EOS cannot make rows to train on."""
    eos_id: int = 1
    bos_id: int = 2

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width",
            "query_scalar", "context",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("window", "attention_cap", "final_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, or None for none, got {value!r}")
        for name in ("rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.head_width % 2:
            raise ConfigError(f"head_width must be even (it rotates pairs), got {self.head_width}")
        self._check_ids()
        self._check_generation()

    def _check_ids(self) -> None:
        for name in ("pad_id", "eos_id", "bos_id"):
            value = getattr(self, name)
            if value is None and name == "pad_id":
                continue
            if not 0 <= value < self.vocab_size:
                raise ConfigError(
                    f"{name} must lie in the vocabulary, 0 to {self.vocab_size - 1}, got {value}"
                )

    def _check_generation(self) -> None:
        """Refuse what neither generation of the model is, while nothing has been spent on it."""
        if self.post_norms:
            if self.width % self.heads:
                raise ConfigError(
                    f"width must be a multiple of heads in a Gemma 2 (transformers reads no other "
                    f"folder), got {self.width} and {self.heads}"
                )
            return
        surplus = [n for n in ("window", "attention_cap", "final_cap") if getattr(self, n)]
        if surplus:
            raise ConfigError(
                f"{', '.join(surplus)} set without post_norms: a Gemma 1 has no windows and no "
                "soft-caps; set post_norms, or leave them None"
            )
        if self.query_scalar != self.head_width:
            raise ConfigError(
                f"query_scalar {self.query_scalar} without post_norms: a Gemma 1 scales by its "
                f"head_width, {self.head_width}"
            )

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer: even layers slide, odd ones see everything."""
        return tuple(None if layer % 2 else self.window for layer in range(self.layers))

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.query_scalar**-0.5)


def parameter_counts(config: GemmaConfig) -> tuple[int, int]:
    """Parameters (in the embedding, elsewhere), by formula.

    The reports count an embedding of 256128 rows; published files hold 256000 of them.
    """
    width, heads, kv_heads = config.width, config.heads, config.kv_heads
    attention = 2 * width * heads * config.head_width + 2 * width * kv_heads * config.head_width
    norms = (4 if config.post_norms else 2) * width
    block = attention + 3 * width * config.ffn_width + norms
    return config.vocab_size * width, config.layers * block + width
