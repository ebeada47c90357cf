"""CartPole with a lag, every correction: `python tests/papers/vtrace_lag.py SEEDS [LAG]`.

Prints the mean return of the last 100 episodes after every tenth of 250 updates (80,000 frames).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import torch

from cabochon.algorithms import vtrace_agent
from cabochon.core import Key
from cabochon.models.agents.networks import NetworkConfig, build, policy_and_value
from cabochon.rl.collector import Collector
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.inference import sample
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig, adamw

Correction = Literal["vtrace", "importance", "none"]


def returns(
    correction: Correction, seed: int, *, lag: int, steps: int = 250, rate: float = 3e-3
) -> list[float]:
    """Mean return of the last 100 episodes, after every tenth of the updates."""
    spec, key = EnvironmentSpec(name="CartPole-v1"), Key(seed)
    config = vtrace_agent.Config(
        steps=steps, lag=lag, trace=0.9, correction=correction, schedule="linear"
    )
    network = build(
        NetworkConfig(hidden=()), signature_of(spec), policy_and_value((64, 64)),
        key.fold("weights"),
    )  # fmt: skip
    optimizer = adamw(
        network, OptimizerConfig(learning_rate=rate, betas=(0.9, 0.999), weight_decay=0.0)
    )
    acting = ActingConfig(actors=1, environments=16)
    with Collector(
        network, spec, sample, key.fold("acting"), acting=acting, cutting=config.cutting,
        runtime="inline",
    ) as collector:  # fmt: skip
        return [
            step.report["return"]
            for step in vtrace_agent.train(config, network, collector, optimizer)
            if (step.index + 1) % (steps // 10) == 0
        ]


def main(seeds: Sequence[int], lag: int) -> None:
    """A line for each correction and seed; without lag they are all one."""
    for correction in ("vtrace", "importance", "none") if lag else ("vtrace",):
        for seed in seeds:
            cells = " ".join(f"{value:6.1f}" for value in returns(correction, seed, lag=lag))
            sys.stdout.write(f"{correction:<10} {seed}  {cells}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(range(int(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
