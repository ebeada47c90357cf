"""WARP's claims, on worlds whose rewards and divergences are known exactly.

`python tests/papers/test_warp_claim.py` prints the figures of docs/papers/warp.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean

import pytest
import torch
from warp_world import Learning, Worlds, interpolated, judged, learned, picked, stacked, worlds

from cabochon.core import Key
from cabochon.evaluation.intervals import mean_interval
from cabochon.evaluation.pareto import value_at_kl
from cabochon.weights.interpolate import average, slerp, task_vectors, towards

WORLDS = 8
ETA = 0.3


def merging(here: Worlds, seed: int) -> dict[str, list[float]]:
    """For each world what is compared, after three fine-tunings of one start."""
    ends, along = learned(here, here.start, Learning(members=3), Key(seed, ("merging",)))
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for world in range(here.count):
        start = picked(here.start, world)
        members = [picked(ends, 3 * world + number) for number in range(3)]
        run, merged = judged(here, world, members[0]), slerp(start, members[:2])
        fronts = {
            "trajectory": [judged(here, world, picked(each, 3 * world)) for each in along],
            "LITI of 1": interpolated(here, world, start, members[0]),
            "LITI of SLERP(2)": interpolated(here, world, start, merged),
            "LITI of SLERP(3)": interpolated(here, world, start, slerp(start, members)),
        }
        for name, front in fronts.items():
            note(name, value_at_kl(front, 0.6 * run.kl))
        ends_of = {
            "run": run,
            "LERP(2)": judged(here, world, average(members[:2])),
            "SLERP(2)": fronts["LITI of SLERP(2)"][-1],
            "SLERP(3)": fronts["LITI of SLERP(3)"][-1],
        }
        for name, point in ends_of.items():
            note(f"reward of {name}", point.reward)
            note(f"KL of {name}", point.kl)
        note("cosine", float(task_vectors(start, members, "whole")["all"].cosines[0, 1]))
    return found


def iterating(here: Worlds, seed: int) -> dict[str, list[float]]:
    """The fronts of three iterations of two members, at 0.7 of the KL that all of them reach."""
    start, fronts = here.start, []
    for number in range(3):
        key = Key(seed, ("iterating", number))
        ends, _ = learned(here, start, Learning(members=2), key)
        merged = [
            slerp(picked(start, world), [picked(ends, 2 * world), picked(ends, 2 * world + 1)])
            for world in range(here.count)
        ]
        fronts.append(
            [interpolated(here, w, picked(here.start, w), each) for w, each in enumerate(merged)]
        )
        start = stacked([towards(picked(start, w), each, ETA) for w, each in enumerate(merged)])
    reached = [0.7 * min(front[world][-1].kl for front in fronts) for world in range(here.count)]
    return {
        f"iteration {number + 1}": [
            value_at_kl(front[world], reached[world]) for world in range(here.count)
        ]
        for number, front in enumerate(fronts)
    }


def saturating(here: Worlds, seed: int) -> dict[str, list[float]]:
    """Rewards at the middle and the end of long runs with little noise, by anchor."""
    found = {}
    for name, rate in (("frozen", 0.0), ("EMA", 0.01)):
        how = Learning(rate=rate, beta=0.3, noise=0.5, steps=3200, every=1600)
        _, along = learned(here, here.start, how, Key(seed, ("saturating",)))
        for when, each in zip(("middle", "end"), along[1:], strict=True):
            points = [judged(here, world, picked(each, world)) for world in range(here.count)]
            found[f"{name}, {when}"] = [point.reward for point in points]
            found[f"KL of {name}, {when}"] = [point.kl for point in points]
    return found


def above(found: Mapping[str, Sequence[float]], better: str, worse: str) -> bool:
    """The mean difference, world by world, is above 0 beyond its 95% interval."""
    differences = [a - b for a, b in zip(found[better], found[worse], strict=True)]
    interval = mean_interval(differences)
    assert interval is not None
    low, high = interval
    sys.stdout.write(f"{better} - {worse}: {fmean(differences):+.3f}, {low:+.3f} to {high:+.3f}\n")
    return interval[0] > 0.0


def shown(found: Mapping[str, Sequence[float]]) -> None:
    for name, values in found.items():
        sys.stdout.write(
            f"{name:<22} {fmean(values):7.3f}   {min(values):.3f} to {max(values):.3f}\n"
        )


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0])
def test_merged_policies_have_the_better_fronts(seed: int) -> None:
    """Trajectory < LITI of one run < LITI of SLERP of two <= of three, at one KL; SLERP against
    LERP."""
    found = merging(worlds(WORLDS, seed), seed)
    shown(found)
    assert above(found, "LITI of 1", "trajectory")
    assert above(found, "LITI of SLERP(2)", "LITI of 1")
    assert above(found, "LITI of SLERP(3)", "LITI of SLERP(2)")
    assert above(found, "reward of SLERP(2)", "reward of LERP(2)")
    assert above(found, "KL of SLERP(2)", "KL of LERP(2)")
    assert max(found["cosine"]) < 0.7


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0])
def test_every_iteration_raises_the_front(seed: int) -> None:
    found = iterating(worlds(WORLDS, seed), seed)
    shown(found)
    assert above(found, "iteration 2", "iteration 1")
    assert above(found, "iteration 3", "iteration 2")


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0])
def test_a_moving_anchor_goes_on_where_a_frozen_one_saturates(seed: int) -> None:
    """From the middle of a long run to its end; it is farther away for that."""
    found = saturating(worlds(WORLDS, seed), seed)
    late = {
        name: [b - a for a, b in zip(found[f"{name}, middle"], found[f"{name}, end"], strict=True)]
        for name in ("frozen", "EMA")
    }
    shown(found | late)
    assert above(late, "EMA", "frozen")
    assert above(found, "EMA, middle", "frozen, end")
    assert above(found, "KL of EMA, end", "KL of frozen, end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for part in (merging, iterating, saturating):
        sys.stdout.write(f"{part.__name__}, seed {chosen}, {WORLDS} worlds\n")
        shown(part(worlds(WORLDS, chosen), chosen))
