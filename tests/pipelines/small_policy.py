"""A policy, prompts and a reward small enough for WARP in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from small_recipe import sentences, write_lines

from cabochon import folders
from cabochon.core import Key, RewardFn
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import warp
from cabochon.rewards.texts import judged


def write_policy(folder: Path) -> None:
    """`folder/model`, which writes at random, and `folder/prompts.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([sentences(seed, 12) for seed in range(30)], 320)
    config = GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=8,
        ffn_width=32,
        query_scalar=8,
        window=8,
        attention_cap=50.0,
        final_cap=30.0,
        post_norms=True,
        context=32,
        pad_id=tokenizer.control("pad"),
        eos_id=tokenizer.learnable_end(),
        bos_id=tokenizer.control("bos"),
    )
    folders.save(Gemma.init(config, Key(0, ("policy",))), tokenizer, folder / "model")
    rows = [{"prompt": sentences(seed, 1)} for seed in range(40)]
    write_lines(folder / "prompts.jsonl", rows)


def vowels(tokenizer: Tokenizer, prompts: Any) -> RewardFn:
    """Share of the completion's letters that are an e or an o."""
    del prompts

    def judge(_prompt: str, completion: str) -> float:
        letters = [letter for letter in completion if letter.isalpha()]
        return sum(letter in "eo" for letter in letters) / max(1, len(letters))

    return judged(judge, tokenizer.decode)


def small_warp(folder: Path, **changes: Any) -> warp.Config:
    """WARP over `write_policy(folder)`; a few seconds in all."""
    config = warp.Config(
        model=str(folder / "model"),
        data=str(folder / "prompts.jsonl"),
        plain=True,
        members=2,
        iterations=2,
        steps=3,
        batch_size=4,
        samples=2,
        learning_rate=1e-2,
        max_new_tokens=6,
        held_out=6,
        judged_samples=2,
        etas=(0.0, 0.5, 1.0),
        threads=1,
    )
    return replace(config, **changes)


def run(folder: Path, out: Path, *args: Any, **changes: Any) -> dict[str, object]:
    return warp.run(small_warp(folder, **changes), out, vowels, {"reward": ["vowels"]}, *args)
