"""What a user says about a training run: the part that all algorithms share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from cabochon.core.errors import ConfigError
from cabochon.models.gemma.config import GemmaConfig

__all__ = ["Architecture", "RunSettings", "TooLong", "shape"]

Tracker = Literal["tensorboard", "trackio"]
TooLong = Literal["refuse", "drop"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Which model: a preset's name (with any size changed), or a model folder to go on from."""

    source: Annotated[str, tyro.conf.arg(aliases=("--model",))] = "gemma2-nano"
    """A preset (gemma2-nano, gemma2-2b, ...) or the path of a model folder."""
    layers: int | None = None
    """L: how many blocks."""
    width: int | None = None
    """D: of the residual stream."""
    heads: int | None = None
    """N: query heads."""
    kv_heads: int | None = None
    """K: key and value heads; N is a multiple of K."""
    head_width: int | None = None
    """H: of one head; the query scale follows it unless given."""
    ffn_width: int | None = None
    """Of one branch of the feed-forward block."""
    query_scalar: int | None = None
    """Attention scores are multiplied by query_scalar ** -0.5."""
    window: int | None = None
    """Tokens that sliding layers see; 0: no layer slides."""
    attention_cap: float | None = None
    """Soft-cap of the attention scores; 0: none."""
    final_cap: float | None = None
    """Soft-cap of the logits; 0: none."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Paths, sizes and machinery of one training run."""

    out: str = ""
    """The run directory, made by this run."""
    model: Architecture = field(default_factory=Architecture)
    tokenizer: str = ""
    """A tokenizer folder; the model folder's own when absent."""
    data: tuple[str, ...] = ()
    """Files or folders: .jsonl, .parquet, .txt, .md, .py, a packed folder, or `stdlib`."""
    weights: tuple[float, ...] = ()
    """How much of each of `data`, in proportion; by their sizes when absent."""
    field: str = "text"
    """The field of a record that holds its text."""
    context: int = 0
    """Tokens of a row; longer documents are split (pretrain), see `too_long` for sft. 0: 256, or
    fewer where the model that the run goes on from was made for fewer."""
    too_long: TooLong = "refuse"
    """Conversations longer than a row: refuse the first, or drop them all and say how many."""
    batch_size: int = 8
    """Rows of a micro-batch, of all ranks together; `accumulate` of them make an update."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes in bfloat16 over float32 master weights."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the rest twice: less memory, a third slower."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core. They are part of the result, because
    the order of a sum is."""
    seed: int = 0
    checkpoint_every: int = 100
    """Updates between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many checkpoints stay."""
    ema: float = 0.0
    """Decay of a running average of the weights, kept beside them; 0: none."""
    track: tuple[Tracker, ...] = ()
    """Also write the metrics for these viewers."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context < 0 or self.context == 1:
            raise ConfigError(
                "context must be at least 2, a token and the one that follows it, or 0 for the "
                f"default; got {self.context}"
            )
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema}")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (all cores) or more, got {self.threads}")
        if self.weights and len(self.weights) != len(self.data):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.data)} data; give one for each, or none"
            )
        if any(not weight > 0 for weight in self.weights):
            raise ConfigError(f"weights must all be above 0, got {list(self.weights)}")


def shape(architecture: Architecture, preset: GemmaConfig) -> GemmaConfig:
    """The preset with the sizes that were given in place of its own.

    Raises:
        ConfigError: the sizes do not make a Gemma.
    """
    given = {
        name: value
        for name, value in vars(architecture).items()
        if name != "source" and value is not None
    }
    for name in ("window", "attention_cap", "final_cap"):
        if given.get(name) == 0:
            given[name] = None
    follows = preset.query_scalar == preset.head_width
    if "head_width" in given and follows:
        given.setdefault("query_scalar", given["head_width"])
    return replace(preset, **given)
