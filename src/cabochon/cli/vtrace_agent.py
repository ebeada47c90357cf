"""`train vtrace_agent`: actors, central inference, and a learner that corrects for its lag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch.optim import Optimizer

from cabochon.algorithms import vtrace_agent
from cabochon.cli.agent_recipe import AgentRecipe, AgentRunSettings, AgentTraining
from cabochon.cli.configuration import FLAT
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import (
    AgentNetwork,
    NetworkConfig,
    Signature,
    policy_and_value,
)
from cabochon.rl.collector import Collector
from cabochon.rl.inference import Choose, sample
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "HeadSettings", "VtraceAgentSettings"]


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What policy and value do not share."""

    own_layers: tuple[int, ...] | None = None
    """Widths of the layers that each has to itself; when absent none for pictures or where --hidden
    gives layers to share, else 64 and 64."""

    def __post_init__(self) -> None:
        if min(self.own_layers or (1,)) < 1:
            raise ConfigError(f"own_layers are widths of 1 or more, got {self.own_layers}")


@dataclass(frozen=True, kw_only=True)
class VtraceAgentSettings:
    """Settings of `train vtrace_agent`."""

    run: Annotated[AgentRunSettings, FLAT] = field(default_factory=AgentRunSettings)
    acting: Annotated[ActingConfig, FLAT] = field(default_factory=ActingConfig)
    network: Annotated[NetworkConfig, FLAT] = field(
        default_factory=lambda: NetworkConfig(hidden=())
    )
    heads: Annotated[HeadSettings, FLAT] = field(default_factory=HeadSettings)
    method: Annotated[vtrace_agent.Config, FLAT] = field(default_factory=vtrace_agent.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-3, betas=(0.9, 0.999), weight_decay=0.0
        )
    )


def _head_settings(settings: VtraceAgentSettings, signature: Signature) -> Mapping[str, Any]:
    own = settings.heads.own_layers
    if own is None:
        shares = signature.is_picture or settings.network.hidden
        own = () if shares else (64, 64)
    return {"hidden": list(own)}


def _train(
    settings: VtraceAgentSettings, network: AgentNetwork, collector: Collector, _key: Key
) -> AgentTraining:
    def steps(optimizer: Optimizer, start: int) -> Iterator[Step]:
        return vtrace_agent.train(settings.method, network, collector, optimizer, start=start)

    return AgentTraining(steps=steps)


def _transitions(settings: VtraceAgentSettings) -> int:
    method = settings.method
    return method.unroll_length * method.batch_size * method.accumulate


def _choose(_settings: VtraceAgentSettings) -> Choose:
    return sample


RECIPE = AgentRecipe(
    name="vtrace_agent",
    purpose="an agent in an environment: central inference, learning corrected by V-trace",
    settings=VtraceAgentSettings,
    head=policy_and_value,
    head_settings=_head_settings,
    choose=_choose,
    train=_train,
    transitions=_transitions,
)
