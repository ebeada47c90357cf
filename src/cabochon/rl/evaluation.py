"""What an agent is worth: whole episodes, each environment's first, so that none is too short.

Actions are the likeliest or drawn; nothing is learned and nothing is recorded. A film of an episode
shows what the environment draws of itself or, where observations are pictures, what the agent sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import ConfigError, MissingExtra
from cabochon.files import whole
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.environment import Arrival, Environments, EnvironmentSpec, environments
from cabochon.rl.gymnasium_environments import gymnasium_environment
from cabochon.rl.inference import Choose

__all__ = ["Played", "film", "greedy", "play", "save_gif"]

Array = NDArray[Any]

MOST_AT_ONCE = 32
"""Environments that play side by side."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """Episodes to their ends."""

    returns: tuple[float, ...]
    """Undiscounted sums of rewards."""
    lengths: tuple[int, ...]
    """Actions."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


def greedy(outputs: Any, _environments: Array, _uniform: Array) -> Array:
    """The actions of the largest logits, or Q values."""
    best = outputs["logits" if "logits" in outputs else "q"].argmax(-1)
    actions: Array = best.cpu().numpy()
    return actions


def play(
    network: AgentNetwork,
    spec: EnvironmentSpec,
    episodes: int,
    key: Key,
    choose: Choose = greedy,
    *,
    limit: int = 200_000,
) -> Played:
    """So many episodes, of environments and seeds that training has not met.

    Args:
        network: plays.
        spec: where.
        episodes: how many, each of an environment of its own.
        key: of the seeds and of what is drawn.
        choose: the actions.
        limit: of the actions of each environment; one that does not end within them is an error.

    Raises:
        ConfigError: there is an episode without end.
    """
    if episodes < 1:
        raise ConfigError(f"episodes must be at least 1, got {episodes}")
    returns, lengths = [], []
    for begin in range(0, episodes, MOST_AT_ONCE):
        ids = range(begin, min(episodes, begin + MOST_AT_ONCE))
        opened = environments(spec, ids, key)
        try:
            done: dict[int, tuple[float, int]] = {}
            for time, (arrival, _) in enumerate(_steps(network, opened, key, choose)):
                for place, row in enumerate(arrival.ended.tolist()):
                    one = float(arrival.episode_return[place]), int(arrival.episode_length[place])
                    done.setdefault(row, one)
                if len(done) == len(ids):
                    break
                if time >= limit:
                    raise ConfigError(
                        f"an episode of {spec.name} has not ended after {time} actions; "
                        "give --max-episode-steps"
                    )
        finally:
            opened.close()
        returns += [done[row][0] for row in range(len(ids))]
        lengths += [done[row][1] for row in range(len(ids))]
    return Played(returns=tuple(returns), lengths=tuple(lengths))


def film(
    network: AgentNetwork,
    spec: EnvironmentSpec,
    key: Key,
    choose: Choose = greedy,
    *,
    most: int = 600,
) -> Array:
    """n H W 3 uint8: the pictures of an episode, the first `most` of them.

    Raises:
        ConfigError: the environment neither draws itself nor shows the agent pictures; the message
            says why not.
    """
    if network.signature.is_picture:
        opened = environments(spec, [0], key)
        try:
            pictures = []
            for time, (arrival, _) in enumerate(_steps(network, opened, key, choose)):
                if (time and arrival.first[0]) or time == most:
                    break
                pictures.append(_coloured(arrival.observation[0]))
            return np.stack(pictures)
        finally:
            opened.close()
    return _drawn(network, spec, key, choose, most)


def save_gif(pictures: Array, path: Path, *, per_second: int = 30) -> None:
    """An animated GIF, written whole or not at all.

    Args:
        pictures: n H W 3 uint8.
        path: of the file.
        per_second: pictures.

    Raises:
        MissingExtra: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "rlds", "a video") from error
    scale = max(1, 168 // pictures.shape[1])
    large = pictures.repeat(scale, 1).repeat(scale, 2)
    images = [Image.fromarray(each).quantize(64) for each in large]
    with whole(path) as partial:
        images[0].save(
            partial, format="GIF", save_all=True, append_images=images[1:],
            duration=round(1000 / per_second), loop=0,
        )  # fmt: skip


def _steps(
    network: AgentNetwork, opened: Environments, key: Key, choose: Choose
) -> Iterator[tuple[Arrival, Array]]:
    """Every arrival with the action that will be answered; the first ones included."""
    arrival = opened.reset(0)
    count = len(arrival.ids)
    device = next(network.parameters()).device
    state = network.initial_state(count, device)
    previous = np.zeros(count, np.int64)
    draws = key.fold("play", int(arrival.ids[0])).numpy()
    while True:
        with torch.inference_mode():
            outputs, state = network(
                torch.from_numpy(arrival.observation).to(device),
                torch.from_numpy(previous).to(device),
                torch.from_numpy(arrival.reward).to(device),
                torch.from_numpy(arrival.first).to(device),
                state,
            )
        previous = choose(outputs, arrival.ids, draws.random((count, 2)))
        yield arrival, previous
        arrival = opened.step(previous)


def _drawn(
    network: AgentNetwork, spec: EnvironmentSpec, key: Key, choose: Choose, most: int
) -> Array:
    """As `film`, of an environment that draws itself."""
    opened = environments(spec, [0], key)
    modes = opened.envs[0].metadata.get("render_modes", ())  # type: ignore[attr-defined]
    opened.envs[0].close()  # type: ignore[attr-defined]
    if "rgb_array" not in modes:
        raise ConfigError(f"{spec.name} cannot be filmed: it draws no pictures of itself")
    drawing = gymnasium_environment(spec, render_mode="rgb_array")
    opened.envs[0] = drawing  # type: ignore[attr-defined]
    try:
        pictures = []
        for time, (arrival, _) in enumerate(_steps(network, opened, key, choose)):
            if (time and arrival.first[0]) or time == most:
                break
            pictures.append(np.asarray(drawing.render(), np.uint8))
        return np.stack(pictures)
    except Exception as error:  # whatever a foreign environment raises when it cannot draw
        raise ConfigError(f"{spec.name} cannot be filmed: {error}") from error
    finally:
        opened.close()


def _coloured(picture: Array) -> Array:
    """H W 3, of what the agent sees."""
    if picture.ndim == 2:
        return np.stack([picture] * 3, -1)
    if picture.shape[-1] not in (1, 3, 4):
        picture = np.moveaxis(picture, 0, -1)
    if picture.shape[-1] == 1:
        return np.concatenate([picture] * 3, -1)
    return picture[..., :3]
