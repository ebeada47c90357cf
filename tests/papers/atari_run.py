"""An agent on an Atari game from pixels, with what it took: frames, minutes, frames a second.

    python tests/papers/atari_run.py FOLDER [--agent r2d2] [--game Freeway] [--minutes 30]

Prints a line about every half minute and writes FOLDER/GAME-AGENT-SEED.json: the curve, then the
returns of episodes without exploration, beside those of a policy that acts at random, and of each
action for ever. Pictures are 42 x 42. A frame is one of the game's own; an action lasts for four.
Not a test: it runs as long as it is told to. Needs the extra `atari`.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cabochon.algorithms import r2d2, vtrace_agent
from cabochon.core import Key, Step
from cabochon.models.agents.networks import (
    AgentNetwork,
    NetworkConfig,
    build,
    policy_and_value,
)
from cabochon.models.agents.q_network import q_head
from cabochon.rl.collector import Collector
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.evaluation import greedy, play
from cabochon.rl.exploration import epsilon_greedy, epsilons
from cabochon.rl.inference import sample
from cabochon.rl.replay import Pace
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig, adamw

FRAMES = 4
ACTING = ActingConfig(actors=1, environments=16)


def spec_of(game: str) -> EnvironmentSpec:
    options = {"img_height": 42, "img_width": 42, "num_threads": 1}
    return EnvironmentSpec(name=f"ALE/{game}-v5", options=options)


def learning_by_r2d2(
    game: str, seed: int, runtime: str, pace: Pace
) -> tuple[AgentNetwork, Collector, Iterator[Step]]:
    config = r2d2.Config(
        steps=10**9, batch_size=16, unroll_length=20, burn_in=10, horizon=10, discount=0.99,
        replay_ratio=4.0, target_every=100, capacity=6_000, minimum=100,
    )  # fmt: skip
    key = Key(seed)
    shape = NetworkConfig(torso="impala_small", features=128, lstm=128, previous=True)
    network = build(shape, signature_of(spec_of(game)), q_head(128), key.fold("network"))
    collector = Collector(
        network, spec_of(game), epsilon_greedy(epsilons(ACTING.total)), key,
        acting=ACTING, cutting=config.cutting, runtime=runtime,
    )  # fmt: skip
    optimizer = adamw(
        network,
        OptimizerConfig(learning_rate=5e-4, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0),
    )
    target = copy.deepcopy(network).requires_grad_(False)
    replay = r2d2.new_replay(config, network)
    steps = r2d2.train(config, network, target, replay, collector, optimizer, key=key, pace=pace)
    return network, collector, steps


def learning_by_vtrace(
    game: str, seed: int, runtime: str
) -> tuple[AgentNetwork, Collector, Iterator[Step]]:
    config = vtrace_agent.Config(
        steps=10**9, batch_size=16, unroll_length=20, discount=0.99, max_abs_reward=1.0,
        entropy_cost=0.01, schedule="constant",
    )  # fmt: skip
    key = Key(seed)
    shape = NetworkConfig(torso="impala_small", features=128, frame_stack=4)
    network = build(shape, signature_of(spec_of(game)), policy_and_value(), key.fold("network"))
    collector = Collector(
        network, spec_of(game), sample, key, acting=ACTING, cutting=config.cutting,
        runtime=runtime,
    )  # fmt: skip
    optimizer = adamw(
        network,
        OptimizerConfig(learning_rate=6e-4, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0),
    )
    return network, collector, vtrace_agent.train(config, network, collector, optimizer)


def at_random(outputs: Any, environments: Any, uniform: Any) -> Any:
    return (uniform[:, 1] * outputs["q"].shape[1]).astype(np.int64)


def constantly(action: int) -> Any:
    return lambda _outputs, environments, _uniform: np.full(len(environments), action)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--agent", choices=("r2d2", "vtrace_agent"), default="r2d2")
    parser.add_argument("--game", default="Freeway")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="threads")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pace = Pace()
    if given.agent == "r2d2":
        network, collector, steps = learning_by_r2d2(given.game, given.seed, given.runtime, pace)
        choose = greedy
    else:
        network, collector, steps = learning_by_vtrace(given.game, given.seed, given.runtime)
        choose = sample
    begun = told = time.monotonic()
    busy = time.process_time()
    curve: list[dict[str, float]] = []
    with collector:
        for step in steps:
            now = time.monotonic()
            if now - told > 30.0 or now - begun > 60.0 * given.minutes:
                told = now
                row = {
                    "update": step.index + 1,
                    "frames": FRAMES * step.report["frames"],
                    "minutes": (now - begun) / 60,
                    "processor_minutes": (time.process_time() - busy) / 60,
                    "return": step.report.get("return", float("nan")),
                    "episodes": step.report["episodes"],
                    "loss": step.loss,
                    "q": step.report.get("q", float("nan")),
                    "waited": pace.starved,
                }
                curve.append(row)
                print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if now - begun > 60.0 * given.minutes:
                break
    spec, key = spec_of(given.game), Key(given.seed).fold("evaluation")
    found = play(network, spec, given.episodes, key, choose).returns
    nobody = build(network.config, network.signature, q_head(0), Key(0))
    random = play(nobody, spec, given.episodes, key, at_random).returns
    always = {
        action: float(np.mean(play(nobody, spec, 2, key, constantly(action)).returns))
        for action in range(network.signature.actions)
    }
    last = curve[-1]
    summary = {
        "game": given.game, "agent": given.agent, "seed": given.seed, "curve": curve,
        "frames_per_second": last["frames"] / (60 * last["minutes"]),
        "frames_per_processor_second": last["frames"] / (60 * last["processor_minutes"]),
        "returns": found, "random": random, "always": always,
    }  # fmt: skip
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / f"{given.game}-{given.agent}-{given.seed}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"returns {np.mean(found):.2f} of {found}; random {np.mean(random):.2f} of {random}")


if __name__ == "__main__":
    main()
