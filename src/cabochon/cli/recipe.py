"""What the verbs `train`, `resume`, `plan` and `doctor` need to know about an algorithm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cabochon.cli.rows import Rows
from cabochon.cli.settings import RunSettings
from cabochon.cli.words import unknown
from cabochon.core import Objective, Policy, Step, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.tokenizer import Tokenizer
from cabochon.training.optimizers import OptimizerConfig

if TYPE_CHECKING:
    from cabochon.cli.checks import Check
    from cabochon.cli.drawing import Drawn

__all__ = [
    "AGENTS",
    "ALGORITHMS",
    "Method",
    "Recipe",
    "Train",
    "Training",
    "TrainingSettings",
    "recipe_of",
    "split_words",
]

ALGORITHMS = {
    "pretrain": "cabochon.cli.pretrain",
    "sft": "cabochon.cli.sft",
    "gkd": "cabochon.cli.gkd",
    "reward_model": "cabochon.cli.reward_model",
    "dpo": "cabochon.cli.dpo",
    "rlhf": "cabochon.cli.rlhf",
    "bond": "cabochon.cli.bond",
}
"""Algorithm -> the module whose RECIPE says how to run it."""

AGENTS = {
    "vtrace_agent": "cabochon.cli.vtrace_agent",
    "r2d2": "cabochon.cli.r2d2",
}
"""The same for agents in environments, whose recipes are `agent_recipe.AgentRecipe`s."""

Train = Callable[[Iterable[TokenBatch], Optimizer, int], Iterator[Step]]
"""(micro-batches, optimizer, first update) -> the updates from there to the last."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training loop that carries more from update to update than model and optimizer."""

    steps: Train
    extra: Mapping[str, Tensor]
    """What a checkpoint keeps beside them and restores in place before `steps` is called."""
    learning: nn.Module | None = None
    """What the optimizer is to hold: the model and what learns beside it; the model when absent.
    Parameters of its own are to be in `extra` as well."""


class Method(Protocol):
    """What every paper's Config has."""

    @property
    def steps(self) -> int: ...
    @property
    def accumulate(self) -> int: ...


class TrainingSettings(Protocol):
    """What the settings of every algorithm have."""

    @property
    def run(self) -> RunSettings: ...
    @property
    def method(self) -> Method: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...


S = TypeVar("S", bound=TrainingSettings)


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[S]):
    """One algorithm, as the binary runs it."""

    name: str
    purpose: str
    """What `--help` says."""
    settings: type[S]
    chat: bool
    """The data are conversations."""
    pack: Callable[[S, Tokenizer], Rows]
    """The rows that it learns from."""
    train: Callable[[S, nn.Module, Tokenizer], Train | Training]
    """Loads what else it needs (a teacher) and gives its training loop."""
    objective: Callable[[S, Policy | None], Objective[Policy, TokenBatch]]
    """What is minimised, given a teacher or none."""
    folders: Callable[[S], dict[str, str]]
    """What else the result depends on, by the name of its setting: model folders, teacher caches,
    servers."""
    examine: Callable[[S, Tokenizer, str], tuple[list[Check], list[Drawn]]] | None = None
    """What the doctor finds in a name of `--data`, and a row to draw; None for packed rows."""
    not_planned: str = ""
    """What `plan` leaves out."""
    without_data: Callable[[S], bool] = lambda _: False
    """Whether it learns from something else than `--data`."""
    judges: bool = False
    """What learns gives one number for a text: a language model with a scalar head."""


def recipe_of(algorithm: str) -> Recipe[Any]:
    """The recipe called `algorithm`.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(unknown("algorithm", algorithm, {**ALGORITHMS, **AGENTS}))
    recipe: Recipe[Any] = importlib.import_module(ALGORITHMS[algorithm]).RECIPE
    return recipe


def split_words(verb: str, argv: Sequence[str]) -> tuple[Recipe[Any], Sequence[str]] | None:
    """The recipe that the first word names, and the words after it; None after `--help`.

    Raises:
        ConfigError: the first word names no algorithm.
    """
    if argv and argv[0] in {"-h", "--help"}:
        print(f"usage: cabochon {verb} ALGORITHM [OPTIONS]\n")
        for name, module in {**ALGORITHMS, **AGENTS}.items():
            print(f"  {name:<12}  {importlib.import_module(module).RECIPE.purpose}")
        print(f"\ncabochon {verb} ALGORITHM --help lists the options.")
        return None
    if not argv or argv[0].startswith("-"):
        names = " | ".join({**ALGORITHMS, **AGENTS})
        raise ConfigError(f"which algorithm? cabochon {verb} {names} ...")
    return recipe_of(argv[0]), argv[1:]
