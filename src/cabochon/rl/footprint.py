"""What a run of agents will take, found by opening an actor's environments and stepping them.

One actor's environments are really made, and closed again; the network reads a batch of nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from cabochon.core import Key
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.collector import Cutting
from cabochon.rl.environment import EnvironmentSpec, environments
from cabochon.rl.server import ActingConfig
from cabochon.runtime.memory import private_megabytes

__all__ = ["PROCESS_MB", "Footprint", "actor_megabytes", "measure", "unroll_bytes"]

PROCESS_MB = 150.0
"""Megabytes that an actor in a process of its own holds for itself alone, beside its environments:
the interpreter and what torch and the other libraries allocate.

Measured on Linux with the CPU build of torch 2.13: the anonymous pages of the actors of a run were
149 MB with a CartPole each, 153 MB with a Pong each. Another 78 to 82 MB of their resident memory
were pages of libraries that all of them share."""

STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Seconds and bytes."""

    step_seconds: float
    """Of one environment, for one action."""
    inference_seconds: float
    """Of one full batch of inference."""
    learning_seconds: float
    """Of the network's unroll over a batch, there and back."""
    actor_megabytes: float
    """Of the environments of one actor, and of its process where it has one."""
    unroll_bytes: int
    """Of one unroll."""


def actor_megabytes(spec: EnvironmentSpec, acting: ActingConfig, runtime: str) -> float:
    """What one actor takes of memory, measured by opening its environments."""
    megabytes, _ = _opened(spec, acting)
    return megabytes + (PROCESS_MB if runtime in ("processes", "ray") else 0.0)


def measure(
    spec: EnvironmentSpec,
    network: AgentNetwork,
    acting: ActingConfig,
    cutting: Cutting,
    runtime: str,
) -> Footprint:
    """Opens, steps and reads; makes no update."""
    megabytes, step_seconds = _opened(spec, acting)
    batch = acting.inference_batch or acting.total
    steps = cutting.overlap + cutting.length + 1
    with torch.inference_mode():
        inference = min(_timed(network, 1, batch, backward=False) for _ in range(3))
    learning = _timed(network, steps, cutting.batch, backward=True)
    network.zero_grad()
    return Footprint(
        step_seconds=step_seconds,
        inference_seconds=inference,
        learning_seconds=learning,
        actor_megabytes=megabytes + (PROCESS_MB if runtime in ("processes", "ray") else 0.0),
        unroll_bytes=unroll_bytes(network, cutting),
    )


def unroll_bytes(network: AgentNetwork, cutting: Cutting) -> int:
    """Of one unroll: observations, scalars, outputs and state."""
    signature = network.signature
    seen = prod(signature.shape) * np.dtype(signature.dtype).itemsize
    step = seen + 8 + 4 + 3 + 8 + 8 + 4 * (signature.actions + 1)
    state = sum(part.nbytes for part in network.initial_state(1))
    return step * (cutting.overlap + cutting.length + 1) + state


def _opened(spec: EnvironmentSpec, acting: ActingConfig) -> tuple[float, float]:
    """Megabytes of an actor's environments, and seconds of one step of one of them."""
    environments(spec, [0], Key(0)).close()  # what is loaded once is not an environment's own
    before = private_megabytes(os.getpid())
    opened = environments(spec, range(acting.environments), Key(0))
    try:
        opened.reset(0)
        actions = np.zeros(acting.environments, np.int64)
        begun = time.perf_counter()
        for _ in range(STEPS):
            opened.step(actions)
        seconds = (time.perf_counter() - begun) / (STEPS * acting.environments)
        return max(0.0, private_megabytes(os.getpid()) - before), seconds
    finally:
        opened.close()


def _timed(network: AgentNetwork, steps: int, rows: int, *, backward: bool) -> float:
    signature = network.signature
    device = next(network.parameters()).device
    dtype = getattr(torch, signature.dtype)
    scalars = torch.zeros(steps, rows, device=device)
    begun = time.perf_counter()
    unrolled = network.unroll(
        torch.zeros(steps, rows, *signature.shape, dtype=dtype, device=device),
        scalars.long(),
        scalars,
        scalars.bool(),
        network.initial_state(rows, device),
    )
    if backward:
        torch.stack([each.sum() for each in unrolled.outputs.values()]).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
