"""`cabochon evaluate perplexity MODEL FILE`: how well a model predicts documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cabochon.cli.configuration import parse
from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError

__all__ = ["PerplexitySettings", "main"]

EVALUATIONS = {
    "perplexity": "nats per token of documents, each behind its BOS",
    "preferences": "how often a reward model prefers what people preferred",
    "rewards": "what a reward says of prompts with their completions, part by part",
}


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Which model, which documents."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model folder, or a run directory (its newest checkpoint)."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Documents: .jsonl, .parquet, .txt, a folder, or `stdlib` (the held-out modules)."""
    field: str = "text"
    """The field of a record that holds its text."""
    eos: bool = False
    """Count the end of each document too."""
    batch_size: int = 8
    """Rows at a time; it changes no result beyond rounding."""
    precision: Literal["stored", "float32", "bf16"] = "stored"
    """What to compute in."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Dispatches on the kind of evaluation."""
    if argv and argv[0] in {"-h", "--help"}:
        print("usage: cabochon evaluate KIND ...\n")
        for name, purpose in EVALUATIONS.items():
            print(f"  {name:<12}  {purpose}")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"evaluate what? cabochon evaluate {' | '.join(EVALUATIONS)} ...")
    if argv[0] in ("preferences", "rewards"):
        from cabochon.cli import evaluate_rewards

        verb = {
            "preferences": evaluate_rewards.preferences,
            "rewards": evaluate_rewards.rewards,
        }[argv[0]]
        return verb(argv[1:])
    if argv[0] != "perplexity":
        raise ConfigError(unknown("evaluation", argv[0], EVALUATIONS))
    return _perplexity(
        parse(
            PerplexitySettings,
            argv[1:],
            prog="cabochon evaluate perplexity",
            description="How many nats a token of these documents costs the model.",
        )
    )


def _perplexity(settings: PerplexitySettings) -> int:
    from cabochon.cli.machine import load_backbone, use_threads
    from cabochon.cli.output import answer
    from cabochon.cli.rows import documents_of
    from cabochon.evaluation.perplexity import perplexity

    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    use_threads(settings.threads)
    documents = list(documents_of(settings.file, settings.field, held_out=True))
    model, tokenizer = load_backbone(settings.model, settings.precision, settings.device)
    result = perplexity(
        model,
        tokenizer.encode_all([each.text for each in documents]),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.control("eos") if settings.eos else None,
        batch_size=settings.batch_size,
    )
    report = {
        "nats_per_token": result.nats_per_token,
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "documents": len(documents),
        "interval": result.interval,
    }
    if settings.json:
        answer(report)
        return 0
    sure = "" if result.interval is None else " (95%: {:.4f} to {:.4f})".format(*result.interval)
    print(f"{result.nats_per_token:.4f} nats per token{sure}")
    print(f"perplexity {result.perplexity:.2f} over {result.tokens:,} tokens")
    print(f"of {len(documents):,} documents, {'with' if settings.eos else 'without'} their ends")
    return 0
