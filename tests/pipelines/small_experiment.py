"""An experiment on teacher hacking small enough for a test: two dozen updates in all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from small_recipe import sentences, write_lines

from cabochon.pipelines.hacking_recipe import Config, Learning
from cabochon.pipelines.recipe import Shape


def write_prompts(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [{"text": sentences(seed, 3)} for seed in range(60)])


def small_experiment(texts: Path, **changes: Any) -> Config:
    """The experiment over `write_prompts(texts)`; a few seconds in all."""
    shape = Shape(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=32, window=8)
    config = Config(
        data=str(texts),
        prompts=6,
        responses=2,
        oracle_prompts=20,
        held_out=5,
        prompt_tokens=6,
        response_tokens=4,
        points=4,
        oracle_shape=replace(shape, width=24),
        teacher_shape=shape,
        student_shape=shape,
        learn=Learning(steps=6, rows=4, learning_rate=1e-2),
        teach=Learning(steps=4, rows=4, learning_rate=1e-2),
        begin=Learning(steps=2, rows=4, learning_rate=1e-2),
        distil=Learning(steps=6, rows=3, learning_rate=1e-2),
        vocab_size=320,
    )
    return replace(config, **changes)
