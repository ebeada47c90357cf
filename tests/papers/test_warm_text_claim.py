"""Preferences of people: a small reward model from scratch beats chance, and WARM its members.

Pairs of answers to people who provoke (HH-RLHF, harmless, its public test part). A Gemma of a few
hundred thousand parameters reads the training answers for a moment (three checkpoints); then four
members learn pairs of which a quarter have the wrong label, and are averaged. Nothing here knows
English but from these texts, so the accuracies are those of beginners.

`python tests/papers/test_warm_text_claim.py DATA FOLDER SEED` prints the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cabochon import folders
from cabochon.algorithms import pretrain
from cabochon.core import Key
from cabochon.core.errors import DataError
from cabochon.data.documents import Document
from cabochon.data.order import Order
from cabochon.data.packing import pack_documents
from cabochon.data.preferences import pair_of
from cabochon.data.readers import read_records
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import warm
from cabochon.pipelines.warm_findings import table
from cabochon.training.optimizers import OptimizerConfig, adamw

ANSWER, PROMPT = 160, 20
"""Characters that are kept: of an answer the first, of the last thing said to it the last."""

CONTEXT, WIDTH, LAYERS, PRETRAINING = 96, 64, 1, 24
PROBE_RATE, RATES = 1e-2, (1e-3, 2e-3)


def split(data: Path, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs to learn and pairs held out; those of one dialogue stay on one side."""
    dialogues: dict[str, list[dict[str, str]]] = {}
    for record in read_records(data):
        try:
            pair = pair_of(record.values, record.source)
        except DataError:
            continue  # a few answers are empty, or answer different prompts
        row = {
            "prompt": pair.prompt[-1].content[-PROMPT:].strip() or "?",
            "chosen": pair.chosen[:ANSWER].strip(),
            "rejected": pair.rejected[:ANSWER].strip(),
        }
        if row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]:
            dialogues.setdefault(pair.prompt[0].content, []).append(row)
    order = Order(Key(seed).fold("split"), len(dialogues)).take(len(dialogues)).tolist()
    listed = [list(dialogues.values())[place] for place in order]
    held = len(listed) // 4
    return (
        [row for rows in listed[held:] for row in rows],
        [row for rows in listed[:held] for row in rows],
    )


def starts(rows: list[dict[str, str]], folder: Path) -> tuple[str, ...]:
    """Three checkpoints of one short pre-training on the training texts."""
    texts = [f"{row['prompt']}\n{row[side]}" for row in rows for side in ("chosen", "rejected")]
    tokenizer: Tokenizer = train_tokenizer(texts, 2000)
    config = GemmaConfig(
        vocab_size=tokenizer.vocab_size, width=WIDTH, layers=LAYERS, heads=4, kv_heads=2,
        head_width=WIDTH // 4, ffn_width=2 * WIDTH, query_scalar=WIDTH // 4, window=CONTEXT,
        attention_cap=50.0, final_cap=30.0, post_norms=True, context=CONTEXT,
        pad_id=tokenizer.control("pad"), eos_id=tokenizer.control("eos"),
        bos_id=tokenizer.control("bos"),
    )  # fmt: skip
    model = Gemma.init(config, Key(0))
    packed = pack_documents(tokenizer, [Document(text, "") for text in texts], CONTEXT)
    steps = pretrain.train(
        pretrain.Config(steps=PRETRAINING),
        model,
        packed.batches(Key(1), 16),
        adamw(model, OptimizerConfig(learning_rate=4e-3)),
    )
    kept = []
    for step in steps:
        if step.index + 1 in (PRETRAINING // 2, 3 * PRETRAINING // 4, PRETRAINING):
            kept.append(str(folder / f"start-{step.index + 1}"))
            folders.save(model, tokenizer, kept[-1])
    return tuple(kept)


def averaged(data: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """The results of `run warm` on a split of the pairs; the seed decides split and labels."""
    learned, held_out = split(data, seed)
    for name, rows in (("train", learned), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config = warm.Config(
        starts=starts(learned, folder),
        data=str(folder / "train.jsonl"),
        held_out=str(folder / "held_out.jsonl"),
        flipped=0.25,
        steps=60,
        batch_size=64,
        learning_rates=RATES,
        probe_steps=20,
        probe_learning_rate=PROBE_RATE,
        context=CONTEXT,
        too_long="drop",
        unusable="drop",
        threads=1,
        seed=seed,
    )
    return dict(warm.run(config, folder / "warm"))


@pytest.mark.claim
def test_small_reward_models_beat_chance_and_their_average_the_mean_of_them(
    shared_data: Path, tmp_path: Path
) -> None:
    results = averaged(shared_data / "hh_harmless" / "pairs.jsonl.gz", tmp_path)
    held_out = results["sets"]["held_out"]
    assert held_out["average"]["interval"][0] > 0.5, table(results)
    assert held_out["average"]["accuracy"] >= 0.55, table(results)
    assert held_out["average"]["accuracy"] >= held_out["mean_member"], table(results)


if __name__ == "__main__":
    found = averaged(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(table(found))
