"""What a policy is held close to while it learns: its start, a slow average, or an old copy.

With rate mu: anchor <- (1 - mu) anchor + mu policy after each update, which is WARP's anchor
(Ramé et al. 2024, arXiv:2406.16768, equation EMA) and J-BOND's (Sessa et al. 2024,
arXiv:2407.14622, algorithm 2, where the rate is called eta). Averages are kept in float32: in
bfloat16 an increment of a hundredth vanishes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from cabochon.core import Step
from cabochon.core.errors import ConfigError
from cabochon.training.precision import float32_weights
from cabochon.weights.ema import ema

__all__ = ["Anchor", "AnchorConfig", "anchor_of"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """How an anchor moves."""

    kind: Literal["frozen", "ema", "copy"] = "frozen"
    """It stays, follows the policy slowly, or is replaced by it now and then."""
    rate: float = 0.01
    """ema: the policy's share that enters after each update; 0 is frozen, 1 the policy itself."""
    every: int = 1000
    """copy: after so many updates, and their multiples, the anchor becomes the policy."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ConfigError(f"the anchor's rate must lie in [0, 1], got {self.rate}")
        if self.every < 1:
            raise ConfigError(f"an anchor is copied every 1 or more updates, got {self.every}")


class Anchor(Generic[M]):
    """A model with weights of its own that gets no gradients; see `anchor_of`.

    Attributes:
        model: in evaluation mode; predict or draw with it.
        state: by name, the float32 tensors that move, live, for `TrainingState.extra`; empty for a
            frozen anchor, which is made again from what it was made of.
    """

    def __init__(self, model: M, config: AnchorConfig) -> None:
        self.model, self.config = model, config
        weights = dict(model.named_parameters()) if config.kind != "frozen" else {}
        # Parameters that are float32 move in place; shorter ones are published from float32.
        self.state: Mapping[str, Tensor] = {
            name: each.detach().float() for name, each in weights.items()
        }

    def following(self, policy: nn.Module, steps: Iterable[Step]) -> Iterator[Step]:
        """The same updates; after each of them, before it is handed on, the anchor moves."""
        self.publish()
        for step in steps:
            self.move(policy, step.index)
            yield step

    def move(self, policy: nn.Module, step: int) -> None:
        """What happens after update `step` (counted from 0) of `policy`, which has the same names.

        Raises:
            WeightsMismatch: the policy is another model.
        """
        kind = self.config.kind
        if kind == "frozen" or (kind == "copy" and (step + 1) % self.config.every):
            return
        decay = 1.0 - self.config.rate if kind == "ema" else 0.0
        ema(self.state, float32_weights(policy), decay, out=self.state)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Brings the model to the state, which a checkpoint may have restored."""
        for name, parameter in self.model.named_parameters():
            if name in self.state and parameter.dtype != torch.float32:
                parameter.copy_(self.state[name])


def anchor_of(model: M, config: AnchorConfig) -> Anchor[M]:
    """An anchor that starts as a copy of `model`, on its device and of its types.

    A frozen one costs its memory and nothing else.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    return Anchor(copied, config)
