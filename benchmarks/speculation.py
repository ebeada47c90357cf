"""Seconds of generation with a draft model, beside the same without one.

Both sides are cabochon's engine: "peer" is the model alone, "ours" the model with a draft that
proposes tokens. Two pairs:

demo    the teacher of `cabochon demo` with the student distilled from it as its draft, eight
        prompts of code; needs a finished demo (`make demo`, or CABOCHON_DEMO=FOLDER).
large   a random model of 12 layers, width 768, with a draft of one layer of it: `ahead` tokens are
        proposed and, as the draft is the model's first layer and the others add next to nothing,
        nearly all are accepted. What a draft can bring at best, where a step of the model costs
        ten times one of the draft.

Printed with each: how many tokens a reading of the model gave.

Run: python benchmarks/speculation.py [rounds]        (about 3 minutes on two cores)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from cabochon.cli.machine import load_backbone
from cabochon.core import Backbone, Cache, Key, Prediction, TokenBatch
from cabochon.generation.engine import Settings, generate
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from side_by_side import compare, report, seconds_each, worker_arguments

DEMO = "CABOCHON_DEMO"
NEW = 96
TEXTS = ("def ", "import ", "class A", '"""', "    return ", "for x in", "# ", "if name")
SETTINGS = ("demo/1/2", "demo/8/2", "large/1/4", "large/8/4")
"""pair/batch/ahead"""
LARGE = GemmaConfig(
    vocab_size=8192,
    width=768,
    layers=12,
    heads=8,
    kv_heads=4,
    head_width=96,
    ffn_width=2048,
    query_scalar=96,
    window=128,
    attention_cap=50.0,
    final_cap=30.0,
    post_norms=True,
    context=512,
)


class Counted:
    """A backbone that counts how often it reads new tokens."""

    def __init__(self, inner: Backbone) -> None:
        self.inner = inner
        self.readings = 0

    @property
    def context(self) -> int:
        return self.inner.context

    def __call__(self, batch: TokenBatch, cache: Cache | None = None, /) -> Prediction:
        self.readings += 1
        return self.inner(batch, cache)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0, /) -> Cache:
        return self.inner.new_cache(rows, capacity, ahead)


def demo() -> tuple[Backbone, Backbone, list[torch.Tensor]]:
    """Teacher, its distilled student, prompts."""
    folder = Path(os.environ.get(DEMO, "runs/demo"))
    teacher, tokenizer = load_backbone(str(folder / "teacher"), "stored", "cpu")
    student, _ = load_backbone(str(folder / "distilled"), "stored", "cpu")
    return teacher, student, [torch.tensor(tokenizer.encode(text, bos=True)) for text in TEXTS]


def large() -> tuple[Backbone, Backbone, list[torch.Tensor]]:
    """A model whose upper layers add a hundredth, and its first layer alone."""
    model = Gemma.init(LARGE, Key(0))
    draft = Gemma.init(GemmaConfig(**{**vars(LARGE), "layers": 1}), Key(0))
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.attention_post_norm.fill_(-0.99)
            block.ffn_post_norm.fill_(-0.99)
        model.final_norm.fill_(9.0)  # logits that are worth guessing
    draft.embedding = model.embedding
    draft.blocks[0] = model.blocks[0]
    draft.final_norm = model.final_norm
    rows = torch.randint(3, LARGE.vocab_size, (8, 32), generator=Key(1).generator())
    return model, draft, list(rows)


def work(side: str, setting: str) -> None:
    """What a fresh process does: the best of three calls."""
    pair, batch, ahead = setting.split("/")
    model, draft, prompts = {"demo": demo, "large": large}[pair]()
    counted = Counted(model)
    asked = Settings(max_new_tokens=NEW)

    def write() -> int:
        groups = generate(
            counted,
            prompts[: int(batch)],
            asked,
            Key(2),
            draft=draft if side == "ours" else None,
            ahead=int(ahead),
        )
        return sum(len(group.completions[0].tokens) for group in groups)

    tokens = write()
    calls = counted.readings
    seconds = min(seconds_each(write, warm_up=0, times=3))
    report(
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        tokens_per_reading=tokens / int(batch) / calls,
    )


def main() -> None:
    """Every pair that is there."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ[DEMO] = str(Path(os.environ.get(DEMO, "runs/demo")).resolve())
    settings = list(SETTINGS)
    if not Path(os.environ[DEMO]).is_dir():
        print(f"no demo at {os.environ[DEMO]}; make one with `make demo` to measure its pair too")
        settings = [setting for setting in SETTINGS if not setting.startswith("demo")]
    results = {}
    for setting in settings:
        result = results[setting] = compare(__file__, setting, rounds=rounds)
        print(
            f"{setting:12} without {result['peer']['tokens_per_second']:6.0f}  with "
            f"{result['ours']['tokens_per_second']:6.0f} new tokens/s  ratio {result['ratio']} "
            f"{result['ratios']}; {result['ours']['tokens_per_reading']:.2f} tokens a reading",
            flush=True,
        )
    report(
        benchmark="speculation",
        ratio=results["large/1/4"]["ratio"],
        what="generation with a draft model beside none; see the settings (pair/batch/ahead)",
        peer="cabochon's engine without a draft",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
