"""`cabochon evaluate preferences` and `rewards`: a model on held-out pairs, a reward on texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cabochon import folders
from cabochon.cli.configuration import FLAT, parse
from cabochon.cli.machine import DTYPES, device_of, model_folder, tokenizer_of, use_threads
from cabochon.cli.output import answer, say
from cabochon.cli.pairs import PairSettings
from cabochon.cli.prompts import prompts_of_source
from cabochon.cli.rewards import RewardSettings, load_reward
from cabochon.core import Completion, Group
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.preferences import Pairs, PairTokens, encoded_pairs, read_pairs
from cabochon.data.prompts import Prompt
from cabochon.data.tokenizer import Tokenizer
from cabochon.evaluation.intervals import mean_interval
from cabochon.evaluation.pairs import pair_accuracy
from cabochon.rewards.compose import frozen, save_scales
from cabochon.rewards.preference_model import score_sequences
from cabochon.rewards.preference_texts import encode_exchange
from cabochon.rewards.scores import scores
from cabochon.rewards.texts import Exchange

__all__ = ["PreferencesSettings", "RewardsSettings", "preferences", "rewards"]

AT_ONCE = 256
"""Texts that a reward is asked for at a time."""


@dataclass(frozen=True, kw_only=True)
class PreferencesSettings:
    """Which reward model, which pairs."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A reward model's folder, or a run (its newest checkpoint)."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Pairs with 'chosen' and 'rejected': .jsonl, .parquet or a folder."""
    pairs: Annotated[PairSettings, FLAT] = field(default_factory=PairSettings)
    too_long: Literal["refuse", "drop"] = "refuse"
    """Pairs longer than the model's context: refuse the first, or drop them and say how many."""
    batch_size: int = 16
    """Texts at a time; it changes no result beyond rounding."""
    precision: Literal["stored", "float32", "bf16"] = "stored"
    """What to compute in."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class RewardsSettings:
    """Which reward, which texts."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Prompts with completions, or conversations: .jsonl, .parquet or a folder."""
    tokenizer: str
    """A tokenizer folder, model folder or run: it makes the tokens that lengths count."""
    rewards: Annotated[RewardSettings, FLAT] = field(default_factory=RewardSettings)
    plain: bool = False
    """Prompts are the beginnings of texts, not turns of conversations."""
    save: str = ""
    """Write the scales that the parts have on these texts, for --reward-normalise."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def preferences(argv: Sequence[str]) -> int:
    """How often the reward model prefers what people preferred."""
    settings = parse(
        PreferencesSettings,
        argv,
        prog="cabochon evaluate preferences",
        description="How often a reward model prefers the answer that people preferred.",
    )
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    use_threads(settings.threads)
    folder = model_folder(settings.model)
    model, tokenizer = folders.load_reward(
        folder, dtype=DTYPES.get(settings.precision), device=device_of(settings.device)
    )
    unusable: list[str] = []
    how = settings.pairs
    noting = unusable if how.unusable == "drop" else None
    here = folders.saved_here(folder)
    encoded = encoded_pairs if here else _published_pairs
    read = list(encoded(settings.file, tokenizer, plain=how.plain, unusable=noting))
    kept = [pair for pair in read if pair.longest <= model.context]
    if len(kept) < len(read) and settings.too_long == "refuse":
        long = next(pair for pair in read if pair.longest > model.context)
        raise DataError(
            f"{long.source}: a prompt with its answer has {long.longest} tokens, the model reads "
            f"{model.context}; take it out, or leave out all such with --too-long drop"
        )
    pairs = Pairs(kept).pairs
    texts = [[*each.prompt, *said] for each in pairs for said in (each.chosen, each.rejected)]
    found = score_sequences(model, texts, rows=settings.batch_size)
    result = pair_accuracy(found[::2], found[1::2])
    report = asdict(result) | {
        "left_out": {"unusable": len(unusable), "too_long": len(read) - len(kept)}
    }
    if settings.json:
        answer(report)
        return 0
    sure = "" if result.interval is None else " (95%: {:.1%} to {:.1%})".format(*result.interval)
    print(f"{result.accuracy:.1%} of {result.pairs:,} pairs as people preferred them{sure}")
    print(f"mean margin {result.margin:.4f}, loss {result.loss:.4f} nats (even odds: 0.6931)")
    if left := len(unusable) + len(read) - len(kept):
        print(f"left out: {left:,} rows that are no pairs or too long")
    return 0


def _published_pairs(
    path: str, tokenizer: Tokenizer, *, plain: bool, unusable: list[str] | None
) -> Iterator[PairTokens]:
    """As `encoded_pairs`, whole rows as a model from elsewhere reads them."""
    for pair in read_pairs(path, unusable=unusable):
        prompt = pair.prompt[0].content if plain else pair.prompt
        try:
            if plain and len(pair.prompt) > 1:
                raise DataError("a plain text is one prompt and its answer; this is a conversation")
            chosen, rejected = (
                encode_exchange(
                    tokenizer, Exchange(prompt=prompt, completion=text, name=pair.source)
                )
                for text in (pair.chosen, pair.rejected)
            )
        except DataError as error:
            if unusable is None:
                raise DataError(f"{pair.source}: {error}") from error
            unusable.append(f"{pair.source}: {error}")
            continue
        yield PairTokens(
            prompt=(), chosen=tuple(chosen), rejected=tuple(rejected), source=pair.source
        )


def rewards(argv: Sequence[str]) -> int:
    """What a reward says of texts, part by part; and its scales, to be kept."""
    settings = parse(
        RewardsSettings,
        argv,
        prog="cabochon evaluate rewards",
        description="What a reward says of prompts with their completions, part by part.",
    )
    use_threads(settings.threads)
    tokenizer = tokenizer_of(settings.tokenizer)
    prompts = list(prompts_of_source(settings.file, tokenizer, plain=settings.plain))
    kept = [each for each in prompts if each.completion]
    if not kept:
        raise DataError(f"{settings.file} holds {len(prompts)} prompts and no completion to judge")
    reward = load_reward(
        settings.rewards,
        tokenizer,
        prompts=kept,
        data=[settings.file],
        device=settings.device,
        plain=settings.plain,
    )
    groups = [_group(each) for each in kept]
    said = [scores(reward, groups[at : at + AT_ONCE]) for at in range(0, len(groups), AT_ONCE)]
    values = {"total": torch.cat([each.total for each in said]).flatten()} | {
        part.name: torch.cat([each.parts[part.name] for each in said]).flatten()
        for part in reward.parts
    }
    report = {name: _described(each) for name, each in values.items()}
    if settings.save:
        save_scales(frozen(reward, groups), Path(settings.save))
        say(f"scales of {len(groups):,} texts written to {settings.save}")
    if settings.json:
        answer({"texts": len(groups), "rewards": report})
        return 0
    for name, each in report.items():
        sure = (
            "" if each["interval"] is None else " (95%: {:.4f} to {:.4f})".format(*each["interval"])
        )
        print(f"{name}: mean {each['mean']:.4f}{sure}, std {each['std']:.4f}")
    print(f"of {len(groups):,} texts")
    return 0


def _group(prompt: Prompt) -> Group:
    tokens = torch.tensor(prompt.completion)
    unknown = torch.zeros(len(tokens))
    written = Completion(tokens=tokens, logprob=unknown, model_logprob=unknown, stopped=True)
    return Group(prompt=torch.tensor(prompt.ids), completions=(written,))


def _described(values: torch.Tensor) -> dict[str, Any]:
    listed = values.double()
    return {
        "mean": listed.mean().item(),
        "interval": mean_interval(listed.tolist()),
        "std": listed.std().item() if len(listed) > 1 else 0.0,
        "lowest": listed.min().item(),
        "highest": listed.max().item(),
    }
