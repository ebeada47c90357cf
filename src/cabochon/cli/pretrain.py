"""`train pretrain`: documents, and perhaps a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from torch import nn
from torch.optim import Optimizer

from cabochon.algorithms import pretrain
from cabochon.cli.configuration import FLAT
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.rows import Rows, document_rows
from cabochon.cli.settings import RunSettings
from cabochon.cli.teachers import TeacherSettings, check_covers, kind, load_teacher, open_cache
from cabochon.core import Objective, Policy, Step, Teacher, TokenBatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "PretrainSettings"]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of `train pretrain`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    teaching: Annotated[TeacherSettings, FLAT] = field(default_factory=TeacherSettings)
    method: Annotated[pretrain.Config, FLAT] = field(default_factory=pretrain.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.teaching.named and self.method.loss != "cross_entropy":
            raise self.method.taught_otherwise()


def _pack(settings: PretrainSettings, tokenizer: Tokenizer) -> Rows:
    rows = document_rows(settings.run, tokenizer)
    source = settings.teaching.named
    if source and kind(source) == "cache":
        cache = open_cache(source)
        cache.check_tokenizer(tokenizer.fingerprint())
        check_covers(cache, rows)
    return rows


def _train(settings: PretrainSettings, model: nn.Module, tokenizer: Tokenizer) -> Train:
    teacher: Teacher | None = None
    if settings.teaching.named:
        teacher = load_teacher(settings.teaching, settings.run, tokenizer)

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return pretrain.train(
            settings.method, model, batches, optimizer, teacher=teacher, start=start
        )

    return train


def _objective(settings: PretrainSettings, teacher: Policy | None) -> Objective[Policy, TokenBatch]:
    return pretrain.chosen_objective(settings.method, teacher)


def _folders(settings: PretrainSettings) -> dict[str, str]:
    return settings.teaching.sources()


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
