"""`train sft`: conversations, of which the model's turns are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from torch import nn
from torch.optim import Optimizer

from cabochon.algorithms import sft
from cabochon.cli.configuration import FLAT
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.rows import Rows, chat_rows
from cabochon.cli.settings import RunSettings
from cabochon.core import Objective, Policy, Step, TokenBatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "SftSettings"]


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """Settings of `train sft`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    method: Annotated[sft.Config, FLAT] = field(default_factory=sft.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)


def _pack(settings: SftSettings, tokenizer: Tokenizer) -> Rows:
    return chat_rows(settings.run, tokenizer)


def _train(settings: SftSettings, model: nn.Module, _tokenizer: Tokenizer) -> Train:
    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return sft.train(settings.method, model, batches, optimizer, start=start)

    return train


def _objective(settings: SftSettings, _teacher: Policy | None) -> Objective[Policy, TokenBatch]:
    return sft.chosen_objective(settings.method)


def _folders(_settings: SftSettings) -> dict[str, str]:
    return {}


RECIPE = Recipe(
    name="sft",
    purpose="learn the model's turns of conversations",
    settings=SftSettings,
    chat=True,
    pack=_pack,
    train=_train,
    objective=_objective,
    folders=_folders,
)
