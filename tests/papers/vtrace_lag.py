"""CartPole with a lag, each correction: `python tests/papers/vtrace_lag.py SEEDS [LAG [RATE]]`.

Prints, for each correction and seed, the mean return of the last 100 episodes after every
tenth of the updates (1000: 320,000 frames), and the highest such mean after any update.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
    correction: Correction, seed: int, *, lag: int, rate: float = 3e-3, steps: int = 1000
) -> Iterator[float]:
    """Mean return of the last 100 episodes (or of as many as there were), after every update."""
    spec, key = EnvironmentSpec(name="CartPole-v1"), Key(seed)
    config = vtrace_agent.Config(steps=steps, lag=lag, correction=correction, reward_scale=0.1)
    network = build(
        NetworkConfig(hidden=(64, 64)), signature_of(spec), policy_and_value(), key.fold("weights")
    )
    optimizer = adamw(
        network, OptimizerConfig(learning_rate=rate, betas=(0.9, 0.99), weight_decay=0.0)
    )
    acting = ActingConfig(actors=1, environments=16)
    with Collector(
        network, spec, sample, key.fold("acting"), acting=acting, cutting=config.cutting,
        runtime="inline",
    ) as collector:  # fmt: skip
        for step in vtrace_agent.train(config, network, collector, optimizer):
            yield step.report.get("return", 0.0)


def main(seeds: Sequence[int], lag: int, rate: float) -> None:
    """A line for each correction and seed; without a lag all corrections are one."""
    for correction in ("vtrace", "none", "importance") if lag else ("vtrace",):
        for seed in seeds:
            found = list(returns(correction, seed, lag=lag, rate=rate))
            tenth = len(found) // 10
            cells = " ".join(f"{value:6.1f}" for value in found[tenth - 1 :: tenth])
            sys.stdout.write(f"{correction:<10} {seed}  {cells}   highest {max(found):.1f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = dict(enumerate(sys.argv))
    main(range(int(words[1])), int(words.get(2, 10)), float(words.get(3, 3e-3)))
