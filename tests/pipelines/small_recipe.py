"""A whole pipeline small enough for a test: two documents a word list can make, four trainings."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from cabochon.pipelines.recipe import Config, Phase, Shape

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "hears",
    "old",
    "young",
    "and",
    "or",
    "house",
    "tree",
    "under",
    "near",
]


def sentences(seed: int, count: int) -> str:
    stream = random.Random(seed)
    return " ".join(" ".join(stream.choices(WORDS, k=6)).capitalize() + ".\n" for _ in range(count))


def write_texts(folder: Path) -> None:
    """Documents and conversations, none of them on both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seeds in (("train", range(30)), ("held_out", range(100, 108))):
        rows = [{"text": sentences(seed, 12)} for seed in seeds]
        write_lines(folder / f"{name}.jsonl", rows)
    for name, seeds in (("chats", range(40)), ("held_out_chats", range(200, 212))):
        rows = [
            {"prompt": f"Go on: {sentences(seed, 1)}", "completion": sentences(seed + 1000, 1)}
            for seed in seeds
        ]
        write_lines(folder / f"{name}.jsonl", rows)


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_recipe(texts: Path, **changes: Any) -> Config:
    """The recipe over `write_texts(texts)`; a few seconds in all."""
    shape = Shape(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=32, window=8)
    config = Config(
        train=str(texts / "train.jsonl"),
        held_out=str(texts / "held_out.jsonl"),
        chats=str(texts / "chats.jsonl"),
        held_out_chats=str(texts / "held_out_chats.jsonl"),
        teacher=replace(shape, width=24),
        student=shape,
        teach=Phase(steps=8, rows=2, learning_rate=1e-2),
        learn=Phase(steps=6, rows=2, learning_rate=1e-2),
        tune=Phase(steps=4, rows=2, learning_rate=1e-3),
        vocab_size=320,
        context=32,
        tune_context=64,
        held_out_tokens=400,
        held_out_chat_count=6,
        samples=2,
        threads=1,
    )
    return replace(config, **changes)
