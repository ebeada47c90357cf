"""`train dpo`: pairs of answers, and a policy that learns from them directly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, cast

from torch import nn
from torch.optim import Optimizer

from cabochon import folders
from cabochon.algorithms import dpo
from cabochon.cli.checks import Check
from cabochon.cli.configuration import FLAT
from cabochon.cli.drawing import Drawn
from cabochon.cli.machine import DTYPES, device_of, model_folder
from cabochon.cli.pairs import PairSettings, examine_pairs, pair_rows
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.settings import RunSettings
from cabochon.core import Loss, Objective, Policy, Step, TokenBatch
from cabochon.data.preferences import Pairs
from cabochon.data.tokenizer import Tokenizer
from cabochon.training.anchors import AnchorConfig, anchor_of
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "DpoSettings"]


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """Settings of `train dpo`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    reference: str = ""
    """What the policy is held to, a model folder or run; the policy as it begins when absent."""
    pairs: Annotated[PairSettings, FLAT] = field(default_factory=PairSettings)
    method: Annotated[dpo.Config, FLAT] = field(default_factory=dpo.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)


def _pack(settings: DpoSettings, tokenizer: Tokenizer) -> Pairs:
    return pair_rows(settings.run, settings.pairs, tokenizer)


def _train(settings: DpoSettings, model: nn.Module, tokenizer: Tokenizer) -> Train:
    policy, reference = cast(Policy, model), _reference(settings, model, tokenizer)

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        return dpo.train(
            settings.method, policy, batches, optimizer, reference=reference, start=start
        )

    return train


def _reference(settings: DpoSettings, model: nn.Module, tokenizer: Tokenizer) -> Policy:
    if not settings.reference:
        return cast(Policy, anchor_of(model, AnchorConfig()).model)
    held = folders.load_model(
        model_folder(settings.reference),
        dtype=DTYPES[settings.run.precision],
        device=device_of(settings.run.device),
    )
    folders.check_tokenizer(held, tokenizer)
    return cast(Policy, held.requires_grad_(False))


def _objective(settings: DpoSettings, reference: Policy | None) -> Objective[Policy, TokenBatch]:
    """The update as `plan` rehearses it, where the policy may stand in for its reference."""

    def loss(policy: Policy, batch: TokenBatch) -> Loss:
        return dpo.objective(settings.method, reference or policy)(policy, batch)

    return loss


def _examine(
    settings: DpoSettings, tokenizer: Tokenizer, name: str
) -> tuple[list[Check], list[Drawn]]:
    return examine_pairs(settings.run, settings.pairs, tokenizer, name)


def _folders(settings: DpoSettings) -> dict[str, str]:
    return {"reference": settings.reference} if settings.reference else {}


RECIPE = Recipe(
    name="dpo",
    purpose="learn from pairs of answers directly, held to a reference",
    settings=DpoSettings,
    chat=True,
    pack=_pack,
    train=_train,
    objective=_objective,
    folders=_folders,
    examine=_examine,
    not_planned="the reference: as much memory as the weights again, where it is not named",
)
