"""The experiment of the claim with several seeds: the table and the picture of its page.

    python tests/papers/teacher_hacking_seeds.py FOLDER SEED ...

A seed's curves are kept in FOLDER/SEED.json and not made again; the table is printed from all that
are there, and the picture of the first is drawn as FOLDER/teacher_hacking.png. About a minute of
processor time a seed.
"""

# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from window_models import Outcome, experiment

from cabochon.evaluation.distances import Change, Distance, change
from cabochon.evaluation.hacking import Detector, detect, judge
from cabochon.evaluation.hacking_figures import Curve, summary_png
from cabochon.evaluation.hacking_page import REGIME_NAMES

WATCH = Detector(warmup=16, fitted=8)


def kept(outcome: Outcome) -> dict[str, Any]:
    return {
        "teacher": outcome.teacher.prompts,
        "start": outcome.start.prompts,
        "curves": {
            name: {
                "steps": curve.steps,
                "proxy": [each.prompts for each in curve.proxy],
                "golden": [each.prompts for each in curve.golden],
            }
            for name, curve in outcome.curves.items()
        },
    }


def distances(found: list[list[float]]) -> list[Distance]:
    return [Distance(prompts=tuple(each)) for each in found]


def told(moved: Change) -> str:
    low, high = moved.interval or (moved.mean, moved.mean)
    return f"{moved.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def table(seed: str, found: dict[str, Any]) -> None:
    golden = {name: distances(curve["golden"]) for name, curve in found["curves"].items()}
    teacher = Distance(prompts=tuple(found["teacher"]))
    start = Distance(prompts=tuple(found["start"]))
    print(f"\nseed {seed}: golden of teacher {teacher.mean:.3f}, of start {start.mean:.3f}\n")
    print("| | proxy | golden | lowest at | change since | proxy since | less offline | detector |")
    print("|---|---|---|---|---|---|---|---|")
    for name, curve in found["curves"].items():
        proxy, steps = distances(curve["proxy"]), curve["steps"]
        judged = judge(steps, proxy, golden[name])
        watched = detect([(s, p.mean) for s, p in zip(steps, proxy, strict=True)], WATCH)
        beside = "" if name == "offline" else told(change(golden["offline"][-1], golden[name][-1]))
        print(
            f"| {REGIME_NAMES[name]} | {proxy[-1].mean:.3f} | {golden[name][-1].mean:.3f} "
            f"| {judged.lowest} | {told(judged.golden)} | {told(judged.proxy)} | {beside} "
            f"| left {watched.left}, turned {watched.turned} |"
        )
    prompts = change(golden["diverse"][-1], golden["more_prompts"][-1])
    print(f"\nmore prompts less more responses: {told(prompts)}")


def drawn(found: dict[str, Any], path: Path) -> None:
    curves = []
    for name, curve in found["curves"].items():
        proxy, golden = distances(curve["proxy"]), distances(curve["golden"])
        steps = curve["steps"]
        watched = detect([(s, p.mean) for s, p in zip(steps, proxy, strict=True)], WATCH)
        curves.append(
            Curve(
                label=REGIME_NAMES[name],
                role=name,
                steps=steps,
                proxy=[each.mean for each in proxy],
                golden=[each.mean for each in golden],
                proxy_band=[each.interval or (each.mean, each.mean) for each in proxy],
                golden_band=[each.interval or (each.mean, each.mean) for each in golden],
                law=[watched.law.at(step) for step in steps] if watched.law else [],
                broken=watched.turned,
            )
        )
    level = Distance(prompts=tuple(found["teacher"])).mean
    summary_png(path, curves, level=level, title="Offline data turns; fresh or more data does not")


def main(folder: Path, seeds: list[str]) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"{seed}.json"
        if not path.is_file():
            path.write_text(json.dumps(kept(experiment(int(seed)))))
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for seed, each in found.items():
        table(seed, each)
    drawn(next(iter(found.values())), folder / "teacher_hacking.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
