"""`train r2d2`: recurrent Q-learning from a prioritised replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch.optim import Optimizer

from cabochon.algorithms import r2d2
from cabochon.cli.agent_recipe import AgentRecipe, AgentRunSettings, AgentTraining
from cabochon.cli.configuration import FLAT
from cabochon.cli.output import say
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import AgentNetwork, NetworkConfig, Signature
from cabochon.models.agents.q_network import q_head
from cabochon.rl.collector import Collector
from cabochon.rl.exploration import epsilon_greedy, epsilons
from cabochon.rl.inference import Choose
from cabochon.rl.replay import Pace, replay_bytes
from cabochon.rl.sequences import spec_of
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "ExplorationSettings", "R2d2Settings"]

STARVED = 0.5
"""A learner that waits for more of its time than that is told of."""


@dataclass(frozen=True, kw_only=True)
class ExplorationSettings:
    """How the environments' actors depart from what seems best, and the head that says it."""

    epsilon: float = 0.4
    """Environment i of N acts at random at the rate epsilon^(1 + 7 i / (N - 1))."""
    dueling: int = 64
    """Width of the layers that value and advantage have to themselves; 0: one linear layer."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= 1.0 or self.dueling < 0:
            raise ConfigError(
                "epsilon must be in [0, 1] and dueling 0 or more, "
                f"got {self.epsilon} and {self.dueling}"
            )


@dataclass(frozen=True, kw_only=True)
class R2d2Settings:
    """Settings of `train r2d2`."""

    run: Annotated[AgentRunSettings, FLAT] = field(default_factory=AgentRunSettings)
    acting: Annotated[ActingConfig, FLAT] = field(default_factory=ActingConfig)
    network: Annotated[NetworkConfig, FLAT] = field(
        default_factory=lambda: NetworkConfig(hidden=(64,), lstm=64, previous=True)
    )
    exploration: Annotated[ExplorationSettings, FLAT] = field(default_factory=ExplorationSettings)
    method: Annotated[r2d2.Config, FLAT] = field(default_factory=r2d2.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=5e-4, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0
        )
    )


def _head_settings(settings: R2d2Settings, _signature: Signature) -> Mapping[str, Any]:
    return {"dueling": settings.exploration.dueling}


def _choose(settings: R2d2Settings) -> Choose:
    return epsilon_greedy(epsilons(settings.acting.total, base=settings.exploration.epsilon))


def _train(
    settings: R2d2Settings, network: AgentNetwork, collector: Collector, key: Key
) -> AgentTraining:
    target = deepcopy(network).requires_grad_(False)
    replay = r2d2.new_replay(settings.method, network)
    pace = Pace()

    def steps(optimizer: Optimizer, start: int) -> Iterator[Step]:
        try:
            yield from r2d2.train(
                settings.method, network, target, replay, collector, optimizer,
                key=key, pace=pace, start=start,
            )  # fmt: skip
        finally:
            if pace.starved > STARVED:
                say(
                    f"the learner waited for new sequences for {pace.starved:.0%} of its time: "
                    f"with a replay_ratio of {settings.method.replay_ratio:g} each update takes "
                    f"{_transitions(settings)} new actions. More environments, or a higher ratio"
                )

    return AgentTraining(steps=steps, extra=r2d2.carried(replay, target))


def _transitions(settings: R2d2Settings) -> int:
    method = settings.method
    return max(1, round(method.batch_size / method.replay_ratio * method.unroll_length))


def _keeps(settings: R2d2Settings, network: AgentNetwork) -> int:
    method = settings.method
    spec = spec_of(network, method.burn_in + method.unroll_length + 1, method.finals)
    target = sum(each.numel() * each.element_size() for each in network.parameters())
    return replay_bytes(spec, method.capacity) + target


RECIPE = AgentRecipe(
    name="r2d2",
    purpose="an agent with a memory: Q-learning from a prioritised replay of sequences",
    settings=R2d2Settings,
    head=q_head,
    head_settings=_head_settings,
    choose=_choose,
    train=_train,
    transitions=_transitions,
    keeps=_keeps,
)
