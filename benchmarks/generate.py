"""New tokens per second: ours against transformers' generate.

A Gemma 2 of 4 layers, width 256, vocabulary 8,192; 8 prompts of 64 tokens, 128 new tokens each,
drawn at temperature 1 without cuts or stops, on the CPU; one model folder, written by us and read
by both. The peer's cache is the faster of its growing and its static one, measured in every round;
its attention is the eager one, the only one with Gemma 2's soft-cap. The time is that of the whole
call, reading the prompts included.

Run: python benchmarks/generate.py            (about 3 minutes on two cores)
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cabochon.core import Key
from cabochon.generation.engine import Settings, generate
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from side_by_side import compare, report, seconds_each, worker_arguments

ROWS, PROMPT, NEW = 8, 64, 128
FOLDER = "CABOCHON_BENCHMARK_FOLDER"
CONFIG = GemmaConfig(
    vocab_size=8192,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_width=64,
    ffn_width=1024,
    query_scalar=64,
    window=128,
    attention_cap=50.0,
    final_cap=30.0,
    post_norms=True,
    context=PROMPT + NEW,
)


def prompts() -> torch.Tensor:
    """8 x 64 random ids, the same on both sides."""
    return torch.randint(3, CONFIG.vocab_size, (ROWS, PROMPT), generator=Key(1).generator())


def ours(folder: Path, dtype: torch.dtype) -> list[Callable[[], int]]:
    """One call of ours, as how many tokens it wrote."""
    model, rows = read_gemma(folder, dtype), list(prompts())
    settings = Settings(max_new_tokens=NEW)

    def write() -> int:
        groups = generate(model, rows, settings, Key(2))
        return sum(len(group.completions[0].tokens) for group in groups)

    return [write]


def peer(folder: Path, dtype: torch.dtype) -> list[Callable[[], int]]:
    """The same through transformers, once for each kind of cache."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    rows = prompts()

    def writer(cache: str) -> Callable[[], int]:
        config = GenerationConfig(
            max_new_tokens=NEW,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )

        def write() -> int:
            written = model.generate(
                rows, attention_mask=torch.ones_like(rows), generation_config=config
            )
            return (written.shape[1] - PROMPT) * ROWS

        return write

    return [writer("dynamic"), writer("static")]


def work(side: str, dtype: str) -> None:
    """What a fresh process does: the best of five calls, of the better kind of call."""
    folder = Path(os.environ[FOLDER])
    seconds = []
    for write in {"ours": ours, "peer": peer}[side](folder, getattr(torch, dtype)):
        assert write() == ROWS * NEW
        seconds.append(min(seconds_each(write, warm_up=0, times=5)))
    report(seconds=min(seconds), tokens_per_second=ROWS * NEW / min(seconds))


def main() -> None:
    """Both types, in turn; the figure of float32 is the one reported as ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        write_gemma(Gemma.init(CONFIG, Key(0)), Path(folder))
        results = {}
        for dtype in ("float32", "bfloat16"):
            result = results[dtype] = compare(__file__, dtype, rounds=rounds)
            for side in ("peer", "ours"):
                speed = result[side]["tokens_per_second"]
                print(f"{dtype:9} {side}: {speed:6.0f} new tokens/s")
            print(f"{dtype:9} ratio {result['ratio']} {result['ratios']}")
    report(
        benchmark="generate",
        ratio=results["float32"]["ratio"],
        what="8 prompts of 64 tokens, 128 new ones each, 4 layers, width 256, vocabulary 8192, CPU",
        peer="transformers generate, eager, the faster of its dynamic and static cache",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
