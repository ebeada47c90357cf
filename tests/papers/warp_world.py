"""A world small enough for exact fronts: one of 32 actions for each of 12-dimensional contexts.

Many worlds, and several policies in each, learn side by side as one module whose parameters have
a leading axis; Adam works number by number, so none sees another. Rewards are bounded, known
exactly, and observed through noise of four times their range: what makes the fine-tunings of one
start differ, as sampled text and imperfect rewards do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from cabochon.core import Key
from cabochon.evaluation.pareto import Point
from cabochon.losses.policy_gradient import leave_one_out
from cabochon.training.anchors import AnchorConfig, anchor_of
from cabochon.weights.interpolate import towards

INPUTS, HIDDEN, ACTIONS = 12, 64, 32
SIZES = (INPUTS, HIDDEN, HIDDEN, ACTIONS)
TEST_CONTEXTS = 512
NAMES = [f"layers.{number}.{part}" for number in range(3) for part in ("weight", "bias")]

Weights = Mapping[str, Tensor]


class Policies(nn.Module):
    """n policies 12-64-64-32 with tanh, one for each entry of the parameters' first axis."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for number in range(3):
            layer = nn.Module()
            for part in ("weight", "bias"):
                value = weights[f"layers.{number}.{part}"].clone()
                layer.register_parameter(part, nn.Parameter(value))
            self.layers.append(layer)

    def forward(self, contexts: Tensor) -> Tensor:
        """n B 32: log-probabilities, for contexts n B 12."""
        return logits(dict(self.named_parameters()), contexts).log_softmax(-1)


def logits(weights: Weights, contexts: Tensor) -> Tensor:
    """n B 32, for contexts n B 12 (or B 12, the same for all)."""
    value = contexts
    for number in range(3):
        weight, bias = (weights[f"layers.{number}.{part}"] for part in ("weight", "bias"))
        value = value @ weight + bias.unsqueeze(-2)
        value = torch.tanh(value) if number < 2 else value
    return value


def drawn(count: int, key: Key, scale: float = 1.0) -> dict[str, Tensor]:
    """`count` random networks, stacked."""
    stream = key.generator()
    result = {}
    for number, (before, after) in enumerate(pairwise(SIZES)):
        weight = torch.randn(count, before, after, generator=stream) / before**0.5
        result[f"layers.{number}.weight"] = weight * (scale if number == 2 else 1.5)
        result[f"layers.{number}.bias"] = torch.zeros(count, after)
    return result


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """n worlds: what is good, where policies begin, where they are judged."""

    goal: Weights
    """The reward of action a in context x is tanh of this network's output, n stacked."""
    start: Weights
    """The policies after imitation, n stacked."""
    contexts: Tensor
    """512 12: on which everything is judged, exactly."""

    @property
    def count(self) -> int:
        return len(self.start[NAMES[0]])

    def rewards(self, contexts: Tensor, members: int = 1) -> Tensor:
        """n B 32 in (-1, 1), every world repeated for its members."""
        return torch.tanh(logits(repeated(self.goal, members), contexts))


def repeated(weights: Weights, members: int) -> dict[str, Tensor]:
    """World by world, each `members` times."""
    return {name: each.repeat_interleave(members, 0) for name, each in weights.items()}


def picked(weights: Weights, number: int) -> dict[str, Tensor]:
    """The weights of one policy."""
    return {name: each[number].clone() for name, each in weights.items()}


def stacked(parts: Sequence[Weights]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in NAMES}


def worlds(count: int, seed: int) -> Worlds:
    """Rewards, and policies that imitate an expert who does not know them."""
    key = Key(seed, ("worlds",))
    goal, expert = drawn(count, key.fold("goal"), 1.5), drawn(count, key.fold("expert"), 2.0)
    model = Policies(drawn(count, key.fold("weights")))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    stream = key.fold("imitation").generator()
    for _ in range(400):
        contexts = torch.randn(count, 64, INPUTS, generator=stream)
        said = logits(expert, contexts).softmax(-1)
        optimizer.zero_grad()
        (-(said * model(contexts)).sum(-1).mean(-1).sum()).backward()
        optimizer.step()
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    contexts = torch.randn(TEST_CONTEXTS, INPUTS, generator=key.fold("test").generator())
    return Worlds(goal=goal, start=start, contexts=contexts)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """The defaults are those of alignment by WARP's first stage at this size."""

    steps: int = 1600
    batch: int = 8
    noise: float = 4.0
    learning_rate: float = 1e-3
    beta: float = 0.1
    rate: float = 0.01
    members: int = 1
    every: int = 100
    """Updates between the points of a trajectory."""


def learned(
    here: Worlds, start: Weights, how: Learning, key: Key
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Weights n*members stacked, and those along the way, after REINFORCE with an EMA anchor.

    r - beta log(pi / anchor), less the mean of the others of the batch; rate 0 is a frozen anchor.
    Members differ in the order of contexts and draws alone.
    """
    policies = Policies(repeated(start, how.members))
    anchor = anchor_of(policies, AnchorConfig(kind="ema", rate=how.rate))
    optimizer = torch.optim.Adam(policies.parameters(), lr=how.learning_rate)
    stream, count = key.generator(), here.count * how.members
    along = [{name: each.detach().clone() for name, each in policies.named_parameters()}]
    for step in range(how.steps):
        contexts = torch.randn(count, how.batch, INPUTS, generator=stream)
        logprob = policies(contexts)
        with torch.no_grad():
            uniform = torch.rand(count, how.batch, 1, generator=stream)
            actions = (logprob.exp().cumsum(-1) < uniform).sum(-1, keepdim=True)
            actions = actions.clamp(max=ACTIONS - 1)
            exact = here.rewards(contexts, how.members).gather(-1, actions).squeeze(-1)
            noisy = exact + how.noise * torch.randn(count, how.batch, generator=stream)
            ratio = (logprob - anchor.model(contexts)).gather(-1, actions).squeeze(-1)
            gain = leave_one_out(noisy - how.beta * ratio)
        loss = -(gain * logprob.gather(-1, actions).squeeze(-1)).mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        anchor.move(policies, step)
        if (step + 1) % how.every == 0:
            along.append({n: each.detach().clone() for n, each in policies.named_parameters()})
    return along[-1], along


@torch.no_grad()
def judged(here: Worlds, world: int, weights: Weights, label: str = "") -> Point:
    """Exact reward and exact KL to the imitation, over the test contexts of one world."""
    own = logits(weights, here.contexts).log_softmax(-1)
    origin = logits(picked(here.start, world), here.contexts).log_softmax(-1)
    reward = torch.tanh(logits(picked(here.goal, world), here.contexts))
    return Point(
        kl=(own.exp() * (own - origin)).sum(-1).mean().item(),
        reward=(own.exp() * reward).sum(-1).mean().item(),
        label=label,
    )


def interpolated(here: Worlds, world: int, start: Weights, end: Weights) -> list[Point]:
    """The front of LITI: eleven points from the start to the end."""
    return [
        judged(here, world, towards(start, end, eta / 10), f"{eta / 10:g}") for eta in range(11)
    ]
