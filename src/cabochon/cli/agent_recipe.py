"""What `train`, `resume` and `plan` need to know about an algorithm of agents in environments."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from cabochon.cli.recipe import AGENTS
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import AgentNetwork, Head, NetworkConfig, Signature
from cabochon.rl.collector import Collector, Cutting
from cabochon.rl.environment import EnvironmentSpec
from cabochon.rl.inference import Choose
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig

__all__ = [
    "AgentMethod",
    "AgentRecipe",
    "AgentRunSettings",
    "AgentSettings",
    "AgentTraining",
    "agent_recipe_of",
]


@dataclass(frozen=True, kw_only=True)
class AgentRunSettings:
    """Paths, environment and machinery of one run of an agent."""

    out: str = ""
    """The run directory, made by this run."""
    env: str = ""
    """The environment, as Gymnasium knows it: CartPole-v1, ALE/Pong-v5, module:Name-v0."""
    env_options: tuple[str, ...] = ()
    """What it is made with: name=value, where value is JSON or else text."""
    max_episode_steps: int | None = None
    """After so many actions an episode is cut short; the environment's own limit when absent."""
    runtime: Literal["inline", "threads", "processes", "ray"] = "threads"
    """Where actors live. `inline` is deterministic: a resumed run is the same, bit for bit."""
    record: bool = False
    """Record every episode as RLDS in RUN/episodes."""
    evaluation_episodes: int = 20
    """Played when training is done; 0: none."""
    evaluation_actions: Literal["greedy", "drawn"] = "greedy"
    """The likeliest actions, or as in training."""
    video_steps: int = 600
    """Pictures of the film of one of them, at most; 0: none."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ... of learner and inference."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    seed: int = 0
    checkpoint_every: int = 500
    """Updates between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many checkpoints stay."""
    track: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """Also write the metrics for these viewers."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluation_episodes", "video_steps", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        _ = self.options

    @property
    def options(self) -> dict[str, Any]:
        """`env_options` as what they mean."""
        found: dict[str, Any] = {}
        for each in self.env_options:
            name, sign, value = each.partition("=")
            if not sign or not name.isidentifier() or name in found:
                raise ConfigError(f"env_options are different names with values, got {each!r}")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        return found

    @property
    def spec(self) -> EnvironmentSpec:
        """The environment that was asked for.

        Raises:
            ConfigError: none was.
        """
        if not self.env:
            raise ConfigError("where is it to act? --env CartPole-v1, ALE/Pong-v5, ...")
        return EnvironmentSpec(
            name=self.env, options=self.options, max_episode_steps=self.max_episode_steps
        )


class AgentMethod(Protocol):
    """What the Config of every algorithm of agents has."""

    @property
    def steps(self) -> int: ...
    @property
    def cutting(self) -> Cutting: ...


class AgentSettings(Protocol):
    """What the settings of every algorithm of agents have."""

    @property
    def run(self) -> AgentRunSettings: ...
    @property
    def acting(self) -> ActingConfig: ...
    @property
    def network(self) -> NetworkConfig: ...
    @property
    def method(self) -> AgentMethod: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...


S = TypeVar("S", bound=AgentSettings)


@dataclass(frozen=True, kw_only=True)
class AgentTraining:
    """A training loop, and what it carries from update to update."""

    steps: Callable[[Optimizer, int], Iterator[Step]]
    """(optimizer, first update) -> the updates from there to the last."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What a checkpoint keeps beside model and optimizer, restored in place before `steps`."""


@dataclass(frozen=True, kw_only=True)
class AgentRecipe(Generic[S]):
    """One algorithm of agents, as the binary runs it."""

    name: str
    purpose: str
    """What `--help` says."""
    settings: type[S]
    head: Callable[..., Head]
    """Makes the network's head of what `head_settings` gives."""
    head_settings: Callable[[S, Signature], Mapping[str, Any]]
    """JSON values; kept in the agent's folder."""
    choose: Callable[[S], Choose]
    """How actions are chosen while it learns."""
    train: Callable[[S, AgentNetwork, Collector, Key], AgentTraining]
    transitions: Callable[[S], int]
    """How many new transitions an update takes."""
    keeps: Callable[[S, AgentNetwork], int] = lambda _settings, _network: 0
    """Bytes that the algorithm keeps beside network and optimizer: a replay."""


def agent_recipe_of(algorithm: str) -> AgentRecipe[Any]:
    """The recipe of an algorithm in `AGENTS`."""
    recipe: AgentRecipe[Any] = importlib.import_module(AGENTS[algorithm]).RECIPE
    return recipe
