"""New tokens per second: the engine against transformers' generate.

A Gemma 2 of 4 layers, width 256, vocabulary 8,192, random weights; one model folder, written by us
and read by both; drawn at temperature 1 without cuts, on the CPU. The peer's attention is the eager
one, the only one with Gemma 2's soft-cap; its cache is the faster of its growing and its static
one, measured in every round. The time is that of the whole call, reading the prompts included.

equal    batch 8 (and 1): prompts of 64 tokens, 128 new tokens each, no stops.
ragged   a queue of 3 x batch prompts of 16 to 112 tokens, whose completions end after a geometric
         number of tokens (mean 48, at most 192), the same on both sides: the peer is told by a
         stopping criterion of its own, and takes the queue a batch at a time, padded on the left;
         ours has as many slots as the peer's batch has rows.
long     batch 8, prompts of 1,024 tokens, 64 new tokens each: what a longer past costs.

Beside ours stands its floor: the rate at which the matrix products of the decoding steps alone
would go, with the weights laid out as the engine has them. `int8` is bfloat16 with the decoding
weights in 8 bits; `divergence` is what that costs, in nats a token: the mean over its own samples
of log p(8 bits) - log p(as stored), an estimate of the Kullback-Leibler divergence.

`compiled` is float32 with the compiled step; compiling is not in its time, and stands beside it as
`compile_seconds`.

Run: python benchmarks/generate.py [rounds] [setting ...]      (all: about 20 minutes on two cores)
     a setting is dtype/kind/batch: float32/ragged/32
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cabochon.core import Key
from cabochon.generation.engine import Settings, generate
from cabochon.generation.score import score
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.step import int8, packed
from side_by_side import compare, report, seconds_each, worker_arguments

PROMPT, NEW = 64, 128
RAGGED_PROMPTS, MEAN_STOP, LAST_STOP = (16, 112), 48, 192
LONG_PROMPT, LONG_NEW = 1024, 64
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
    context=LONG_PROMPT + LONG_NEW,
)
SETTINGS = (
    "float32/equal/1",
    "float32/equal/8",
    "float32/ragged/8",
    "float32/ragged/32",
    "float32/ragged/128",
    "float32/long/8",
    "compiled/equal/1",
    "compiled/equal/8",
    "compiled/ragged/32",
    "bfloat16/equal/1",
    "bfloat16/equal/8",
    "bfloat16/ragged/32",
    "int8/equal/1",
    "int8/equal/8",
)


def work_list(kind: str, batch: int) -> tuple[list[torch.Tensor], list[int]]:
    """Prompts, and how many tokens each is answered with; the same on both sides."""
    generator = Key(1).fold(kind, batch).generator()
    if kind != "ragged":
        length, new = (PROMPT, NEW) if kind == "equal" else (LONG_PROMPT, LONG_NEW)
        rows = torch.randint(3, CONFIG.vocab_size, (batch, length), generator=generator)
        return list(rows), [new] * batch
    count = 3 * batch
    low, high = RAGGED_PROMPTS
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, CONFIG.vocab_size, (n,), generator=generator) for n in lengths]
    stops = torch.empty(count).geometric_(1.0 / MEAN_STOP, generator=generator)
    return prompts, stops.clamp_(max=LAST_STOP).long().tolist()


def loaded(folder: Path, dtype: str) -> Gemma:
    """Our model; in 8 bits the rest is bfloat16, as the peer is."""
    if dtype == "int8":
        return read_gemma(folder, torch.bfloat16).with_int8_decoding()
    if dtype == "compiled":
        return read_gemma(folder, torch.float32).with_compiled_decoding()
    return read_gemma(folder, getattr(torch, dtype))


def floor(folder: Path, dtype: str, batch: int) -> float:
    """New tokens a second, if a step were its matrix products alone."""
    model, layout = loaded(folder, dtype), int8 if dtype == "int8" else packed
    with torch.inference_mode():
        weights = [weight for weight in model.parameters() if weight.ndim == 2]
        products = [(layout(w, batch), w.new_ones(batch, w.shape[1])) for w in weights]

        def step() -> None:
            for product, x in products:
                product(x)

        return batch / min(seconds_each(step, warm_up=3, times=30))


def divergence(folder: Path) -> float:
    """Nats a token that 8 bits cost; see above."""
    rounded, exact = loaded(folder, "int8"), loaded(folder, "bfloat16")
    prompts, _ = work_list("equal", 8)
    groups = generate(rounded, prompts, Settings(max_new_tokens=NEW), Key(3))
    written = [c.model_logprob for group in groups for c in group.completions]
    scored = [logprob for group in score(exact, groups) for logprob in group]
    return float((torch.cat(written) - torch.cat(scored)).mean())


def ours(folder: Path, dtype: str, kind: str, batch: int) -> list[Callable[[], int]]:
    """One call of ours, as how many tokens it wrote."""
    model = loaded(folder, dtype)
    prompts, stops = work_list(kind, batch)
    settings = [Settings(max_new_tokens=stop) for stop in stops]

    def write() -> int:
        groups = generate(model, prompts, settings, Key(2), rows=batch)
        return sum(len(group.completions[0].tokens) for group in groups)

    return [write]


def peer(folder: Path, dtype: str, kind: str, batch: int) -> list[Callable[[], int]]:
    """The same through transformers, once for each kind of cache."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if dtype in ("float32", "compiled") else torch.bfloat16,
        attn_implementation="eager",
    )
    model.generation_config.eos_token_id = None  # the folder's would end rows by chance
    prompts, stops = work_list(kind, batch)

    def writer(cache: str) -> Callable[[], int]:
        def write() -> int:
            return sum(
                answer(prompts[at : at + batch], stops[at : at + batch], cache)
                for at in range(0, len(prompts), batch)
            )

        return write

    def answer(rows: list[torch.Tensor], ends: list[int], cache: str) -> int:
        longest = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for place, row in enumerate(rows):
            tokens[place, longest - len(row) :] = row
            mask[place, longest - len(row) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(ends),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )
        limits = torch.tensor(ends)

        def done(written: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return written.shape[1] - longest >= limits

        written = model.generate(
            tokens, attention_mask=mask, generation_config=config, stopping_criteria=[done]
        )
        assert written.shape[1] - longest == max(ends)
        return sum(ends)

    return [writer("dynamic"), writer("static")]


def work(side: str, setting: str) -> None:
    """What a fresh process does: the best of some calls, of the better kind of call."""
    dtype, kind, batch = setting.split("/")
    folder = Path(os.environ[FOLDER])
    expected = sum(work_list(kind, int(batch))[1])
    writers = {"ours": ours, "peer": peer}[side](folder, dtype, kind, int(batch))
    seconds = []
    for write in writers:
        begin = time.perf_counter()
        assert write() == expected
        first = time.perf_counter() - begin
        seconds.append(min(seconds_each(write, warm_up=0, times=3 if kind == "equal" else 2)))
    figures = {"seconds": min(seconds), "tokens_per_second": expected / min(seconds)}
    if side == "ours":
        figures["floor"] = floor(folder, dtype, int(batch))
        if dtype == "compiled":
            figures["compile_seconds"] = first - min(seconds)
        if dtype == "int8":
            figures["divergence"] = divergence(folder)
    report(**figures)


def main() -> None:
    """Every setting, both sides in turn."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        write_gemma(Gemma.init(CONFIG, Key(0)), Path(folder))
        for setting in sys.argv[2:] or SETTINGS:
            result = results[setting] = compare(__file__, setting, rounds=rounds)
            speeds = [result[side]["tokens_per_second"] for side in ("peer", "ours")]
            print(
                f"{setting:20} peer {speeds[0]:6.0f}  ours {speeds[1]:6.0f} new tokens/s  "
                f"floor {result['ours']['floor']:6.0f}  ratio {result['ratio']} "
                f"{result['ratios']}",
                flush=True,
            )
    named = {
        "ratio": "float32/ragged/32",
        "ratio_equal": "float32/equal/8",
        "ratio_one": "float32/equal/1",
    }
    report(
        benchmark="generate",
        **{name: results[at]["ratio"] for name, at in named.items() if at in results},
        what="4 layers, width 256, vocabulary 8192, CPU; see the settings",
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
