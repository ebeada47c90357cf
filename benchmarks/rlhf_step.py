"""Updates per second of RLOO: ours beside TRL's RLOOTrainer.

The model is a Gemma 2 of 4 layers, width 256, vocabulary 8,192, random weights, float32, on the
CPU. An update draws 4 completions of 64 tokens, at temperature 1 without cuts and without stops,
after each of 4 prompts of 64 tokens, judges them (the share of even token ids), asks the anchor
(the model as it began) for their log-probabilities, and takes an AdamW step on leave-one-out
advantages with a KL of 0.05 in the reward. Both sides read the same model folder and prompts; each
draws with its own random numbers, so the rewards agree in the mean only. The peer may not draw EOS
(`min_new_tokens`), so that its completions have 64 tokens too. Its attention is eager, the only one
with Gemma 2's soft-cap, and its cache is on. Ours records its rollouts on the disk, as it does by
default. `wide` is the same with a vocabulary of 32,768 and 2 prompts.

The time is that of an update within a training run of the peer's own trainer, the first left out.
Beside the ratio stands that of the processor's seconds, which neighbours on a machine change less.

Run: python benchmarks/rlhf_step.py [ROUNDS] [setting ...]      (about 6 minutes on two cores)
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, repeat
from pathlib import Path

import torch
from torch import Tensor

from cabochon.algorithms import rlhf
from cabochon.core import Group, Key, TokenBatch
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.rewards.records import recorder
from cabochon.training.anchors import anchor_of
from cabochon.training.optimizers import OptimizerConfig, adamw
from cabochon.training.process_memory import keep_freed_memory
from side_by_side import compare, report, worker_arguments

PROMPT, NEW, SAMPLES, STEPS = 64, 64, 4, 6
RATE, BETA = 1e-4, 0.05
FOLDER = "CABOCHON_BENCHMARK_FOLDER"
MODEL = GemmaConfig(
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
SETTINGS = {"usual": (8192, 4), "wide": (32768, 2)}
"""Vocabulary, and prompts of an update."""


def prompts(setting: str) -> Tensor:
    """Rows of random ids, the same on both sides."""
    vocabulary, rows = SETTINGS[setting]
    return torch.randint(3, vocabulary, (rows, PROMPT), generator=Key(1).generator())


class Ids:
    """What a recorder asks of a tokenizer."""

    def fingerprint(self) -> str:
        return "ids"


def even(groups: Sequence[Group]) -> Tensor:
    """Share of even ids."""
    return torch.stack(
        [
            torch.stack([(c.tokens % 2 == 0).float().mean() for c in group.completions])
            for group in groups
        ]
    )


def now() -> tuple[float, float]:
    """By the clock, and by the processor."""
    return time.perf_counter(), time.process_time()


def ours(folder: Path, setting: str) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """The times around each update; its mean reward, and its tokens of a completion."""
    keep_freed_memory()  # as every run of `cabochon train` does
    policy = read_gemma(folder)
    config = rlhf.Config(
        steps=STEPS,
        samples=SAMPLES,
        kl_weight=BETA,
        max_new_tokens=NEW,
        warmup=0,
        schedule="constant",
    )
    rows = list(prompts(setting))
    batch = TokenBatch.of(rows, masks=[[False] * len(row) for row in rows])
    with (
        tempfile.TemporaryDirectory() as place,
        recorder(Path(place) / "rollouts", Ids()) as observe,
    ):
        steps = rlhf.train(
            config,
            policy,
            anchor_of(policy, config.anchor_config),
            repeat(batch),
            adamw(policy, OptimizerConfig(learning_rate=RATE, weight_decay=0.0)),
            key=Key(0),
            stop_ids=(),
            reward=even,
            observe=observe,
        )
        times, rewards, lengths = [now()], [], []
        for step in steps:
            times.append(now())
            rewards.append(step.report["reward"])
            lengths.append(step.report["completion_tokens"])
    return times, rewards, lengths


def peer(folder: Path, setting: str) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """The same by TRL."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    policy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    vocabulary, rows = SETTINGS[setting][0], prompts(setting)
    ids = {"<pad>": 0, "<eos>": 1, **{f"t{n}": n for n in range(2, vocabulary)}}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    times, rewards, lengths = [now()], [], []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(now())

        def on_log(self, *_: object, logs: dict, **__: object) -> None:
            if "reward" in logs:
                rewards.append(logs["reward"])
                lengths.append(logs["completions/mean_length"])

    def even_share(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [sum(id_ % 2 == 0 for id_ in each) / len(each) for each in completion_ids]

    settings = RLOOConfig(
        output_dir=str(folder / "peer"),
        num_generations=SAMPLES,
        beta=BETA,
        temperature=1.0,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        per_device_train_batch_size=len(rows) * SAMPLES,
        gradient_accumulation_steps=1,
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
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=even_share,
        args=settings,
        train_dataset=Dataset.from_list(
            [{"prompt": " ".join(f"t{id_}" for id_ in row.tolist())} for row in rows]
        ),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    times[0] = now()
    trainer.train()
    return times, rewards, lengths


def work(side: str, setting: str) -> None:
    """What a fresh process does."""
    times, rewards, lengths = {"ours": ours, "peer": peer}[side](
        Path(os.environ[FOLDER]) / setting, setting
    )
    by_clock, by_processor = (
        statistics.median([b - a for a, b in pairwise(each[1:])])
        for each in zip(*times, strict=True)
    )
    report(
        seconds=by_clock,
        steps_per_second=1.0 / by_clock,
        processor_seconds=by_processor,
        reward=statistics.mean(rewards),
        tokens=statistics.mean(lengths),
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
            model = Gemma.init(replace(MODEL, vocab_size=vocabulary), Key(0))
            with torch.no_grad():
                model.embedding.mul_(2.0)  # so that it has opinions
            write_gemma(model, Path(folder) / setting)
            result = results[setting] = compare(__file__, setting, rounds=rounds)
            for side in ("peer", "ours"):
                print(
                    f"{setting:6} {side}: {result[side]['steps_per_second']:.3f} updates/s, "
                    f"reward {result[side]['reward']:.4f}, {result[side]['tokens']:.1f} tokens"
                )
            used = [result[side]["processor_seconds"] for side in ("peer", "ours")]
            result["processor_ratio"] = round(used[0] / used[1], 3)
            print(
                f"{setting:6} ratio {result['ratio']} of {result['ratios']}, by the processor's "
                f"seconds {result['processor_ratio']}"
            )
    report(
        benchmark="rlhf_step",
        ratio=results[chosen[0]]["ratio"],
        what="RLOO, an update: 4 prompts of 64 tokens, 4 completions of 64 each, KL 0.05, CPU",
        peer="TRL RLOOTrainer, same weights, prompts, lengths and reward",
        threads=torch.get_num_threads(),
        **results,
    )


if __name__ == "__main__":
    arguments = worker_arguments()
    if arguments is None:
        main()
    else:
        work(*arguments)
