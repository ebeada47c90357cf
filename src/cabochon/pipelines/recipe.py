"""What has to be said for a teacher, two students and a tuning: texts, sizes, lengths, rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cabochon.core.errors import ConfigError

__all__ = ["Config", "Phase", "Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of one decoder; the vocabulary and the context come from the recipe."""

    width: int
    """D, a multiple of `heads`."""
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    """Of one branch."""
    window: int
    """How far back the sliding layers (0, 2, 4, ...) see, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How long and how fast one model learns."""

    steps: int
    rows: int
    """Rows in each update, each of `context` tokens (`tune_context` in the tuning)."""
    learning_rate: float
    """The highest; a cosine ends at a tenth of it."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                "steps and rows must be at least 1 and learning_rate above 0 and finite, got "
                f"{self.steps}, {self.rows} and {self.learning_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole recipe; `run` reads nothing else."""

    train: str
    """Documents to learn from: a file or folder that `data.readers` reads."""
    held_out: str
    """Documents to be judged on, none of which is in `train`."""
    chats: str
    """Conversations for the tuning."""
    held_out_chats: str
    """Conversations to be judged on; the last turn of each is the reference."""
    teacher: Shape
    student: Shape
    teach: Phase
    learn: Phase
    """Of both students, the one from scratch and the distilled one."""
    tune: Phase
    vocab_size: int = 4096
    context: int = 256
    """Tokens of a row of documents."""
    tune_context: int = 512
    """Tokens of a row of conversations, and the longest text that the models write."""
    held_out_tokens: int = 100_000
    """How many held-out tokens the models are judged on: the same number of every document."""
    held_out_chat_count: int = 200
    samples: int = 8
    """How many prompts are shown with what the models answered."""
    seed: int = 0
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes in bfloat16 over float32 master weights."""
    threads: int = 0
    """Of torch; part of the result, because the order of a sum is. 0: as many as torch takes."""

    def __post_init__(self) -> None:
        for name in ("context", "tune_context", "held_out_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (torch's choice) or more, got {self.threads}")
        if self.held_out_chat_count < 2:
            raise ConfigError("held_out_chat_count must be at least 2, for there to be an interval")
