"""Networks that act: what is seen, what was done and got before, and what is remembered.

    torso (mlp or convolutions)  <- the observation, with the frames before it
    + one-hot previous action, clipped previous reward   (where the settings say so)
    LSTM                                                  (where the settings say so)
    heads                        -> named outputs: logits and value, or q

A state is a tuple of tensors, rows first, possibly of none. All time-major, T B. Where an episode
begins (`first`), the state is zero and there is no previous action or reward.

Source: Espeholt et al. 2018 (IMPALA), arXiv:1802.01561, figure 3; Espeholt et al. 2020 (SEED RL),
arXiv:1910.06591. Differs: frames before an episode's first are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.models.agents.convolutional import convolutions, convolved, mlp
from cabochon.models.agents.recurrent import Frames, run_lstm

__all__ = [
    "AgentNetwork",
    "Finals",
    "Head",
    "NetworkConfig",
    "PolicyAndValue",
    "Signature",
    "State",
    "Unrolled",
    "build",
    "policy_and_value",
]

State = tuple[Tensor, ...]
"""What is remembered: rows first."""
Head = Callable[[int, int], nn.Module]
"""(width of the features, number of actions) -> module from n D to named outputs n ...."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What an agent sees and what it can do."""

    shape: tuple[int, ...]
    """Of an observation: (D,), (H, W), (C, H, W) or (H, W, C); () for one of `kinds`."""
    dtype: str
    """numpy's name; uint8 is taken for brightness from 0 to 255."""
    actions: int
    """How many, numbered from 0."""
    kinds: int = 0
    """Of an observation that is a number from 0 to kinds - 1; else 0."""

    @property
    def is_picture(self) -> bool:
        """Two or three axes of bytes."""
        return self.dtype == "uint8" and len(self.shape) in (2, 3)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The shape of an agent's network."""

    torso: Literal["auto", "mlp", "impala_small", "impala_deep", "nature"] = "auto"
    """auto is impala_small for pictures and mlp for everything else."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of an mlp's layers; none: the heads see the observation itself."""
    features: int = 256
    """Width of the layer after convolutions."""
    lstm: int = 0
    """Width of the LSTM; 0: none, the agent remembers nothing (but stacked frames)."""
    frame_stack: int = 1
    """k: how many observations, the newest included, are seen at once."""
    previous: bool = False
    """Also show the previous action and reward."""

    def __post_init__(self) -> None:
        if self.lstm < 0 or self.frame_stack < 1:
            raise ConfigError(
                "lstm must be 0 or more and frame_stack 1 or more, "
                f"got {self.lstm} and {self.frame_stack}"
            )
        if min((*self.hidden, self.features)) < 1:
            raise ConfigError(f"widths must be 1 or more, got {self.hidden} and {self.features}")


class Finals(NamedTuple):
    """The last observations of episodes that were cut short within an unroll."""

    time: Tensor
    """n int64, at least 1: where the *next* episode begins."""
    row: Tensor
    """n int64."""
    observation: Tensor
    """n ...."""


class Unrolled(NamedTuple):
    """What a network says of T observations of B rows."""

    outputs: Mapping[str, Tensor]
    """T B ...."""
    state: State
    """After the last observation."""
    finals: Mapping[str, Tensor]
    """n ...: of the final observations, as if their episodes had gone on; empty without any."""


class PolicyAndValue(nn.Module):
    """Logits of the actions, and the value of the observation."""

    def __init__(self, width: int, actions: int, hidden: Sequence[int] = ()) -> None:
        """Linear on the features, or with layers of the `hidden` widths that each has to itself."""
        super().__init__()
        # Small logits, so that an untrained policy is near uniform.
        self.policy = _with_layers(width, hidden, actions, gain=0.01)
        self.value = _with_layers(width, hidden, 1, gain=1.0)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """n D to logits n A and value n."""
        return {"logits": self.policy(features), "value": self.value(features).squeeze(-1)}


def policy_and_value(hidden: Sequence[int] = ()) -> Head:
    """The head of an actor-critic; see `PolicyAndValue`."""
    return lambda width, actions: PolicyAndValue(width, actions, hidden)


class AgentNetwork(nn.Module):
    """See the module. `build` makes one whose first weights depend on a key."""

    def __init__(self, config: NetworkConfig, signature: Signature, head: Head) -> None:
        super().__init__()
        self.config, self.signature = config, signature
        self.torso, width, self.convolves = _torso(config, signature)
        width += (signature.actions + 1) * config.previous
        self.lstm = nn.LSTM(width, config.lstm) if config.lstm else None
        self.head = head(config.lstm or width, signature.actions)

    def initial_state(self, rows: int, device: torch.device | str = "cpu") -> State:
        """Zeros: nothing was seen yet."""
        state: State = ()
        if self.config.frame_stack > 1:
            dtype = getattr(torch, self.signature.dtype)
            shape = (rows, self.config.frame_stack - 1, *self.signature.shape)
            state += (torch.zeros(shape, dtype=dtype, device=device),)
        if self.config.lstm:
            state += tuple(torch.zeros(rows, self.config.lstm, device=device) for _ in range(2))
        return state

    def forward(
        self,
        observation: Tensor,
        previous_action: Tensor,
        reward: Tensor,
        first: Tensor,
        state: State,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: the outputs, B ..., and the state after it.

        Args:
            observation: B ....
            previous_action: B int64.
            reward: B: what the previous action brought.
            first: B bool: the observation begins an episode.
            state: from before it.
        """
        step = self.unroll(
            observation[None], previous_action[None], reward[None], first[None], state
        )
        return {name: value[0] for name, value in step.outputs.items()}, step.state

    def unroll(
        self,
        observation: Tensor,
        previous_action: Tensor,
        reward: Tensor,
        first: Tensor,
        state: State,
        finals: Finals | None = None,
    ) -> Unrolled:
        """T steps at once; the arguments as those of `forward`, with T before B.

        Args:
            observation: T B ....
            previous_action: T B int64.
            reward: T B.
            first: T B bool.
            state: from before the first step.
            finals: observations that ended episodes cut short; they change no state.
        """
        rest = list(state)
        frames = Frames.of(observation, first, rest.pop(0) if self.config.frame_stack > 1 else None)
        after: State = (frames.state(),) if self.config.frame_stack > 1 else ()
        seen = self._seen(frames).unflatten(0, first.shape)
        features = self._with_previous(seen, previous_action, reward, ~first)
        ended: dict[int, tuple[Tensor, Tensor]] = {}
        if self.lstm is not None:
            features, memory, ended = run_lstm(self.lstm, features, first, (rest[0], rest[1]))
            after += memory
        outputs = self.head(features.flatten(0, 1))
        shaped = {name: value.unflatten(0, first.shape) for name, value in outputs.items()}
        said: Mapping[str, Tensor] = {}
        if finals is not None and len(finals.time):
            said = self._finals(finals, frames, previous_action, reward, ended)
        return Unrolled(shaped, after, said)

    def _finals(
        self,
        finals: Finals,
        frames: Frames,
        previous_action: Tensor,
        reward: Tensor,
        ended: Mapping[int, tuple[Tensor, Tensor]],
    ) -> Mapping[str, Tensor]:
        """What would have been said of the final observations, had the episodes gone on."""
        time, row = finals.time, finals.row
        seen = self._seen(frames.ended(time, row, finals.observation))
        features = self._with_previous(
            seen, previous_action[time, row], reward[time, row], torch.ones_like(time)
        )
        if self.lstm is not None:
            places = list(zip(time.tolist(), row.tolist(), strict=True))
            hidden, cell = (
                torch.stack([ended[t][part][b] for t, b in places])[None] for part in (0, 1)
            )
            features = self.lstm(features[None], (hidden, cell))[0][0]
        said: Mapping[str, Tensor] = self.head(features)
        return said

    def _seen(self, frames: Frames) -> Tensor:
        """What the torso says of each observation, T*B D."""
        if self.signature.is_picture:
            frames = frames._replace(every=_channels_first(frames.every, self.signature.shape))
        if self.convolves:
            return convolved(self.torso, frames)
        stacked = frames.stacked().flatten(0, 1)
        if self.signature.kinds:
            stacked = nn.functional.one_hot(stacked.long(), self.signature.kinds)
        stacked = stacked.flatten(1).float()
        features: Tensor = self.torso(stacked / 255.0 if self.signature.is_picture else stacked)
        return features

    def _with_previous(
        self, features: Tensor, action: Tensor, reward: Tensor, known: Tensor
    ) -> Tensor:
        if not self.config.previous:
            return features
        known = known.to(features.dtype).unsqueeze(-1)
        done = nn.functional.one_hot(action, self.signature.actions).to(features.dtype)
        got = reward.to(features.dtype).clamp(-1.0, 1.0).unsqueeze(-1)
        return torch.cat([features, done * known, got * known], -1)


def build(config: NetworkConfig, signature: Signature, head: Head, key: Key) -> AgentNetwork:
    """A network whose first weights are a function of `key`, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.integer())
        return AgentNetwork(config, signature, head)


def _torso(config: NetworkConfig, signature: Signature) -> tuple[nn.Sequential, int, bool]:
    """The module, the width of its features, and whether it takes pictures."""
    kind = config.torso
    if kind == "auto":
        kind = "impala_small" if signature.is_picture else "mlp"
    if kind == "mlp":
        inputs = (signature.kinds or prod(signature.shape)) * config.frame_stack
        return mlp(inputs, config.hidden), (inputs, *config.hidden)[-1], False
    if not signature.is_picture:
        raise ConfigError(
            f"the torso {kind} is for pictures, and the observations are "
            f"{signature.dtype} of shape {signature.shape}; take mlp"
        )
    channels, height, width = _as_channels(signature.shape)
    shape = (channels * config.frame_stack, height, width)
    return convolutions(kind, shape, config.features), config.features, True


def _with_layers(width: int, hidden: Sequence[int], outputs: int, *, gain: float) -> nn.Module:
    last = nn.Linear((width, *hidden)[-1], outputs)
    nn.init.orthogonal_(last.weight, gain)
    nn.init.zeros_(last.bias)
    return nn.Sequential(mlp(width, hidden), last) if hidden else last


def _as_channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    height, width, channels = shape
    return (channels, height, width) if channels in (1, 3, 4) else (height, width, channels)


def _channels_first(frames: Tensor, shape: tuple[int, ...]) -> Tensor:
    """N B C H W, from the axes as the environment has them."""
    if len(shape) == 2:
        return frames.unsqueeze(2)
    return frames.movedim(-1, 2) if shape[-1] in (1, 3, 4) else frames
