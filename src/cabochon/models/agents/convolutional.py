"""What agents see with: observations to features, each row by itself.

    mlp           linear layers of the given widths with tanh between them
    impala_small  conv 16 8x8/4, 32 4x4/2, linear
    impala_deep   3 stages (16, 32, 32 channels: conv 3x3, max-pool 3/2, 2 residual blocks), linear
    nature        conv 32 8x8/4, 64 4x4/2, 64 3x3/1, linear

Source: Espeholt et al. 2018 (IMPALA), arXiv:1802.01561, figure 3 for both of its networks; Mnih et
al. 2015, "Human-level control through deep reinforcement learning", for `nature`, which R2D2 keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cabochon.core.errors import ConfigError
from cabochon.models.agents.pictures import first_layer, has_cells
from cabochon.models.agents.recurrent import Frames

__all__ = ["Residual", "Torso", "convolutions", "convolved", "mlp"]

Torso = Literal["mlp", "impala_small", "impala_deep", "nature"]


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3, of the same channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """n C H W to n C H W."""
        inner: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + inner


def mlp(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """n D to n widths[-1]; tanh after each layer, orthogonal weights of gain sqrt 2.

    Raises:
        ConfigError: a width is below 1.
    """
    if min(widths, default=1) < 1:
        raise ConfigError(f"layers need a width of 1 or more, got {tuple(widths)}")
    layers: list[nn.Module] = []
    for width in widths:
        linear = nn.Linear(inputs, width)
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers)


def convolutions(kind: Torso, shape: tuple[int, int, int], width: int) -> nn.Sequential:
    """n C H W float to n `width`, non-negative: layers of convolutions, and one that joins them.

    Raises:
        ConfigError: the picture is too small for the network, or `kind` is none of pictures.
    """
    channels = shape[0]
    relu = nn.ReLU(inplace=True)  # nobody needs what a layer said before it
    if kind == "impala_small":
        body: list[nn.Module] = [
            nn.Conv2d(channels, 16, 8, 4), relu, nn.Conv2d(16, 32, 4, 2), relu,
        ]  # fmt: skip
    elif kind == "nature":
        body = [
            nn.Conv2d(channels, 32, 8, 4), relu, nn.Conv2d(32, 64, 4, 2), relu,
            nn.Conv2d(64, 64, 3, 1), relu,
        ]  # fmt: skip
    elif kind == "impala_deep":
        body = []
        for wider in (16, 32, 32):
            body += [nn.Conv2d(channels, wider, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
            body += [Residual(wider), Residual(wider)]
            channels = wider
        body.append(relu)
    else:
        raise ConfigError(
            f"{kind} is no torso for pictures; take impala_small, impala_deep, nature"
        )
    layers = nn.Sequential(*body, nn.Flatten())
    try:
        features = layers(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        raise ConfigError(f"pictures of {shape} are too small for the torso {kind}") from error
    return nn.Sequential(layers, nn.Linear(features, width), relu)


def convolved(torso: nn.Sequential, frames: Frames) -> Tensor:
    """What a torso of `convolutions` says of the frames' stacks, T*B `width`.

    Args:
        torso: sees frames and channels as one axis.
        frames: k-1+T B C H W bytes, of brightness from 0 to 255.
    """
    layers, *joining = torso
    assert isinstance(layers, nn.Sequential)
    first, activation, *others = layers
    if has_cells(first, frames.every):
        seen = first_layer(first, frames)
    else:
        stacked = frames.stacked().flatten(2, 3).flatten(0, 1)
        # Convolutions are up to three times quicker with a pixel's channels side by side, and bytes
        # are quicker to move there than floats.
        stacked = stacked.contiguous(memory_format=torch.channels_last)
        seen = activation(first(stacked.float().div_(255.0)))
    for layer in (*others, *joining):
        seen = layer(seen)
    return seen
