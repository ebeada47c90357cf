"""One training run from settings to result: prepare everything, then record the updates.

Whatever can be wrong is found while preparing, before a run directory exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from cabochon import folders
from cabochon.cli import teachers
from cabochon.cli.inputs import fingerprints, unchanged
from cabochon.cli.machine import (
    DTYPES,
    device_of,
    model_folder,
    refuse_rows_beyond,
    stated_context,
    tokenizer_of,
)
from cabochon.cli.recipe import Recipe, Train, Training
from cabochon.cli.rows import Rows
from cabochon.cli.settings import RunSettings, shape
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.presets import PRESETS, preset
from cabochon.models.reward_head import RewardModel, is_reward_model
from cabochon.training import parallel
from cabochon.training.checkpoint import TrainingState
from cabochon.training.metrics import Record
from cabochon.training.optimizers import adamw
from cabochon.training.precision import float32_weights
from cabochon.training.runs import Outcome, Run, supervise
from cabochon.weights.ema import ema

__all__ = [
    "Session",
    "begins_from_folder",
    "config_for",
    "load_tokenizer",
    "prepare",
    "with_context",
]

ROW = 256
"""Tokens of a row where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that a run needs, ready to make its first update."""

    settings: Any
    model: Gemma | ForeignModel | RewardModel
    tokenizer: Tokenizer
    rows: Rows
    optimizer: Optimizer
    train: Train
    average: Mapping[str, Tensor]
    """The moving average of the weights, in place; empty when there is none."""
    inputs: Mapping[str, Any]
    """Hashes of what the result depends on."""
    extra: Mapping[str, Tensor]
    """What else moves with the updates, in place; empty when nothing does."""

    @property
    def run(self) -> RunSettings:
        """The part of the settings that all algorithms share."""
        settings: RunSettings = self.settings.run
        return settings

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an update reads, padding included."""
        return self.run.batch_size * self.run.context * int(self.settings.method.accumulate)

    def steps(self, start: int) -> Iterator[Step]:
        """The updates from `start` on; the moving average follows each."""
        key = Key(self.run.seed, ("data",))
        taken = start * self.settings.method.accumulate
        device = device_of(self.run.device)
        batches = self.rows.batches(
            key, self.run.batch_size, taken, rank=parallel.rank(), ranks=parallel.ranks()
        )
        on_device = (batch.to(device) for batch in batches)
        for step in self.train(on_device, self.optimizer, start):
            if self.average:
                ema(self.average, float32_weights(self.model), self.run.ema, out=self.average)
            yield step

    def record(
        self, run: Run, observers: Sequence[Callable[[Record], None]], *, at: int | None = None
    ) -> Outcome:
        """Makes the updates that are left, in the run directory `run`, from checkpoint `at` on."""
        return supervise(
            run,
            self.steps,
            TrainingState(
                save_model=lambda folder: folders.save(self.model, self.tokenizer, folder),
                load_model=self._load,
                optimizer=self.optimizer,
                ema=self.average,
                extra=self.extra,
            ),
            save_every=self.run.checkpoint_every,
            keep=self.run.keep,
            observers=observers,
            at=at,
        )

    def _load(self, folder: Path) -> None:
        read = folders.load_reward if isinstance(self.model, RewardModel) else folders.load
        stored, _ = read(
            folder, dtype=DTYPES[self.run.precision], device=device_of(self.run.device)
        )
        self.model.load_state_dict(stored.state_dict())


def prepare(recipe: Recipe[Any], settings: Any) -> Session:
    """Reads, packs and builds what `settings` name.

    Raises:
        ConfigError: a setting is missing or does not fit another.
        DataError: the data cannot be used, or are changed while they are read.
        TokenizerMismatch: tokenizer, model and teacher do not belong together.
        FolderError: a folder is absent or incomplete.
    """
    run: RunSettings = settings.run
    if not run.data and not recipe.without_data(settings):
        raise ConfigError(
            f"{recipe.name} needs data: --data FILE ... (.jsonl, .parquet, .txt, a folder, stdlib)"
        )
    tokenizer = load_tokenizer(run)
    tokenizer.learnable_end()
    if run.out:
        _refuse_out_within_data(run)
    models = _folders(recipe, settings)
    sources = [*map(str, models.values()), *recipe.folders(settings).values()]
    with unchanged([*run.data, *sources]):
        inputs = fingerprints(run, tokenizer, models) | _teachers(recipe, settings)
        rows = recipe.pack(settings, tokenizer)
        model = _judge(run, tokenizer) if recipe.judges else _model(run, tokenizer)
        given = recipe.train(settings, model, tokenizer)
    training = given if isinstance(given, Training) else Training(steps=given, extra={})
    average = {}
    if run.ema:
        average = {name: weight.clone() for name, weight in float32_weights(model).items()}
    return Session(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        optimizer=adamw(training.learning or model, settings.optimizer),
        train=training.steps,
        average=average,
        inputs=inputs,
        extra=training.extra,
    )


def load_tokenizer(run: RunSettings) -> Tokenizer:
    """The tokenizer that was named, or the model folder's own.

    Raises:
        ConfigError: there is neither.
        TokenizerMismatch: both are there and differ.
    """
    own = Tokenizer.load(model_folder(run.model.source)) if begins_from_folder(run) else None
    if not run.tokenizer:
        if own is None:
            raise ConfigError(
                "a new model needs a tokenizer: --tokenizer FOLDER "
                "(make one: cabochon data tokenizer --data FILE --out FOLDER)"
            )
        return own
    named = tokenizer_of(run.tokenizer)
    unlike = own.difference(named) if own is not None else None
    if unlike is not None:
        raise TokenizerMismatch(
            f"the tokenizer of {run.model.source} and the one in {run.tokenizer} differ: {unlike}; "
            "leave --tokenizer out to use the model's own"
        )
    return named


def _refuse_out_within_data(run: RunSettings) -> None:
    """The run's own files would be data the next time."""
    for name in run.data:
        folder = Path(name).resolve()
        if folder.is_dir() and Path(run.out).resolve().is_relative_to(folder):
            raise ConfigError(
                f"--out {run.out} lies within the data folder {name}, whose files the run reads; "
                "choose a folder outside it"
            )


def with_context(run: RunSettings) -> RunSettings:
    """The same with the length of a row: as was said, else 256, or what the model was made for.

    Raises:
        FolderError: the model folder cannot be read.
    """
    if run.context:
        return run
    longest = None
    if begins_from_folder(run):
        longest = stated_context(model_folder(run.model.source))
    return dataclasses.replace(run, context=min(ROW, longest or ROW))


def begins_from_folder(run: RunSettings) -> bool:
    """True if the run goes on from a model folder, False if it makes a new model of a preset."""
    return run.model.source not in PRESETS and Path(run.model.source).exists()


def config_for(run: RunSettings, tokenizer: Tokenizer) -> GemmaConfig:
    """The shape of the new model: the preset with what was changed, and the tokenizer's ids.

    Raises:
        ConfigError: no such preset, or sizes that do not make a Gemma.
    """
    if run.model.source not in PRESETS and "/" in run.model.source:
        raise ConfigError(
            f"--model {run.model.source} is neither a folder that is there nor a preset "
            f"({', '.join(PRESETS)})"
        )
    config = shape(run.model, preset(run.model.source))
    return dataclasses.replace(
        config,
        vocab_size=tokenizer.vocab_size,
        context=max(config.context, run.context),
        pad_id=tokenizer.control("pad"),
        eos_id=tokenizer.learnable_end(),
        bos_id=tokenizer.control("bos"),
    )


def _model(run: RunSettings, tokenizer: Tokenizer) -> Gemma | ForeignModel:
    dtype, device = DTYPES[run.precision], device_of(run.device)
    if begins_from_folder(run):
        changed = [k for k, v in vars(run.model).items() if k != "source" and v is not None]
        if changed:
            raise ConfigError(
                f"{run.model.source} is a trained model; its {', '.join(changed)} cannot be changed"
            )
        model, _ = folders.load(model_folder(run.model.source), dtype=dtype, device=device)
        refuse_rows_beyond(model.context, run.context, run.model.source)
        if isinstance(model, Gemma):
            model.checkpoint_activations = run.checkpoint_activations
        elif run.checkpoint_activations:
            raise ConfigError("checkpoint_activations works with Gemma models only")
        return model
    config = config_for(run, tokenizer)
    fresh = Gemma.init(config, Key(run.seed, ("weights",)), dtype, device=device)
    fresh.checkpoint_activations = run.checkpoint_activations
    return fresh


def _judge(run: RunSettings, tokenizer: Tokenizer) -> RewardModel:
    """A reward model to go on from, or a language model with a head that prefers nothing yet."""
    if not begins_from_folder(run) or not is_reward_model(model_folder(run.model.source)):
        return RewardModel(_model(run, tokenizer))
    folder = model_folder(run.model.source)
    model, _ = folders.load_reward(
        folder, dtype=DTYPES[run.precision], device=device_of(run.device)
    )
    refuse_rows_beyond(model.context, run.context, run.model.source)
    if isinstance(model.backbone, Gemma):
        model.backbone.checkpoint_activations = run.checkpoint_activations
    return model


def _folders(recipe: Recipe[Any], settings: Any) -> dict[str, Path]:
    """Every model folder that the result depends on, by the name of its setting."""
    named = teachers.models_in(recipe.folders(settings))
    if begins_from_folder(settings.run):
        named["model"] = model_folder(settings.run.model.source)
    return named


def _teachers(recipe: Recipe[Any], settings: Any) -> dict[str, Any]:
    """What the manifest keeps of teachers that are no model folders; nothing without one."""
    named = teachers.identities(recipe.folders(settings))
    return {"teachers": named} if named else {}
