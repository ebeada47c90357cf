"""A training step (forward and backward) of ours beside transformers' eager Gemma 2.

12 layers, width 512, vocabulary 32,768, batch 8 x 256, on the CPU; one model folder, written by us
and read by both, and one batch. Prints per type the tokens/s, and the memory by which a step rises
above the loaded model (gradients included): resident memory at its highest during a step whose
gradients begin as None, less resident memory before it, in a process that has taken one step.

Run: python benchmarks/train_step.py [ROUNDS]            (about 10 minutes on two cores)
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.losses import cross_entropy
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from side_by_side import compare, measured_memory, report, seconds_each, worker_arguments

ROWS, LENGTH = 8, 256
FOLDER = "CABOCHON_BENCHMARK_FOLDER"
CONFIG = GemmaConfig(
    vocab_size=32768,
    width=512,
    layers=12,
    heads=8,
    kv_heads=4,
    head_width=64,
    ffn_width=2048,
    query_scalar=64,
    window=LENGTH // 2,
    attention_cap=50.0,
    final_cap=30.0,
    post_norms=True,
    context=LENGTH,
)


def tokens() -> Tensor:
    """8 x 256 random ids, the same on both sides."""
    return torch.randint(3, CONFIG.vocab_size, (ROWS, LENGTH), generator=Key(1).generator())


def ours(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """Model, and its mean loss per token."""
    model = read_gemma(folder, dtype)
    batch = TokenBatch.of(list(tokens()))

    def mean_loss() -> Tensor:
        loss = cross_entropy(model(batch), batch)
        return loss.total / loss.weight

    return model, mean_loss


def peer(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The same through transformers, whose eager attention is the only one with the cap."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.config.use_cache = False
    batch = tokens()
    return model, lambda: model(input_ids=batch, labels=batch).loss


def work(side: str, dtype: str) -> None:
    """What a fresh process does: memory of the second step, then seconds of the best of three."""
    folder = Path(os.environ[FOLDER])
    model, mean_loss = {"ours": ours, "peer": peer}[side](folder, getattr(torch, dtype))
    model.train()
    losses = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = mean_loss()
        loss.backward()
        losses.append(loss.item())

    step()
    model.zero_grad(set_to_none=True)
    memory = measured_memory(step)
    seconds = min(seconds_each(step, warm_up=0, times=3))
    report(
        seconds=seconds,
        tokens_per_second=ROWS * LENGTH / seconds,
        memory_mb=memory,
        gradients_mb=sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        loss=losses[0],
    )


def main() -> None:
    """Both types, in turn; the figures of bfloat16 are the ones reported as ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    plan = {"bfloat16": rounds, "float32": min(rounds, 3)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        write_gemma(Gemma.init(CONFIG, Key(0)), Path(folder))
        results = {}
        for dtype, times in plan.items():
            result = results[dtype] = compare(__file__, dtype, rounds=times)
            for side in ("peer", "ours"):
                print(
                    f"{dtype:9} {side}: {result[side]['tokens_per_second']:6.0f} tokens/s, "
                    f"{result[side]['memory_mb']:6.0f} MB, loss {result[side]['loss']:.4f}"
                )
            print(f"{dtype:9} ratio {result['ratio']}, memory ratio {result['memory_ratio']}")
    report(
        benchmark="train_step",
        ratio=results["bfloat16"]["ratio"],
        memory_ratio=results["bfloat16"]["memory_ratio"],
        what="forward and backward, 12 layers, width 512, vocabulary 32768, batch 8x256, CPU",
        peer="transformers Gemma2, eager, same weights and batch",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
