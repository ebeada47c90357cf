"""What an experiment on teacher hacking found out: curves, their judgement, the detector's word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cabochon import folders
from cabochon.core import Backbone, Group, Key, Policy, Step
from cabochon.core.errors import DataError
from cabochon.evaluation import report
from cabochon.evaluation.distances import (
    Change,
    Distance,
    change,
    sequence_js,
    sequence_kl,
    token_js,
)
from cabochon.evaluation.hacking import Detector, detect, judge
from cabochon.generation.engine import Settings, generate
from cabochon.pipelines.hacking_recipe import Config
from cabochon.pipelines.responses import Prompts
from cabochon.pipelines.stages import Event, Observe
from cabochon.pipelines.timing import note_memory, timed, write_json

__all__ = ["Judges", "measured", "moments", "written"]

FITTED = 8
"""Points that the detector fits its law to; those of a curve stand at even steps of log step."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The two models that a student is held against, and what they said to held-out prompts."""

    oracle: Backbone
    teacher: Backbone
    from_oracle: Sequence[Group]
    from_teacher: Sequence[Group]

    def proxy(self, student: Policy) -> Distance:
        """Its distance to the teacher: KL(teacher || student) of a whole response, nats."""
        return sequence_kl(self.teacher, student, self.from_teacher)

    def golden(self, student: Policy) -> Distance:
        """Its distance to the oracle: KL(oracle || student) of a whole response, nats."""
        return sequence_kl(self.oracle, student, self.from_oracle)


def moments(total: int, points: int) -> list[int]:
    """Numbers of updates, about evenly spaced in their logarithm, of which `total` is the last."""
    first = max(1.0, total / 100)
    return sorted({round(each) for each in np.geomspace(first, total, points)})


def measured(
    updates: Iterator[Step],
    student: Policy,
    judges: Judges,
    folder: Path,
    *,
    total: int,
    points: int,
) -> Iterator[Step]:
    """The same updates, some of which also report `proxy` and `golden`, nats for a response.

    Args:
        updates: of `student`.
        student: measured between two updates, which changes nothing.
        judges: what it is held against.
        folder: where each measurement is kept prompt by prompt, a file for each.
        total: how many updates there are in all; the last one is measured.
        points: how often it is measured.
    """
    at = set(moments(total, points))
    for step in updates:
        done = step.index + 1
        if done not in at:
            yield step
            continue
        proxy, golden = judges.proxy(student), judges.golden(student)
        content = {"step": done, "proxy": proxy.prompts, "golden": golden.prompts}
        write_json(folder / f"{done:08d}.json", content)
        yield replace(step, report={**step.report, "proxy": proxy.mean, "golden": golden.mean})


def written(
    config: Config,
    folder: Path,
    paths: Mapping[str, Path],
    load: Callable[[Path], Backbone],
    judges: Judges,
    prompts: Prompts,
    settings: Settings,
    drawn: Mapping[str, int],
    observe: Observe,
) -> dict[str, object]:
    """The content of results.json, which is written with the report unless it is there already.

    Args:
        config: of the experiment.
        folder: of the pipeline.
        paths: model folders by name: oracle, teacher, student (as it began), each regime.
        load: reads one of them.
        judges: what students are held against.
        prompts: the three sides.
        settings: of every response.
        drawn: how many responses each regime asked for.
        observe: told when a stage begins.
    """
    place = folder / "results.json"
    if not place.is_file():
        observe(Event(stage="evaluation", steps=0, note="compares the students"))
        with timed(folder, "evaluation"):
            found, counts = _found(config, folder, paths, load, judges, settings, drawn)
        facts = _facts(config, paths, counts, prompts)
        write_json(place, {"format": 1, **facts, **found})
        note_memory(folder)
    observe(Event(stage="report", steps=0, note="draws the page"))
    report.render(folder)
    return dict(json.loads(place.read_text("utf-8")))


def _found(
    config: Config,
    folder: Path,
    paths: Mapping[str, Path],
    load: Callable[[Path], Backbone],
    judges: Judges,
    settings: Settings,
    drawn: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, int]]:
    """What was measured of every student, and how many parameters each model has."""
    curves: dict[str, _Curve] = {
        name: _curve(folder / name / "curve", config) for name in config.regimes
    }
    finals: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, path in paths.items():  # one at a time: they may be large
        model = load(path)
        counts[name] = sum(weight.numel() for weight in _parameters(model))
        if name in curves:
            finals[name] = _final(model, judges, settings, Key(config.seed).fold("final"))
        elif name == "student":
            start = {
                "proxy": _told(judges.proxy(model)),
                "golden": _told(judges.golden(model)),
            }
    found = {
        "start": start,
        "teacher": {"golden": _told(judges.golden(judges.teacher))},
        "regimes": [
            {
                "name": name,
                "responses": drawn[name],
                **_judged(curves[name], config),
                "final": finals[name],
            }
            for name in config.regimes
        ],
        "compared": _compared(curves),
    }
    return found, counts


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Both distances of one student at every moment."""

    steps: list[int]
    proxy: list[Distance]
    golden: list[Distance]


def _curve(folder: Path, config: Config) -> _Curve:
    steps = moments(config.distil.steps, config.points)
    found = []
    for step in steps:
        path = folder / f"{step:08d}.json"
        try:
            found.append(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); remove {folder.parent} and run again"
            ) from error
    return _Curve(
        steps=steps,
        proxy=[Distance(prompts=tuple(each["proxy"])) for each in found],
        golden=[Distance(prompts=tuple(each["golden"])) for each in found],
    )


def _judged(curve: _Curve, config: Config) -> dict[str, Any]:
    """The curve with its intervals, and what both judges of it say."""
    judgement = judge(curve.steps, curve.proxy, curve.golden)
    detector = Detector(warmup=config.distil.warmup, fitted=FITTED)
    points = [(s, p.mean) for s, p in zip(curve.steps, curve.proxy, strict=True)]
    finding = detect(points, detector)
    rows = zip(curve.steps, curve.proxy, curve.golden, strict=True)
    return {
        "points": [{"step": s, "proxy": _told(p), "golden": _told(g)} for s, p, g in rows],
        "judgement": {
            "lowest": judgement.lowest,
            "interior": judgement.interior,
            "kind": judgement.kind,
            "golden": _moved(judgement.golden),
            "proxy": _moved(judgement.proxy),
        },
        "detector": {
            "law": None if finding.law is None else asdict(finding.law),
            "left": finding.left,
            "turned": finding.turned,
            "reasons": list(finding.reasons),
        },
    }


def _final(student: Backbone, judges: Judges, settings: Settings, key: Key) -> dict[str, Any]:
    """Every distance of a finished student, to the teacher and to the oracle."""
    prompts = [_on(group.prompt, student) for group in judges.from_oracle]
    samples = len(judges.from_oracle[0].completions)
    own = generate(student, prompts, settings, key, samples)
    own = [replace(group, prompt=group.prompt.cpu()) for group in own]
    found = {}
    for name, other, theirs in (
        ("teacher", judges.teacher, judges.from_teacher),
        ("oracle", judges.oracle, judges.from_oracle),
    ):
        found[name] = {
            "forward_kl": _told(sequence_kl(other, student, theirs)),
            "reverse_kl": _told(sequence_kl(student, other, own)),
            "sequence_js": _told(sequence_js(other, student, theirs, own)),
            "token_js": _told(token_js(other, student, theirs, own)),
        }
    return found


def _compared(curves: Mapping[str, _Curve]) -> list[dict[str, Any]]:
    """Golden at the end of every other regime less that of `offline`, prompt by prompt."""
    if "offline" not in curves:
        return []
    first = curves["offline"].golden[-1]
    return [
        {"regime": name, "difference": _moved(change(first, curve.golden[-1]))}
        for name, curve in curves.items()
        if name != "offline"
    ]


def _facts(
    config: Config,
    paths: Mapping[str, Path],
    counts: Mapping[str, int],
    prompts: Prompts,
) -> dict[str, Any]:
    """What was built, and from what."""
    text = Path(config.data).name if config.data else "the Python standard library"
    return {
        "pipeline": "teacher_hacking",
        "title": f"Teacher hacking on {text}",
        "text": text,
        "repeat": "cabochon run teacher_hacking --config config.yaml --out FOLDER",
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "divergence": config.divergence,
        "steps": config.distil.steps,
        "rows": config.distil.rows,
        "prompts": {
            "oracle": len(prompts.oracle),
            "distillation": config.prompts,
            "responses": config.responses,
            "held_out": len(prompts.held_out),
            "held_out_responses": config.held_out_responses,
            "prompt_tokens": config.prompt_tokens,
            "response_tokens": config.response_tokens,
            "cut": prompts.cut,
        },
        "models": [
            {
                "name": name,
                "parameters": counts[name],
                "weights": folders.fingerprint(path),
            }
            for name, path in paths.items()
        ],
    }


def _parameters(model: Backbone) -> Iterator[nn.Parameter]:
    return model.parameters() if isinstance(model, nn.Module) else iter(())


def _on(prompt: Tensor, model: Backbone) -> Tensor:
    return prompt.to(next(_parameters(model)).device)


def _told(distance: Distance) -> dict[str, Any]:
    return {"mean": distance.mean, "interval": distance.interval}


def _moved(moved: Change) -> dict[str, Any]:
    return asdict(moved)
