"""The Gemma 2 recipe: a teacher, a student distilled from it, the same from scratch, tuning.

    corpus -> tokenizer -> teacher -> student from scratch
                                   -> student distilled from the teacher -> tuned on conversations

Both students begin with the same weights and read the same batches in the same order; the teacher
reads more. All are judged on documents that none has read.

Source: Gemma Team 2024, arXiv:2408.00118, sections 3 (the student's target at every position is
the teacher's whole distribution) and 4 (supervised fine-tuning).
Deviations: the report also aligns with human feedback and averages models; those are pipelines of
their own (`warp`, and `functions` in the demo). Sizes, learning rates and lengths are ours: the
report gives no learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from cabochon import folders
from cabochon.algorithms import pretrain, sft
from cabochon.core import Key, Step, TokenBatch
from cabochon.data.packed import Packed
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import findings
from cabochon.pipelines.recipe import Config, Phase, Shape
from cabochon.pipelines.stages import (
    Event,
    Observe,
    Stage,
    hash_of,
    model_of,
    nobody,
    opened,
    probed,
    torch_threads,
    trained,
    with_context,
)
from cabochon.pipelines.texts import Texts, prepared
from cabochon.training.optimizers import OptimizerConfig, adamw

__all__ = ["Config", "Event", "Observe", "Phase", "Shape", "build", "nobody", "run"]


def run(config: Config, folder: Path, observe: Observe = nobody) -> dict[str, object]:
    """The contents of `folder/results.json` after every stage; `folder/report.html` shows them.

    Each training is a run directory in `folder`. One that is complete is left alone, one that was
    interrupted goes on from its last checkpoint, and the result is the same, bit for bit.

    Args:
        config: the recipe.
        folder: where everything goes; made if absent, continued if it holds the same recipe.
        observe: called with every event.

    Returns:
        The results (their schema is in `evaluation.report`).

    Raises:
        RunChanged: `folder` was begun with another recipe or other files.
        DataError: the documents or conversations cannot be used.
        KeyboardInterrupt: SIGINT came and everything was saved.
    """
    config = replace(
        config,
        train=_absolute(config.train),
        held_out=_absolute(config.held_out),
        chats=_absolute(config.chats),
        held_out_chats=_absolute(config.held_out_chats),
    )
    read = (config.train, config.held_out, config.chats, config.held_out_chats)
    inputs = {"seed": config.seed, "files": {path: hash_of(path) for path in read}}
    pipeline = opened(folder, {"pipeline": "gemma2", **asdict(config)}, inputs)
    with pipeline.locked():
        name = Path(config.train).name
        about: dict[str, object] = {
            "pipeline": "gemma2",
            "title": f"A small model family from {name}",
            "text": name,
            "repeat": "",
        }
        return build(config, folder, observe, about)


def build(
    config: Config,
    folder: Path,
    observe: Observe,
    about: dict[str, object],
    further: Callable[[Texts, Mapping[str, Path]], Mapping[str, Any]] | None = None,
) -> dict[str, object]:
    """`run`, in a folder that the caller has opened.

    Args:
        config: the recipe.
        folder: of the pipeline.
        observe: called with every event.
        about: `pipeline`, `title`, `text` and `repeat` of the results.
        further: (texts, model folders by name) -> what else the results shall have; asked until
            they are written.
    """
    with torch_threads(config.threads):
        work = _Work(config, prepared(config, folder, observe), folder, observe)
        teacher = _pretrained(work, "teacher", config.teacher, config.teach, None)
        scratch = _pretrained(work, "scratch", config.student, config.learn, None)
        distilled = _pretrained(work, "distilled", config.student, config.learn, teacher)
        tuned = _tuned(work, distilled)
        models = {"teacher": teacher, "scratch": scratch, "distilled": distilled, "tuned": tuned}
        if further is not None and not (folder / "results.json").is_file():
            about = {**about, **further(work.texts, models)}
        return findings.written(config, work.texts, folder, models, about, observe)


@dataclass(frozen=True)
class _Work:
    """What every training of a pipeline needs."""

    config: Config
    texts: Texts
    folder: Path
    observe: Observe

    def trained(
        self,
        name: str,
        phase: Phase,
        context: int,
        model: Gemma,
        train: Callable[[Iterable[TokenBatch], Optimizer, int], Iterator[Step]],
        rows: Packed,
        probe: TokenBatch,
        key: Key,
        inputs: Mapping[str, Any],
    ) -> Path:
        """The model folder that a training leaves."""
        device = self.config.device
        optimizer = adamw(model, OptimizerConfig(learning_rate=phase.learning_rate))

        def updates(start: int) -> Iterator[Step]:
            batches = rows.batches(key.fold("batches"), phase.rows, start=start)
            on_device = (batch.to(device) for batch in batches)
            steps = train(on_device, optimizer, start)
            return probed(steps, model, probe.to(device), of=phase.steps)

        stage = Stage(
            name=name,
            steps=phase.steps,
            tokens=phase.rows * context,
            settings={
                "stage": name,
                **asdict(phase),
                "tokens_per_step": phase.rows * context,
                "model": asdict(model.config),
            },
            inputs={
                "seed": self.config.seed,
                "tokenizer": self.texts.tokenizer.fingerprint(),
                "data": rows.manifest.sources,
                **inputs,
            },
        )
        tokenizer = self.texts.tokenizer
        return trained(stage, self.folder, model, tokenizer, optimizer, updates, self.observe)


def _pretrained(work: _Work, name: str, shape: Shape, phase: Phase, teacher: Path | None) -> Path:
    """The model folder of a model that has read the corpus, or watched a teacher read it."""
    config, texts = work.config, work.texts
    # Both students have the same role: the same first weights, the same batches.
    key = Key(config.seed).fold("teacher" if name == "teacher" else "student")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = Gemma.init(_sized(work, shape), key.fold("weights"), dtype, device=config.device)
    method = pretrain.Config(steps=phase.steps, warmup=max(1, phase.steps // 50))
    guide = None if teacher is None else model_of(teacher, config.device).requires_grad_(False)

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return pretrain.train(method, model, batches, optimizer, teacher=guide, start=start)

    inputs = {"teacher": {} if teacher is None else folders.fingerprint(teacher)}
    return work.trained(
        name, phase, config.context, model, train, texts.train, texts.probe, key, inputs
    )


def _tuned(work: _Work, student: Path) -> Path:
    """The model folder of a student after learning the conversations."""
    config, texts = work.config, work.texts
    phase, key = config.tune, Key(config.seed).fold("tuning")
    model = with_context(model_of(student, config.device), config.tune_context)
    method = sft.Config(steps=phase.steps, warmup=max(1, phase.steps // 50))

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return sft.train(method, model, batches, optimizer, start=start)

    inputs = {"student": folders.fingerprint(student)}
    return work.trained(
        "tuned",
        phase,
        config.tune_context,
        model,
        train,
        texts.chats,
        texts.chat_probe,
        key,
        inputs,
    )


def _sized(work: _Work, shape: Shape) -> GemmaConfig:
    """A Gemma 2 of this shape for this tokenizer."""
    config, texts = work.config, work.texts
    return GemmaConfig(
        vocab_size=texts.tokenizer.vocab_size,
        **asdict(shape),
        query_scalar=shape.head_width,
        attention_cap=50.0,
        final_cap=30.0,
        post_norms=True,
        context=config.context,
        pad_id=texts.tokenizer.control("pad"),
        eos_id=texts.tokenizer.learnable_end(),
        bos_id=texts.tokenizer.control("bos"),
    )


def _absolute(path: str) -> str:
    return str(Path(path).resolve())
