"""Updates per second of on-policy distillation: ours beside TRL's GKDTrainer with lmbda = 1.

Student: a Gemma 2 of 4 layers, width 256; teacher: 6 layers, width 512; vocabulary 8,192, random
weights, float32, on the CPU. An update draws one completion of 64 tokens, at temperature 1 without
cuts and without stops, after each of 8 prompts of 64 tokens, asks the teacher about them, and takes
an AdamW step on the Jensen-Shannon divergence of the paper with beta = 1/2, averaged over tokens.
Both sides read the same model folders and prompts; each draws with its own random numbers, so the
losses agree in the mean only. The peer's attention is eager, the only one with Gemma 2's soft-cap,
and its cache is on. `wide` is the same with a vocabulary of 32,768 and 4 prompts.

The time is that of an update within a training run of the peer's own trainer, the first left out.

Run: python benchmarks/gkd_step.py [ROUNDS] [setting ...]      (about 6 minutes on two cores)
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise, repeat
from pathlib import Path

import torch
from torch import Tensor

from cabochon.algorithms import gkd
from cabochon.core import Key, TokenBatch
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.training.optimizers import OptimizerConfig, adamw
from side_by_side import compare, report, worker_arguments

PROMPT, NEW, STEPS = 64, 64, 6
RATE = 1e-4
FOLDER = "CABOCHON_BENCHMARK_FOLDER"
STUDENT = GemmaConfig(
    vocab_size=8192,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_width=64,
    ffn_width=1024,
    query_scalar=64,
    window=64,
    attention_cap=50.0,
    final_cap=30.0,
    post_norms=True,
    context=PROMPT + NEW,
)
TEACHER = replace(STUDENT, width=512, layers=6, heads=8, kv_heads=4, ffn_width=2048)
SETTINGS = {"usual": (8192, 8), "wide": (32768, 4)}
"""Vocabulary, and prompts of an update."""


def prompts(setting: str) -> Tensor:
    """Rows of random ids, the same on both sides."""
    vocabulary, rows = SETTINGS[setting]
    return torch.randint(3, vocabulary, (rows, PROMPT), generator=Key(1).generator())


def ours(folder: Path, setting: str) -> tuple[list[float], list[float]]:
    """Seconds and loss of each update."""
    student, teacher = read_gemma(folder / "student"), read_gemma(folder / "teacher")
    config = gkd.Config(
        steps=STEPS,
        divergence="jsd_paper",
        divergence_parameter=0.5,
        average="token",
        max_new_tokens=NEW,
        warmup=0,
        schedule="constant",
    )
    rows = list(prompts(setting))
    batch = TokenBatch.of(rows, masks=[[False] * len(row) for row in rows])
    steps = gkd.train(
        config,
        student,
        repeat(batch),
        adamw(student, OptimizerConfig(learning_rate=RATE, weight_decay=0.0)),
        key=Key(0),
        stop_ids=(),
        teacher=teacher.requires_grad_(False),
    )
    times, losses = [time.perf_counter()], []
    for step in steps:
        times.append(time.perf_counter())
        losses.append(step.loss)
    return [after - before for before, after in pairwise(times)], losses


def peer(folder: Path, setting: str) -> tuple[list[float], list[float]]:
    """The same by TRL."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("student", "teacher")
    )
    student.generation_config.eos_token_id = None
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    rows = prompts(setting)
    times, losses = [time.perf_counter()], []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

        def on_log(self, *_: object, logs: dict, **__: object) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    def collate(_: list[dict]) -> dict[str, Tensor]:
        ones = torch.ones_like(rows)
        return {
            "input_ids": rows,
            "attention_mask": ones,
            "labels": rows,
            "prompts": rows,
            "prompt_attention_mask": ones,
        }

    settings = GKDConfig(
        output_dir=str(folder / "peer"),
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        max_new_tokens=NEW,
        per_device_train_batch_size=len(rows),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"messages": []}] * len(rows) * STEPS),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    times[0] = time.perf_counter()
    trainer.train()
    return [after - before for before, after in pairwise(times)], losses


def work(side: str, setting: str) -> None:
    """What a fresh process does."""
    seconds, losses = {"ours": ours, "peer": peer}[side](
        Path(os.environ[FOLDER]) / setting, setting
    )
    report(
        seconds=statistics.median(seconds[1:]),
        steps_per_second=1.0 / statistics.median(seconds[1:]),
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def main() -> None:
    """Every setting; the figures of the first are the ones reported as ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = sys.argv[2:] or list(SETTINGS)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        for setting in chosen:
            vocabulary, _ = SETTINGS[setting]
            for name, config, seed in (("student", STUDENT, 0), ("teacher", TEACHER, 1)):
                model = Gemma.init(replace(config, vocab_size=vocabulary), Key(seed))
                with torch.no_grad():
                    model.embedding.mul_(5.0)  # so that the two disagree
                write_gemma(model, Path(folder) / setting / name)
            result = results[setting] = compare(__file__, setting, rounds=rounds)
            for side in ("peer", "ours"):
                print(
                    f"{setting:6} {side}: {result[side]['steps_per_second']:.3f} updates/s, "
                    f"loss {result[side]['first_loss']:.4f} -> {result[side]['last_loss']:.4f}"
                )
            print(f"{setting:6} ratio {result['ratio']} of {result['ratios']}")
    report(
        benchmark="gkd_step",
        ratio=results[chosen[0]]["ratio"],
        what="on-policy distillation, an update: 8 prompts of 64 tokens, 64 drawn, JSD(1/2), CPU",
        peer="TRL GKDTrainer, lmbda 1, same weights, prompts and lengths",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
