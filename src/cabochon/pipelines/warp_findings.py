"""What a WARP pipeline found out: its members, and a front for each of its merges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cabochon.evaluation import report
from cabochon.evaluation.intervals import mean_interval
from cabochon.evaluation.pareto import Point, hypervolume
from cabochon.evaluation.preference import preferred
from cabochon.generation.engine import Settings
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines.rewarded import Bench
from cabochon.pipelines.stages import Event
from cabochon.pipelines.timing import note_memory, write_json
from cabochon.pipelines.verdicts import Verdict, judged
from cabochon.weights import folders as weight_folders
from cabochon.weights.interpolate import towards

__all__ = ["Round", "angles_of", "between", "gain", "samples_of", "summary", "written"]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One iteration: model folders."""

    start: Path
    members: tuple[Path, ...]
    merged: Path


def written(
    bench: Bench,
    rounds: Sequence[Round],
    settings: Settings,
    about: Mapping[str, Any],
    *,
    etas: Sequence[float],
    keep: float,
    samples: int,
) -> dict[str, object]:
    """The content of results.json, which is written with the report unless it is there already.

    Args:
        bench: the held-out prompts and the reward.
        rounds: the iterations.
        settings: how the policies write.
        about: further facts for the report.
        etas: the points of each front, from 0 to 1.
        keep: which of the last front's is kept.
        samples: completions of each held-out prompt.
    """
    place = bench.folder / "results.json"
    if not place.is_file():
        first = rounds[0].start
        reference = bench.model(first)

        def verdict(name: str, model: Callable[[], Gemma | ForeignModel]) -> Verdict:
            return judged(bench, name, model, reference, settings, samples=samples)

        start = verdict("start", lambda: reference)
        policies, fronts = [summary("start", "start", start)], []
        for number, each in enumerate(rounds, 1):
            for member, path in enumerate(each.members, 1):
                name = f"iteration_{number}_member_{member}"
                found = verdict(name, lambda path=path: bench.model(path))  # type: ignore[misc]
                policies.append(summary(name, "member", found))
            points = [start.point("0")]
            for eta in etas[1:]:
                name = f"iteration_{number}_eta_{eta:g}"
                found = verdict(name, between(bench, first, each.merged, eta))
                points.append(found.point(f"{eta:g}"))
            policies.append(summary(f"iteration_{number}_merged", "warp", found))
            fronts.append(_front(f"iteration {number}", number, points))
        name = f"iteration_{len(rounds)}_eta_{keep:g}"  # a point of the last front, or one more
        kept = verdict(name, between(bench, first, rounds[-1].merged, keep))
        aligned = {
            "policies": [*policies, summary("policy", "warp", kept)],
            "fronts": fronts,
            "hypervolumes": _hypervolumes(fronts),
            "angles": angles_of(rounds),
            "gain": gain(start, kept),
            "samples": samples_of(start, kept),
        }
        facts = {"threads": torch.get_num_threads(), "parameters": _size(reference)}
        write_json(place, {"format": 1, "pipeline": "warp", **about, **facts, "alignment": aligned})
        note_memory(bench.folder)
    bench.observe(Event(stage="report", steps=0, note="draws the page"))
    report.render(bench.folder)
    return dict(json.loads(place.read_text("utf-8")))


def between(bench: Bench, start: Path, end: Path, eta: float) -> Callable[[], Gemma | ForeignModel]:
    """What gives the model (1 - eta) start + eta end."""

    def made() -> Gemma | ForeignModel:
        model = bench.model(start)
        model.load_state_dict(towards(model.state_dict(), bench.model(end).state_dict(), eta))
        return model

    return made


def summary(name: str, role: str, found: Verdict) -> dict[str, Any]:
    """A policy's figures for the report; `role` is its colour."""
    return {
        "name": name,
        "role": role,
        "reward": _mean(found.reward),
        "kl": _mean(found.kl),
        "parts": {part: _mean(values) for part, values in found.parts.items()},
        "entropy": found.entropy,
        "length": found.length,
        "stopped": found.stopped,
        "distinct": found.distinct,
    }


def gain(before: Verdict, after: Verdict, part: str | None = None) -> dict[str, Any]:
    """How much more of the reward (or of one of its parts) there is, prompt by prompt."""
    one, two = (each.parts[part] if part else each.reward for each in (before, after))
    differences = [b - a for a, b in zip(one, two, strict=True)]
    compared = preferred(torch.tensor(two), torch.tensor(one))
    return {
        "of": part or "reward",
        "before": sum(one) / len(one),
        "after": sum(two) / len(two),
        "difference": _mean(differences),
        "kl": _mean(after.kl),
        "preference": asdict(compared) | {"decided": compared.decided},
    }


def samples_of(before: Verdict, after: Verdict) -> list[dict[str, Any]]:
    """The same prompts with what was written before and after."""
    return [
        {
            "prompt": one["prompt"],
            "before": one["completion"],
            "before_reward": one["reward"],
            "after": two["completion"],
            "after_reward": two["reward"],
        }
        for one, two in zip(before.samples, after.samples, strict=True)
    ]


def angles_of(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Cosines of the members' task vectors, over the whole model: near 0, merging gains most."""
    found = []
    for number, each in enumerate(rounds, 1):
        groups, _ = weight_folders.task_vectors(each.start, each.members, per="whole")
        vectors = next(iter(groups.values()))
        cosines = [[None if math.isnan(c) else c for c in row] for row in vectors.cosines.tolist()]
        found.append({"iteration": number, "cosines": cosines, "norms": vectors.norms.tolist()})
    return found


def _front(label: str, number: int, points: Sequence[Point]) -> dict[str, Any]:
    roles = ("tuned", "bond", "warp")
    return {
        "label": label,
        "role": roles[(number - 1) % len(roles)],
        "points": [asdict(point) for point in points],
    }


def _hypervolumes(fronts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each front, within what all of them reach, above the start."""
    points = [[Point(**point) for point in front["points"]] for front in fronts]
    kl = min(max(point.kl for point in front) for front in points)
    return [hypervolume(front, kl=kl, reward=front[0].reward) for front in points]


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "interval": mean_interval(values)}


def _size(model: Gemma | ForeignModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
