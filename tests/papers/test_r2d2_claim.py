"""R2D2 on a task of memory: stored states, with burn-in, where the memory is longer than that.

    python tests/papers/test_r2d2_claim.py [SEEDS]       prints the table of its page

A cue is shown, and asked for after 10 steps of nothing (CueRecall). Sequences have 4 steps of
burn-in and 16 that are learned, so that most of those that hold a question do not hold its cue.
"""

# ruff: noqa: T201

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("gymnasium")

from cabochon.algorithms import r2d2
from cabochon.core import Key
from cabochon.models.agents.networks import AgentNetwork, NetworkConfig, Signature, build
from cabochon.models.agents.q_network import q_head
from cabochon.rl.collector import Collector
from cabochon.rl.environment import EnvironmentSpec
from cabochon.rl.exploration import epsilon_greedy, epsilons
from cabochon.rl.server import ActingConfig
from cabochon.training.optimizers import OptimizerConfig, adamw

CUES, DELAY, BURN_IN, UPDATES, EARLIER = 3, 10, 4, 500, 100
SEEN = Signature(shape=(CUES + 1,), dtype="float32", actions=CUES)


class Learned(NamedTuple):
    network: AgentNetwork
    before: AgentNetwork
    """As it was `EARLIER` updates before."""
    curve: list[float]
    """Share of right answers, of all cues and some ways to act in between, every 100 updates."""


def learned(
    seed: int,
    *,
    lstm: int = 32,
    burn_in: int = BURN_IN,
    stored: bool = True,
    updates: int = UPDATES,
) -> Learned:
    config = r2d2.Config(
        steps=updates, batch_size=16, unroll_length=16, burn_in=burn_in, stored_state=stored,
        discount=0.99, minimum=20, target_every=50, replay_ratio=4.0,
    )  # fmt: skip
    key = Key(seed)
    # Who is shown the action before can carry the cue in what it does, without any memory.
    shape = NetworkConfig(hidden=(32,), lstm=lstm, previous=bool(lstm))
    network = build(shape, SEEN, q_head(32), key.fold("network"))
    before = copy.deepcopy(network)
    target = copy.deepcopy(network).requires_grad_(False)
    collector = Collector(
        network,
        EnvironmentSpec(
            name="cabochon.rl.cue_recall:CueRecall-v0", options={"cues": CUES, "delay": DELAY}
        ),
        epsilon_greedy(epsilons(16)),
        key,
        acting=ActingConfig(actors=1, environments=16),
        cutting=config.cutting,
        runtime="inline",
    )
    settings = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    replay, curve = r2d2.new_replay(config, network), []
    with collector:
        for step in r2d2.train(
            config, network, target, replay, collector, adamw(network, settings), key=key
        ):
            if (step.index + 1) % 100 == 0:
                curve.append(right(network))
            if step.index + 1 == updates - EARLIER:
                before.load_state_dict(network.state_dict())
    return Learned(network, before, curve)


def life(rows: int) -> dict[str, Tensor]:
    """Whole episodes, T rows ...: every cue as often, whatever was done in between."""
    draw = Key(77).generator()
    times = DELAY + 2
    observation = torch.zeros(times, rows, CUES + 1)
    observation[0, torch.arange(rows), torch.arange(rows) % CUES] = 1.0
    observation[-1, :, -1] = 1.0
    first = torch.zeros(times, rows, dtype=torch.bool)
    first[0] = True
    return {
        "observation": observation,
        "previous_action": torch.randint(CUES, (times, rows), generator=draw),
        "reward": torch.zeros(times, rows),
        "first": first,
    }


@torch.no_grad()
def read(
    network: AgentNetwork, lived: Mapping[str, Tensor], begin: int, end: int, state: Any
) -> Any:
    return network.unroll(*(each[begin:end] for each in lived.values()), state)


def right(network: AgentNetwork, rows: int = 60) -> float:
    said = read(network, life(rows), 0, DELAY + 2, network.initial_state(rows))
    answers = said.outputs["q"][-1].argmax(-1)
    return (answers == torch.arange(rows) % CUES).float().mean().item()


def wrong_q(made: Learned, rows: int = 60) -> dict[str, float]:
    """Relative error of Q at the question, where a sequence begins between cue and question."""
    lived, end = life(rows), DELAY + 2
    none = made.network.initial_state(rows)
    truth = read(made.network, lived, 0, end, none).outputs["q"][-1]
    found = {}
    for stored in (False, True):
        for burn_in in (0, BURN_IN):
            begin = end - 1 - burn_in
            state = read(made.before, lived, 0, begin, none).state if stored else none
            said = read(made.network, lived, begin, end, state).outputs["q"][-1]
            name = f"{'stored' if stored else 'zero'}, burn-in {burn_in}"
            found[name] = ((said - truth).norm() / truth.norm()).item()
    return found


@pytest.mark.claim
@pytest.mark.parametrize("seed", range(3))
def test_stored_states_solve_what_needs_memory_and_what_has_none_cannot(seed: int) -> None:
    made = learned(seed)
    assert made.curve[-1] >= 0.95, made.curve
    wrong = wrong_q(made)
    # The cue is out of reach of the burn-in: only what was stored remembers it.
    assert wrong["zero, burn-in 4"] > 3 * wrong["stored, burn-in 4"], wrong
    without = learned(seed, lstm=0, updates=100)
    assert without.curve == [pytest.approx(1 / CUES)], "the question is the same for every cue"


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    ways: dict[str, dict[str, Any]] = {
        "stored, burn-in 4": {},
        "stored, burn-in 0": {"burn_in": 0},
        "zero, burn-in 4": {"stored": False},
        "zero, burn-in 0": {"stored": False, "burn_in": 0},
        "no LSTM": {"lstm": 0},
    }
    for name, way in ways.items():
        for seed in range(seeds):
            made = learned(seed, **way)
            print(name, seed, np.round(made.curve, 2).tolist(), flush=True)
            if name == "stored, burn-in 4":
                print({n: round(v, 4) for n, v in wrong_q(made).items()}, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
