"""Teacher hacking: what a student loses on the truth while it comes closer to its teacher.

    texts -> oracle -> its responses -> teacher, student
                                        teacher's responses -> one student for each regime

The oracle plays the truth. Teacher and student learn a little of its responses; then the student
is distilled from the teacher, from the same beginning and for equally many updates, on sequences
from five sources (see `regimes`). At moments evenly spaced in log step each student's distance to
the teacher (the proxy) and to the oracle (golden) is measured on prompts that nothing has learned.

Source: Tiapkin et al. 2025, arXiv:2502.02671, sections 3 (the three models, stages and metrics)
and 5 (regimes of data).
Deviations: the paper's models are encoder-decoders of T5's kind with up to billions of parameters;
here any model folders can be given, and the default is a family of small decoders that is made on
the spot. Held-out responses of oracle and teacher are drawn once, so that the curves of all
regimes are measured on the same prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from cabochon import folders
from cabochon.algorithms import gkd, pretrain, sft
from cabochon.core import Group, Key, Step, TokenBatch
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.order import Order
from cabochon.data.packing import pack_documents
from cabochon.data.readers import read_documents
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.files import whole
from cabochon.generation.engine import Settings, sampler
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import hacking_findings, regimes
from cabochon.pipelines.hacking_findings import Judges
from cabochon.pipelines.hacking_recipe import Config, Learning
from cabochon.pipelines.pieces import write_pieces
from cabochon.pipelines.recipe import Shape
from cabochon.pipelines.regimes import Pool, Regime
from cabochon.pipelines.responses import Pair, Prompts, drawn, pairs_of, rows_of, split
from cabochon.pipelines.stages import (
    Event,
    Observe,
    Stage,
    hash_of,
    nobody,
    opened,
    torch_threads,
    trained,
)
from cabochon.pipelines.timing import timed
from cabochon.training.optimizers import OptimizerConfig, adamw

__all__ = ["Config", "Learning", "run"]

Model = Gemma | ForeignModel

TOKENIZER_TEXTS = 4_000
"""Of the texts, that a new tokenizer learns from: it only has to be good enough."""


def run(config: Config, folder: Path, observe: Observe = nobody) -> dict[str, object]:
    """The contents of `folder/results.json` after every stage; `folder/report.html` shows them.

    Each training is a run directory in `folder`. One that is complete is left alone, one that was
    interrupted goes on from its last checkpoint, and the result is the same, bit for bit.

    Args:
        config: the experiment.
        folder: where everything goes; made if absent, continued if it holds the same experiment.
        observe: called with every event.

    Returns:
        The results (their schema is in `evaluation.hacking_page`).

    Raises:
        RunChanged: `folder` was begun with other settings or files.
        DataError: the texts give too few prompts.
        ConfigError: prompt and response are longer than a given model's context.
        TokenizerMismatch: the models that were given do not share a tokenizer.
        KeyboardInterrupt: SIGINT came and everything was saved.
    """
    config = _resolved(config)
    given = (config.oracle, config.teacher, config.student, config.data)
    inputs = {"seed": config.seed, "files": {path: hash_of(path) for path in given if path}}
    settings = {"pipeline": "teacher_hacking", **asdict(config)}
    with opened(folder, settings, inputs).locked(), torch_threads(config.threads):
        work = _prepared(config, folder, observe)
        paths = {"oracle": _oracle(work)}
        oracle = _model(work, paths["oracle"])
        truth = _drawn(work, "oracle", oracle, work.prompts.oracle, 1)
        for name in ("teacher", "student"):
            paths[name] = _tuned(work, name, paths["oracle"], truth)
        teacher = _model(work, paths["teacher"])
        judges = Judges(
            oracle=oracle,
            teacher=teacher,
            from_oracle=_held_out(work, "oracle", oracle),
            from_teacher=_held_out(work, "teacher", teacher),
        )
        pool = _pool(work, teacher)
        begun = dict(paths)
        for each in config.regimes:
            paths[each] = _distilled(work, each, begun, judges, pool)
        rows, steps = config.distil.rows, config.distil.steps
        asked: dict[str, int] = {
            each: regimes.responses_drawn(each, pool, rows=rows, steps=steps)
            for each in config.regimes
        }
        return hacking_findings.written(
            config,
            folder,
            paths,
            lambda path: _model(work, path),
            judges,
            work.prompts,
            work.settings,
            asked,
            observe,
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every stage needs."""

    config: Config
    folder: Path
    observe: Observe
    texts: Path
    tokenizer: Tokenizer
    prompts: Prompts

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    @property
    def settings(self) -> Settings:
        """Of every response: sampled from the whole distribution."""
        return Settings(
            max_new_tokens=self.config.response_tokens, stop_ids=(self.tokenizer.learnable_end(),)
        )

    def key(self, *branches: str | int) -> Key:
        return Key(self.config.seed).fold(*branches)


def _prepared(config: Config, folder: Path, observe: Observe) -> _Work:
    """Texts, tokenizer and prompts; what was made before is read from `folder`."""
    texts = Path(config.data) if config.data else folder / "corpus" / "texts.jsonl"
    if not texts.exists():
        observe(Event(stage="corpus", steps=0, note="reads the standard library"))
        with timed(folder, "corpus"):
            write_pieces(texts)
    tokenizer = _tokenizer(config, folder, texts, observe)
    tokenizer.learnable_end()
    many = config.prompts * config.responses
    prompts = split(
        (each.text for each in read_documents(texts, config.field)),
        tokenizer,
        longest=config.prompt_tokens,
        sizes=(config.oracle_prompts, many, config.held_out),
        key=Key(config.seed).fold("prompts"),
        origin=config.data or "the standard library",
    )
    return _Work(
        config=config,
        folder=folder,
        observe=observe,
        texts=texts,
        tokenizer=tokenizer,
        prompts=prompts,
    )


def _tokenizer(config: Config, folder: Path, texts: Path, observe: Observe) -> Tokenizer:
    """That of the models that were given, which must agree; else one trained on the texts."""
    given = [each for each in (config.oracle, config.teacher, config.student) if each]
    if given:
        first, *others = (Tokenizer.load(each) for each in given)
        for name, other in zip(given[1:], others, strict=True):
            if (unlike := first.difference(other)) is not None:
                raise TokenizerMismatch(
                    f"{given[0]} and {name} do not share a tokenizer: {unlike}; their "
                    "distributions cannot be compared"
                )
        return first
    place = folder / "tokenizer"
    if not place.exists():
        observe(Event(stage="tokenizer", steps=0, note=f"learns {config.vocab_size} entries"))
        with timed(folder, "tokenizer"), whole(place) as aside:
            read = (each.text for each in read_documents(texts, config.field))
            train_tokenizer(islice(read, TOKENIZER_TEXTS), config.vocab_size).save(aside)
    return Tokenizer.load(place)


def _oracle(work: _Work) -> Path:
    """The folder of the oracle: given, or pre-trained on the texts."""
    config = work.config
    if config.oracle:
        return Path(config.oracle)
    model = _new(work, config.oracle_shape, "oracle")
    rows = pack_documents(work.tokenizer, read_documents(work.texts, config.field), config.context)
    phase, key = config.learn, work.key("oracle", "batches")
    method = pretrain.Config(steps=phase.steps, warmup=phase.warmup, schedule=phase.schedule)

    def updates(optimizer: Optimizer, start: int) -> Iterator[Step]:
        batches = (b.to(config.device) for b in rows.batches(key, phase.rows, start=start))
        return pretrain.train(method, model, batches, optimizer, start=start)

    return _learned(work, "oracle", phase, model, updates, {"data": rows.manifest.sources})


def _tuned(work: _Work, name: str, oracle: Path, truth: list[Group]) -> Path:
    """The folder of a model that has learned the oracle's responses."""
    config, key = work.config, work.key(name, "batches")
    given: str = getattr(config, name)
    shape, phase = {
        "teacher": (config.teacher_shape, config.teach),
        "student": (config.student_shape, config.begin),
    }[name]
    if phase.steps == 0:
        return Path(given)
    model = _model(work, Path(given)) if given else _new(work, shape, name)
    method = sft.Config(steps=phase.steps, warmup=phase.warmup, schedule=phase.schedule)
    pairs = pairs_of(truth)

    def updates(optimizer: Optimizer, start: int) -> Iterator[Step]:
        batches = (b.to(config.device) for b in _batches(pairs, phase.rows, key, start))
        return sft.train(method, model, batches, optimizer, start=start)

    inputs = {"oracle": folders.fingerprint(oracle), "begins": given}
    return _learned(work, name, phase, model, updates, inputs)


def _distilled(
    work: _Work, regime: Regime, paths: Mapping[str, Path], judges: Judges, pool: Pool
) -> Path:
    """The folder of a student that was distilled from the teacher in one regime."""
    config, phase = work.config, work.config.distil
    model, key = _model(work, paths["student"]), work.key("distillation")
    method = gkd.Config(
        preset="on_policy" if regime == "online_student" else "supervised_kd",
        divergence=config.divergence,
        divergence_parameter=config.divergence_parameter,
        average="token",
        max_new_tokens=config.response_tokens,
        steps=phase.steps,
        warmup=phase.warmup,
        schedule=phase.schedule,
    )
    teacher = sampler(judges.teacher, work.settings, 1)

    def updates(optimizer: Optimizer, start: int) -> Iterator[Step]:
        found = regimes.batches(regime, pool, teacher, rows=phase.rows, key=key, start=start)
        steps = gkd.train(
            method,
            model,
            (batch.to(config.device) for batch in found),
            optimizer,
            key=key.fold(regime),
            stop_ids=work.settings.stop_ids,
            teacher=judges.teacher,
            start=start,
        )
        place = work.folder / regime / "curve"
        return hacking_findings.measured(
            steps, model, judges, place, total=phase.steps, points=config.points
        )

    inputs = {name: folders.fingerprint(path) for name, path in paths.items()}
    return _learned(work, regime, phase, model, updates, inputs)


def _pool(work: _Work, teacher: Model) -> Pool:
    """The teacher's responses to the prompts of the distillation."""
    config, prompts = work.config, work.prompts.distillation
    key = work.key("responses", "teacher")  # one for both: the prompts of `few` begin `many`
    few = _drawn(work, "few", teacher, prompts[: config.prompts], config.responses, key)
    many: list[Group] = []
    if "more_prompts" in config.regimes:
        many = _drawn(work, "many", teacher, prompts, 1, key)
    return Pool(few=few, many=many)


def _held_out(work: _Work, name: str, model: Model) -> list[Group]:
    """Responses to the held-out prompts; every model draws them with the same key."""
    count, key = work.config.held_out_responses, work.key("responses", "held_out")
    return _drawn(work, f"held_out_{name}", model, work.prompts.held_out, count, key)


def _drawn(
    work: _Work,
    name: str,
    model: Model,
    prompts: Sequence[Sequence[int]],
    samples: int,
    key: Key | None = None,
) -> list[Group]:
    """A model's responses, from the folder where they are kept."""
    note = f"{samples} to each of {len(prompts)} prompts"
    work.observe(Event(stage=f"responses/{name}", steps=0, note=note))
    with timed(work.folder, f"responses/{name}"):
        return drawn(
            work.folder / "responses" / name,
            model,
            prompts,
            work.settings,
            key or work.key("responses", name),
            samples=samples,
            device=work.config.device,
        )


def _batches(pairs: list[Pair], rows: int, key: Key, start: int) -> Iterator[TokenBatch]:
    order = Order(key, len(pairs), start * rows)
    while True:
        yield rows_of([pairs[number] for number in order.take(rows)])


def _learned(
    work: _Work,
    name: str,
    phase: Learning,
    model: Model,
    updates: Callable[[Optimizer, int], Iterator[Step]],
    inputs: Mapping[str, Any],
) -> Path:
    """The model folder that a training leaves."""
    optimizer = adamw(model, OptimizerConfig(learning_rate=phase.learning_rate))
    tokens = phase.rows * work.config.context
    stage = Stage(
        name=name,
        steps=phase.steps,
        tokens=tokens,
        settings={"stage": name, **asdict(phase), "tokens_per_step": tokens},
        inputs={
            "seed": work.config.seed,
            "tokenizer": work.tokenizer.fingerprint(),
            **inputs,
        },
    )
    return trained(
        stage,
        work.folder,
        model,
        work.tokenizer,
        optimizer,
        lambda start: updates(optimizer, start),
        work.observe,
    )


def _model(work: _Work, path: Path) -> Model:
    model = folders.load_model(path, dtype=work.dtype, device=work.config.device)
    if model.context < work.config.context:
        raise ConfigError(
            f"{path} is meant for {model.context} tokens; prompt_tokens and response_tokens are "
            f"{work.config.context} together; lower one of them"
        )
    return model


def _new(work: _Work, shape: Shape, name: str) -> Gemma:
    """A Gemma 2 of this shape for this tokenizer."""
    config, tokenizer = work.config, work.tokenizer
    made = GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        **asdict(shape),
        query_scalar=shape.head_width,
        attention_cap=50.0,
        final_cap=30.0,
        post_norms=True,
        context=config.context,
        pad_id=tokenizer.control("pad"),
        eos_id=tokenizer.learnable_end(),
        bos_id=tokenizer.control("bos"),
    )
    return Gemma.init(made, work.key(name, "weights"), work.dtype, device=config.device)


def _resolved(config: Config) -> Config:
    return replace(
        config,
        oracle=_absolute(config.oracle),
        teacher=_absolute(config.teacher),
        student=_absolute(config.student),
        data=_absolute(config.data),
    )


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""
