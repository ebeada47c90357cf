"""What has to be said for an experiment on teacher hacking: models, prompts, regimes, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cabochon.core.errors import ConfigError
from cabochon.losses import f_divergences
from cabochon.pipelines.recipe import Shape
from cabochon.pipelines.regimes import REGIMES, Regime
from cabochon.training.schedules import Kind

__all__ = ["Config", "Learning"]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How long and how fast one model learns."""

    steps: int
    """Updates; 0 leaves a model that was given as it is."""
    rows: int
    """Sequences of an update."""
    learning_rate: float
    """The highest."""
    schedule: Kind = "cosine"
    """How it goes on after the warm-up; a cosine or a line ends at a tenth of it."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rows < 1 or not 0 < self.learning_rate < float("inf"):
            raise ConfigError(
                "steps must be at least 0, rows at least 1 and learning_rate above 0 and finite, "
                f"got {self.steps}, {self.rows} and {self.learning_rate}"
            )

    @property
    def warmup(self) -> int:
        """Updates over which the learning rate rises."""
        return max(1, self.steps // 50)


ORACLE = Shape(width=96, layers=3, heads=4, kv_heads=2, head_width=24, ffn_width=288, window=32)
SMALLER = Shape(width=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn_width=192, window=32)
LEARN = Learning(steps=800, rows=16, learning_rate=1e-2)
TEACH = Learning(steps=800, rows=32, learning_rate=5e-3)
BEGIN = Learning(steps=400, rows=32, learning_rate=5e-3)
DISTIL = Learning(steps=600, rows=16, learning_rate=3e-3, schedule="constant")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole experiment; `run` reads nothing else."""

    oracle: str = ""
    """A model folder that plays the truth; a small model that learns the texts when absent."""
    teacher: str = ""
    """A model folder from which the teacher begins; a new small model when absent."""
    student: str = ""
    """A model folder from which the student begins; a new small model when absent."""
    data: str = ""
    """Texts whose beginnings are the prompts; pieces of the standard library when absent."""
    field: str = "text"
    """The field of a record that holds its text."""
    regimes: tuple[Regime, ...] = REGIMES
    """Where the sequences of the distillations come from."""
    prompts: int = 48
    """M: prompts of the distillation."""
    responses: int = 8
    """k: responses to each in `diverse`, and how many times M the prompts of `more_prompts` are."""
    oracle_prompts: int = 3000
    """Prompts whose responses by the oracle teacher and student learn first."""
    held_out: int = 160
    """Prompts on which the distances are measured."""
    held_out_responses: int = 1
    """Responses to each of them that are drawn from oracle and teacher."""
    prompt_tokens: int = 12
    """Tokens of the longest prompt, BOS included."""
    response_tokens: int = 16
    """Tokens of the longest response."""
    divergence: str = "forward_kl"
    """What a distillation lowers at every token; the names are those of `train gkd`."""
    divergence_parameter: float | None = None
    """Of those that have one."""
    points: int = 20
    """How often the distances are measured, evenly in log step; more often tells more."""
    oracle_shape: Shape = ORACLE
    teacher_shape: Shape = SMALLER
    student_shape: Shape = SMALLER
    learn: Learning = LEARN
    """Of a new oracle, on rows of text."""
    teach: Learning = TEACH
    """Of the teacher, on the oracle's responses."""
    begin: Learning = BEGIN
    """Of the student, on the oracle's responses."""
    distil: Learning = DISTIL
    """Of each student, on the teacher's distributions."""
    vocab_size: int = 512
    """Entries of a new tokenizer; no other is made where a model folder is given."""
    seed: int = 0
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes in bfloat16 over float32 master weights."""
    threads: int = 1
    """Of torch; part of the result, because the order of a sum is. 0: as many as torch takes."""

    def __post_init__(self) -> None:
        for name in (
            "prompts", "responses", "oracle_prompts", "held_out_responses", "response_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("held_out", "prompt_tokens", "points"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (torch's choice) or more, got {self.threads}")
        if not self.regimes or len(set(self.regimes)) < len(self.regimes):
            raise ConfigError(f"regimes must be different ones, got {list(self.regimes)}")
        for name in self.regimes:
            if name not in REGIMES:
                raise ConfigError(f"no regime is called {name!r}; choose of {', '.join(REGIMES)}")
        f_divergences.named(self.divergence, self.divergence_parameter)
        needs = (("learn", "oracle"), ("teach", "teacher"), ("begin", "student"))
        for name, given in needs:
            if getattr(self, name).steps == 0 and not getattr(self, given):
                raise ConfigError(f"{name}.steps is 0: a new {given} would have learned nothing")
        if self.distil.steps < self.points:
            raise ConfigError(
                f"distil.steps must be at least points ({self.points}), got {self.distil.steps}"
            )

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.prompt_tokens + self.response_tokens
