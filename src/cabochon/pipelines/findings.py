"""What a pipeline found out: held-out losses, the comparison of the students, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cabochon import folders
from cabochon.core import Key
from cabochon.data.order import Order
from cabochon.evaluation import report
from cabochon.evaluation.perplexity import Comparison, Perplexity, compare, perplexity
from cabochon.generation.engine import Settings, generate
from cabochon.losses import cross_entropy
from cabochon.models.gemma.config import parameter_counts
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines.recipe import Config
from cabochon.pipelines.stages import Event, Observe, model_of, with_context
from cabochon.pipelines.texts import Exam, Texts, answering
from cabochon.pipelines.timing import note_memory, timed, write_json

__all__ = ["written"]

PROMPT_TOKENS = 32
NEW_TOKENS = 64
SIZES = ("width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "window", "context")
CONTINUED = ("scratch", "distilled", "teacher")


def written(
    config: Config,
    texts: Texts,
    folder: Path,
    paths: Mapping[str, Path],
    about: Mapping[str, object],
    observe: Observe,
) -> dict[str, object]:
    """The content of results.json, which is written with the report unless it is there already.

    Args:
        config: the recipe.
        texts: what it read.
        folder: of the pipeline.
        paths: model folders by name: teacher, scratch, distilled, tuned.
        about: further facts for the report.
        observe: told when a stage begins.
    """
    place = folder / "results.json"
    if not place.is_file():
        models = {name: model_of(path, config.device) for name, path in paths.items()}
        before = with_context(models["distilled"], config.tune_context)
        observe(Event(stage="evaluation", steps=0, note="reads the held-out documents"))
        with timed(folder, "evaluation"):
            judged = {**_documents(texts, models), **_conversations(texts, before, models["tuned"])}
        observe(Event(stage="samples", steps=0, note="lets the models write"))
        with timed(folder, "samples"):
            shown = {
                "continuations": _continuations(config, texts, models),
                "answers": _answers(config, texts, before, models["tuned"]),
            }
        facts = _facts(config, texts, models, paths)
        write_json(place, {"format": 1, **about, **facts, **judged, **shown})
        note_memory(folder)
    observe(Event(stage="report", steps=0, note="draws the page"))
    report.render(folder)
    return dict(json.loads(place.read_text("utf-8")))


def _documents(texts: Texts, models: Mapping[str, Gemma]) -> dict[str, Any]:
    """Nats per token of the held-out documents, and how the two students compare."""
    bos = texts.tokenizer.control("bos")
    found = {
        name: perplexity(models[name], texts.held_out, bos_id=bos)
        for name in ("teacher", "scratch", "distilled")
    }
    return {
        "held_out": [
            {
                "model": name,
                "nats_per_token": each.nats_per_token,
                "interval": each.interval,
                "bits_per_byte": math.fsum(each.document_nats) / math.log(2) / texts.held_out_bytes,
            }
            for name, each in found.items()
        ],
        "comparison": _told("scratch", "distilled", compare(found["scratch"], found["distilled"])),
    }


def _conversations(texts: Texts, untuned: Gemma, tuned: Gemma) -> dict[str, Any]:
    """Nats per token of the reference answers: before tuning, after it, behind another's question.

    The last figure tells how much of the gain comes from reading the question.
    """
    # Neighbours in length, so that another's question is about as long as the own one.
    own = sorted(texts.exams, key=lambda exam: len(exam.prompt))
    others = [
        replace(each, prompt=other.prompt)
        for each, other in zip(own, [*own[1:], own[0]], strict=True)
    ]
    before = _cost(untuned, own)
    after = _cost(tuned, own)
    swapped = _cost(tuned, others)
    return {
        "tuning": {
            "conversations": len(own),
            "before": before.nats_per_token,
            "after": after.nats_per_token,
            "another_question": swapped.nats_per_token,
            "gain": _told("before", "after", compare(before, after)),
            "reading": _told("another_question", "after", compare(swapped, after)),
        }
    }


def _cost(model: Gemma, exams: Sequence[Exam]) -> Perplexity:
    """What the reference answers cost, each counted for itself."""
    totals = []
    with torch.no_grad():
        for exam in exams:
            batch = answering([exam]).to(model.embedding.device)
            totals.append(cross_entropy(model(batch), batch).total.item())
    return Perplexity(
        document_nats=tuple(totals),
        document_tokens=tuple(len(exam.answer) for exam in exams),
        interval=None,
    )


def _told(first: str, second: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        **asdict(comparison),
        "decided": comparison.decided,
    }


def _continuations(
    config: Config, texts: Texts, models: Mapping[str, Gemma]
) -> list[dict[str, Any]]:
    """Held-out text that each model goes on from, with what really followed."""
    key = Key(config.seed, ("continuations",))
    order = Order(key.fold("documents"), len(texts.held_out))
    prompts, followed = [], []
    for number in order.take(min(config.samples, len(texts.held_out))):
        document = texts.held_out[number]
        half = texts.tokenizer.decode(document[len(document) // 2 :])
        line = texts.tokenizer.encode(half.partition("\n")[2])
        if len(line) > PROMPT_TOKENS:
            prompts.append(line[:PROMPT_TOKENS])
            followed.append(line[PROMPT_TOKENS:][:NEW_TOKENS])
    settings = Settings(
        max_new_tokens=NEW_TOKENS,
        temperature=0.7,
        top_p=0.95,
        stop_ids=(texts.tokenizer.control("eos"),),
    )
    bos = texts.tokenizer.control("bos")
    wrote = {
        name: _write(models[name], [[bos, *each] for each in prompts], settings, key, texts)
        for name in CONTINUED
    }
    return [
        {
            "prompt": texts.tokenizer.decode(prompt),
            "reference": texts.tokenizer.decode(truth),
            **{name: wrote[name][number] for name in CONTINUED},
        }
        for number, (prompt, truth) in enumerate(zip(prompts, followed, strict=True))
    ]


def _answers(config: Config, texts: Texts, untuned: Gemma, tuned: Gemma) -> list[dict[str, Any]]:
    """Held-out questions with the reference answer and those before and after tuning."""
    exams = texts.exams[: config.samples]
    settings = Settings(
        max_new_tokens=NEW_TOKENS,
        temperature=0.6,
        top_p=0.9,
        stop_ids=(texts.tokenizer.control("end_of_turn"), texts.tokenizer.control("eos")),
    )
    key = Key(config.seed, ("answers",))
    prompts = [each.prompt for each in exams]
    before = _write(untuned, prompts, settings, key, texts)
    after = _write(tuned, prompts, settings, key, texts)
    return [
        {
            "source": exam.source,
            "question": exam.question,
            "reference": exam.reference,
            "before": before[number],
            "after": after[number],
        }
        for number, exam in enumerate(exams)
    ]


def _write(
    model: Gemma, prompts: Sequence[Sequence[int]], settings: Settings, key: Key, texts: Texts
) -> list[str]:
    """What the model writes after each prompt, without the token that ended it."""
    device = model.embedding.device
    groups = generate(model, [torch.tensor(each, device=device) for each in prompts], settings, key)
    return [
        texts.tokenizer.decode(
            [id_ for id_ in group.completions[0].tokens.tolist() if id_ not in settings.stop_ids]
        )
        for group in groups
    ]


def _facts(
    config: Config, texts: Texts, models: Mapping[str, Gemma], paths: Mapping[str, Path]
) -> dict[str, Any]:
    """What was built, and from what."""
    read = texts.train.manifest
    phases = {
        "teacher": (config.teach, config.context),
        "scratch": (config.learn, config.context),
        "distilled": (config.learn, config.context),
        "tuned": (config.tune, config.tune_context),
    }
    return {
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "corpus": {
            "documents": read.documents,
            "tokens": read.tokens,
            "held_out_documents": len(texts.held_out),
            "held_out_tokens": sum(map(len, texts.held_out)),
            "held_out_bytes": texts.held_out_bytes,
            "conversations": texts.chats.manifest.documents,
        },
        "tokenizer": {
            "entries": texts.tokenizer.vocab_size,
            "bytes_per_token": texts.held_out_bytes / sum(map(len, texts.held_out)),
            "fingerprint": texts.tokenizer.fingerprint(),
        },
        "models": [
            {
                "name": name,
                "parameters": sum(parameter_counts(model.config)),
                "of_which_embedding": parameter_counts(model.config)[0],
                **{key: vars(model.config)[key] for key in SIZES},
                "weights": folders.fingerprint(paths[name]),
            }
            for name, model in models.items()
        ],
        "stages": [
            {
                "name": name,
                "steps": phase.steps,
                "tokens_per_step": phase.rows * context,
                "learning_rate": phase.learning_rate,
            }
            for name, (phase, context) in phases.items()
        ],
    }
