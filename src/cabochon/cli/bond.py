"""`train bond`: prompts, a model that goes on from them, a reward that orders what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import torch
from torch import nn
from torch.optim import Optimizer

from cabochon.algorithms import bond
from cabochon.cli.configuration import FLAT
from cabochon.cli.generate import stop_ids
from cabochon.cli.recipe import Recipe, Training
from cabochon.cli.rewarded import examine_prompts, pack, reward_folders, reward_of
from cabochon.cli.rewards import RewardSettings
from cabochon.cli.rollouts import records
from cabochon.cli.settings import RunSettings
from cabochon.core import Backbone, Key, Loss, Objective, Policy, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.tokenizer import Tokenizer
from cabochon.losses.policy_gradient import policy_gradient
from cabochon.models.critic import critic_of
from cabochon.rewards.experience import continued
from cabochon.training.anchors import AnchorConfig, anchor_of
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "BondSettings"]


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class BondSettings:
    """Settings of `train bond`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    rewards: Annotated[RewardSettings, FLAT] = field(default_factory=RewardSettings)
    plain: bool = False
    """Prompts are the beginnings of texts, not turns of conversations."""
    replay: str = ""
    """A run whose RUN/rollouts are learned from: no data, no sampler and no reward are used."""
    no_rollouts: bool = False
    """Do not record what policy and anchor write in RUN/rollouts."""
    no_start_kl: bool = False
    """Do not report kl_start, the KL to the model that the run began with: a forward pass less."""
    method: Annotated[bond.Config, FLAT] = field(default_factory=bond.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)

    def __post_init__(self) -> None:
        if self.replay and not Path(self.replay).exists():
            raise ConfigError(f"--replay {self.replay}: there is no such run")
        if self.run.batch_size * self.method.samples < 2 and self.method.backward > 0.0:
            raise ConfigError(
                "a single sample has no others to be compared with: --batch-size or --samples of "
                "2 or more"
            )


def _train(settings: BondSettings, model: nn.Module, tokenizer: Tokenizer) -> Training:
    method, policy = settings.method, cast(Backbone, model)
    reward = reward_of(settings, policy, tokenizer)
    anchor = anchor_of(model, method.anchor_config)
    learned = method.quantile == "learned"
    quantiles = critic_of(model, method.quantile_model) if learned else None
    beginning = None
    if not settings.no_start_kl:
        frozen = method.anchor == "frozen"
        beginning = anchor.model if frozen else anchor_of(model, AnchorConfig()).model

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        with records(
            settings.run, tokenizer, algorithm="bond", temperature=method.sampling_temperature,
            first=start * method.accumulate, replay=settings.replay,
            wanted=not settings.no_rollouts,
        ) as found:  # fmt: skip
            stops = stop_ids(tokenizer, (), chat=not settings.plain)
            source = found.source
            if reward is not None:
                draw = partial(
                    bond.experiences, method, policy, anchor, reward=reward,
                    key=Key(settings.run.seed), stop_ids=stops,
                )  # fmt: skip
                source = continued(
                    found.recalled, lambda due, step: draw(due, start=step), batches,
                    start=start, accumulate=method.accumulate, writers=2,
                )  # fmt: skip
            yield from bond.train(
                method,
                policy,
                anchor,
                batches,
                optimizer,
                key=Key(settings.run.seed),
                stop_ids=stops,
                quantiles=quantiles,
                beginning=cast("Policy | None", beginning),
                observe=found.observe,
                source=source,
                start=start,
            )

    if quantiles is None:
        return Training(steps=train, extra=anchor.state)
    learning = nn.ModuleDict({"policy": model, "quantiles": quantiles})
    return Training(steps=train, extra={**anchor.state, **quantiles.state()}, learning=learning)


def _objective(settings: BondSettings, _: Policy | None) -> Objective[Policy, TokenBatch]:
    """The update alone, as `plan` rehearses it: rows as long as they may become."""
    rows = settings.method.samples + 1  # a prompt's samples and the anchor's best

    def loss(policy: Policy, batch: TokenBatch) -> Loss:
        whole = TokenBatch(**{k: v.repeat_interleave(rows, 0) for k, v in vars(batch).items()})
        gain = torch.ones_like(whole.tokens, dtype=torch.float32)
        return policy_gradient(policy(whole), whole, gain)

    return loss


RECIPE = Recipe(
    name="bond",
    purpose="learn to write what the best of several samples would be (BOND, J-BOND)",
    settings=BondSettings,
    chat=True,
    pack=partial(pack, algorithm="bond"),
    train=_train,
    objective=_objective,
    folders=reward_folders,
    examine=examine_prompts,
    without_data=lambda settings: bool(settings.replay),
    not_planned="drawing the completions and scoring them; the copies of the weights that are the "
    "anchor, the model at the start and a quantile_model of its own; the rollouts on the disk",
)
