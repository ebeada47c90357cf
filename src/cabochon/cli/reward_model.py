"""`train reward_model`: pairs of answers, and a model that learns which one is better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, cast

from torch import nn
from torch.optim import Optimizer

from cabochon.algorithms import reward_model
from cabochon.cli.checks import Check
from cabochon.cli.configuration import FLAT
from cabochon.cli.drawing import Drawn
from cabochon.cli.pairs import PairSettings, examine_pairs, pair_rows
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.settings import RunSettings
from cabochon.core import Key, Loss, Objective, Policy, Step, TokenBatch
from cabochon.data.preferences import Pairs
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "RewardModelSettings"]


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings:
    """Settings of `train reward_model`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    pairs: Annotated[PairSettings, FLAT] = field(default_factory=PairSettings)
    method: Annotated[reward_model.Config, FLAT] = field(default_factory=reward_model.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)


def _pack(settings: RewardModelSettings, tokenizer: Tokenizer) -> Pairs:
    return pair_rows(settings.run, settings.pairs, tokenizer)


def _train(settings: RewardModelSettings, model: nn.Module, _tokenizer: Tokenizer) -> Train:
    key = Key(settings.run.seed).fold("reward_model")

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        learner = cast(RewardModel, model)
        return reward_model.train(
            settings.method, learner, batches, optimizer, key=key, start=start
        )

    return train


def _objective(
    settings: RewardModelSettings, _teacher: Policy | None
) -> Objective[Policy, TokenBatch]:
    """An update of the language model with a head, as `plan` rehearses it."""
    inner = reward_model.objective(settings.method)

    def loss(model: Policy, batch: TokenBatch) -> Loss:
        pairs = reward_model.PairBatch(rows=batch, key=Key(0))
        return inner(RewardModel(cast(Gemma, model)), pairs)

    return loss


def _examine(
    settings: RewardModelSettings, tokenizer: Tokenizer, name: str
) -> tuple[list[Check], list[Drawn]]:
    return examine_pairs(settings.run, settings.pairs, tokenizer, name)


def _folders(_settings: RewardModelSettings) -> dict[str, str]:
    return {}


RECIPE = Recipe(
    name="reward_model",
    purpose="learn from pairs which answer is better",
    settings=RewardModelSettings,
    chat=True,
    judges=True,
    pack=_pack,
    train=_train,
    objective=_objective,
    folders=_folders,
    examine=_examine,
)
