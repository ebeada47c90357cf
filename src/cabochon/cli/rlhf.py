"""`train rlhf`: prompts, a model that goes on from them, and a reward for what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import torch
from torch import nn
from torch.optim import Optimizer

from cabochon.algorithms import rlhf
from cabochon.cli.configuration import FLAT
from cabochon.cli.generate import stop_ids
from cabochon.cli.recipe import Recipe, Training
from cabochon.cli.rewarded import examine_prompts, pack, reward_folders, reward_of
from cabochon.cli.rewards import RewardSettings
from cabochon.cli.rollouts import records
from cabochon.cli.settings import RunSettings
from cabochon.core import Backbone, Key, Loss, Objective, Policy, RewardFn, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.tokenizer import Tokenizer
from cabochon.losses.policy_gradient import policy_gradient
from cabochon.models.critic import critic_of
from cabochon.rewards.ahead import Ahead
from cabochon.rewards.experience import Experience, continued
from cabochon.training.anchors import AnchorConfig, anchor_of
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "RlhfSettings"]


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class RlhfSettings:
    """Settings of `train rlhf`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    rewards: Annotated[RewardSettings, FLAT] = field(default_factory=RewardSettings)
    plain: bool = False
    """Prompts are the beginnings of texts, not turns of conversations."""
    replay: str = ""
    """A run whose RUN/rollouts are learned from: no data, no sampler and no reward are used."""
    no_rollouts: bool = False
    """Do not record what the policy writes in RUN/rollouts."""
    lag: int = 0
    """Let another thread write so many steps ahead, with weights as old as that at most; such
    experience needs a correction. 0: the learner writes itself, when it is due."""
    start_kl: bool = False
    """Report kl_start, the KL to the model that the run began with, where the anchor moves."""
    method: Annotated[rlhf.Config, FLAT] = field(default_factory=rlhf.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)

    def __post_init__(self) -> None:
        if self.replay and not Path(self.replay).exists():
            raise ConfigError(f"--replay {self.replay}: there is no such run")
        if self.lag < 0:
            raise ConfigError(f"--lag {self.lag}: so many steps ahead, 0 or more")
        if self.lag and self.method.correction == "none":
            raise ConfigError(
                f"--lag {self.lag}: what older weights wrote is learned from with importance "
                "ratios; a lag of 1 or more needs --correction truncate, or clip"
            )
        if self.lag and any(name.startswith("matches:") for name in self.rewards.reward):
            raise ConfigError(
                "a regular expression lets no other thread run, so --reward matches:... cannot be "
                "judged by a writer ahead; leave --lag out, or use python:MODULE.FUNCTION"
            )
        if self.lag and self.replay:
            raise ConfigError("--lag is for what is written now, --replay for what was")
        if self.method.baseline == "batch" and self.run.batch_size * self.method.samples < 2:
            raise ConfigError(
                "a single sample has no others to be compared with: --batch-size or --samples of "
                "2 or more"
            )


def _train(settings: RlhfSettings, model: nn.Module, tokenizer: Tokenizer) -> Training:
    method, policy = settings.method, cast(Backbone, model)
    reward = reward_of(settings, policy, tokenizer)
    anchor = anchor_of(model, method.anchor_config)
    critic = critic_of(model, method.critic) if method.baseline == "value" else None
    beginning = None
    if settings.start_kl:
        frozen = method.anchor == "frozen"
        beginning = anchor.model if frozen else anchor_of(model, AnchorConfig()).model

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        with records(
            settings.run, tokenizer, algorithm="rlhf", temperature=method.sampling_temperature,
            first=start * method.accumulate, replay=settings.replay,
            wanted=not settings.no_rollouts,
        ) as found:  # fmt: skip
            stops = stop_ids(tokenizer, (), chat=not settings.plain)
            source = found.source
            if reward is not None:
                draw = partial(_drawn, settings, model, reward, stops)
                source = continued(
                    found.recalled, draw, batches, start=start, accumulate=method.accumulate
                )
            yield from rlhf.train(
                method,
                policy,
                anchor,
                batches,
                optimizer,
                key=Key(settings.run.seed),
                stop_ids=stops,
                critic=critic,
                beginning=cast("Policy | None", beginning),
                observe=found.observe,
                source=source,
                start=start,
            )

    if critic is None:
        return Training(steps=train, extra=anchor.state)
    learning = nn.ModuleDict({"policy": model, "critic": critic})
    return Training(steps=train, extra={**anchor.state, **critic.state()}, learning=learning)


def _drawn(
    settings: RlhfSettings,
    model: nn.Module,
    reward: RewardFn,
    stops: Sequence[int],
    due: Iterable[TokenBatch],
    step: int,
) -> Iterator[Experience]:
    """What the model, or a writer ahead, draws from step `step` on."""
    method = settings.method

    def experiences(writer: Backbone) -> Iterator[Experience]:
        return rlhf.experiences(
            method, writer, due, reward=reward, key=Key(settings.run.seed), stop_ids=stops,
            start=step,
        )  # fmt: skip

    if not settings.lag:
        yield from experiences(cast(Backbone, model))
        return
    with Ahead(
        model, experiences, lag=settings.lag, total=method.steps * method.accumulate,
        start=step * method.accumulate, accumulate=method.accumulate, updates=method.updates,
    ) as source:  # fmt: skip
        yield from source


def _objective(settings: RlhfSettings, _: Policy | None) -> Objective[Policy, TokenBatch]:
    """The update alone, as `plan` rehearses it: rows as long as they may become."""

    def loss(policy: Policy, batch: TokenBatch) -> Loss:
        samples = settings.method.samples
        whole = TokenBatch(**{k: v.repeat_interleave(samples, 0) for k, v in vars(batch).items()})
        gain = torch.ones_like(whole.tokens, dtype=torch.float32)
        found = policy_gradient(policy(whole), whole, gain)
        return replace(found, weight=torch.tensor(float(whole.shape[0])))

    return loss


RECIPE = Recipe(
    name="rlhf",
    purpose="learn from a reward, close to an anchor (REINFORCE, RLOO, GRPO-style)",
    settings=RlhfSettings,
    chat=True,
    pack=partial(pack, algorithm="rlhf"),
    train=_train,
    objective=_objective,
    folders=reward_folders,
    examine=examine_prompts,
    without_data=lambda settings: bool(settings.replay),
    not_planned="drawing the completions and judging them; the copies of the weights that are the "
    "anchor and a critic of its own; the rollouts on the disk",
)
