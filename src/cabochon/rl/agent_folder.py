"""An agent's folder: config.json says what its network is and where it plays, safetensors the rest.

config.json          format, algorithm, network, signature, environment
model.safetensors    the weights
acting.safetensors   in a checkpoint: where every environment and unroll was (`Collector.state`)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from cabochon.core import Key
from cabochon.core.errors import FolderError, WeightsMismatch
from cabochon.models.agents.networks import AgentNetwork, Head, NetworkConfig, Signature, build
from cabochon.rl.environment import EnvironmentSpec

__all__ = ["Agent", "load_agent", "load_into", "read_acting", "save_agent"]

_FORMAT = 1
_ACTING = "acting.safetensors"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """What a folder holds."""

    algorithm: str
    network: AgentNetwork
    spec: EnvironmentSpec


def save_agent(
    folder: Path,
    network: AgentNetwork,
    *,
    algorithm: str,
    head: Mapping[str, Any],
    spec: EnvironmentSpec,
    acting: Mapping[str, Array] | None = None,
) -> None:
    """Writes the folder, which does not exist yet.

    Args:
        folder: where.
        network: the weights and the shape.
        algorithm: what it learned with.
        head: what the algorithm's heads were made with; JSON values.
        spec: the environment.
        acting: what `Collector.state` gave, in a checkpoint.
    """
    folder.mkdir(parents=True)
    config = {
        "format": _FORMAT,
        "algorithm": algorithm,
        "network": asdict(network.config),
        "head": dict(head),
        "signature": asdict(network.signature),
        "environment": asdict(spec),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: each.contiguous() for name, each in network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    if acting:
        arrays = {name: np.ascontiguousarray(each) for name, each in acting.items()}
        safetensors.numpy.save_file(arrays, folder / _ACTING)


def load_agent(folder: Path, heads: Mapping[str, Callable[..., Head]]) -> Agent:
    """The agent of a folder.

    Args:
        folder: as `save_agent` wrote it.
        heads: algorithm -> what makes the head of its networks.

    Raises:
        FolderError: it is no agent's folder, or of an algorithm without a head.
        WeightsMismatch: the weights are not those of the network it describes.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        algorithm, network = config["algorithm"], config["network"]
        signature, spec = config["signature"], EnvironmentSpec(**config["environment"])
        shape = NetworkConfig(**network | {"hidden": tuple(network["hidden"])})
        seen = Signature(**signature | {"shape": tuple(signature["shape"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{folder} is not the folder of an agent: {error}") from error
    if algorithm not in heads:
        raise FolderError(f"{folder} is an agent of {algorithm}, expected {', '.join(heads)}")
    made = build(shape, seen, heads[algorithm](**config["head"]), Key(0))
    load_into(made, folder)
    return Agent(algorithm=algorithm, network=made, spec=spec)


def load_into(network: AgentNetwork, folder: Path) -> None:
    """Reads the weights of a folder.

    Raises:
        FolderError: they are not there or cannot be read.
        WeightsMismatch: they are of another network.
    """
    path = folder / "model.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from error
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsMismatch(f"{path} holds the weights of another network: {error}") from error


def read_acting(folder: Path) -> dict[str, Array]:
    """Where the environments were; empty if the folder does not say."""
    path = folder / _ACTING
    return safetensors.numpy.load_file(path) if path.is_file() else {}
