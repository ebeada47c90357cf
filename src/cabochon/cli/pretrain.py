"""`train pretrain`: documents, and perhaps a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import nn
from torch.optim import Optimizer

from cabochon import folders
from cabochon.algorithms import pretrain
from cabochon.cli.configuration import FLAT
from cabochon.cli.machine import DTYPES, device_of, model_folder, refuse_rows_beyond
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.rows import Rows, document_rows
from cabochon.cli.settings import RunSettings
from cabochon.core import Objective, Policy, Step, TokenBatch
from cabochon.core.errors import TokenizerMismatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "PretrainSettings", "load_teacher"]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of `train pretrain`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    teacher: str = ""
    """A model folder or run whose whole distribution to learn; the text itself when absent."""
    method: Annotated[pretrain.Config, FLAT] = field(default_factory=pretrain.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=OptimizerConfig)


def load_teacher(settings: PretrainSettings, tokenizer: Tokenizer) -> Any:
    """The frozen teacher, in the precision of the run.

    Raises:
        TokenizerMismatch: its vocabulary is not the student's, entry by entry.
        ConfigError: rows are longer than its context.
    """
    run = settings.run
    teacher, own = folders.load(
        model_folder(settings.teacher), dtype=DTYPES[run.precision], device=device_of(run.device)
    )
    unlike = tokenizer.difference(own)
    if unlike is not None:
        raise TokenizerMismatch(
            f"student and teacher {settings.teacher} do not share a vocabulary (student against "
            f"teacher): {unlike}; train the student with the teacher's tokenizer"
        )
    refuse_rows_beyond(teacher.context, run.context, f"the teacher {settings.teacher}")
    return teacher.requires_grad_(False)


def _pack(settings: PretrainSettings, tokenizer: Tokenizer) -> Rows:
    return document_rows(settings.run, tokenizer)


def _train(settings: PretrainSettings, model: nn.Module, tokenizer: Tokenizer) -> Train:
    teacher: Policy | None = load_teacher(settings, tokenizer) if settings.teacher else None

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return pretrain.train(
            settings.method, model, batches, optimizer, teacher=teacher, start=start
        )

    return train


def _objective(
    _settings: PretrainSettings, teacher: Policy | None
) -> Objective[Policy, TokenBatch]:
    return pretrain.objective if teacher is None else pretrain.distillation_objective(teacher)


def _folders(settings: PretrainSettings) -> dict[str, str]:
    return {"teacher": settings.teacher} if settings.teacher else {}


RECIPE = Recipe(
    name="pretrain",
    purpose="learn to predict documents: the next token, or a teacher's distribution over it",
    settings=PretrainSettings,
    chat=False,
    pack=_pack,
    train=_train,
    objective=_objective,
    folders=_folders,
)
