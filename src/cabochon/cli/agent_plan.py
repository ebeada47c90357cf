"""`cabochon plan` of an agent: what the run would take; it makes no update."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cabochon.cli.agent_recipe import agent_recipe_of
from cabochon.cli.agents import prepare, resolved
from cabochon.cli.configuration import read
from cabochon.cli.machine import use_threads
from cabochon.cli.output import answer, bytes_text, console, duration_text, say
from cabochon.core.errors import ConfigError
from cabochon.rl.footprint import Footprint, measure
from cabochon.runtime.memory import MEGABYTE, available_megabytes, require_room
from cabochon.training.process_memory import peak_memory

__all__ = ["show"]

METRICS_LINE = 500
"""Bytes of a line of metrics.jsonl."""


def show(algorithm: str, words: Sequence[str]) -> int:
    """Parameters, memory, frames, disk and time; 1 if the actors do not fit into the memory."""
    recipe = agent_recipe_of(algorithm)
    invocation = read(
        recipe.settings,
        words,
        prog=f"cabochon plan {algorithm}",
        description=f"What this run would take: {recipe.purpose}.",
        names={"algorithm": algorithm},
    )
    settings = resolved(invocation.settings)
    use_threads(settings.run.threads)
    say(f"opening {settings.acting.environments} environments and stepping them")
    session = prepare(recipe, settings)
    cutting = settings.method.cutting
    found = measure(
        settings.run.spec, session.network, settings.acting, cutting, settings.run.runtime
    )
    report = _report(settings, session, found, recipe.keeps(settings, session.network))
    report = {"algorithm": algorithm, **report}
    report["frames"] = _frames(settings, recipe.transitions(settings))
    report["time"] = _time(settings, found, recipe.transitions(settings))
    if invocation.json:
        answer(report)
    else:
        _print(report, settings)
    return 0 if report["fits"] else 1


def _report(settings: Any, session: Any, found: Footprint, kept: int) -> dict[str, Any]:
    acting, cutting = settings.acting, settings.method.cutting
    parameters = sum(each.numel() for each in session.network.parameters())
    weights = sum(each.nbytes for each in session.network.parameters())
    # Under way, in the queue, delayed on purpose, and as a batch.
    unrolls = acting.total + cutting.batch * (2 + cutting.lag)
    memory = {
        "process": peak_memory(),
        "actors": round(acting.actors * found.actor_megabytes * MEGABYTE),
        "unrolls": unrolls * found.unroll_bytes,
        "learner": weights * 4,
        "algorithm": kept,
    }
    there = available_megabytes()
    fits, advice = True, ""
    try:
        require_room(acting.actors, found.actor_megabytes)
    except ConfigError as error:
        fits, advice = False, str(error)
    waiting = cutting.batch * cutting.lag + acting.total
    checkpoint = weights * 3 + kept + waiting * found.unroll_bytes
    return {
        "parameters": parameters,
        "memory_bytes": {**memory, "peak": sum(memory.values())},
        "actor_bytes": round(found.actor_megabytes * MEGABYTE),
        "available_bytes": None if there is None else round(there * MEGABYTE),
        "fits": fits,
        "advice": advice,
        "disk_bytes": {
            "checkpoint": checkpoint,
            "peak": checkpoint * (settings.run.keep + 1) + METRICS_LINE * settings.method.steps,
        },
    }


def _frames(settings: Any, transitions: int) -> dict[str, int]:
    return {"per_update": transitions, "total": transitions * int(settings.method.steps)}


def _time(settings: Any, found: Footprint, transitions: int) -> dict[str, float]:
    """Acting and learning one after the other, or side by side where there are cores for it."""
    acting = settings.acting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    apart = settings.run.runtime in ("processes", "ray")
    side_by_side = min(acting.actors, cores) if apart else 1
    batches = transitions / (acting.inference_batch or acting.total)
    played = transitions * found.step_seconds / side_by_side + batches * found.inference_seconds
    learned = found.learning_seconds
    alone = settings.run.runtime == "inline" or cores == 1
    update = played + learned if alone else max(played, learned)
    return {
        "environment_step_seconds": found.step_seconds,
        "inference_batch_seconds": found.inference_seconds,
        "learning_seconds": learned,
        "update_seconds": update,
        "seconds": update * int(settings.method.steps),
    }


def _print(report: dict[str, Any], settings: Any) -> None:
    screen = console(stderr=False)
    memory, disk, taken = report["memory_bytes"], report["disk_bytes"], report["time"]
    frames, acting = report["frames"], settings.acting
    lines = [
        f"parameters  {report['parameters']:,}",
        f"memory      {bytes_text(memory['peak'])} at the peak",
        *(f"              {k:<12} {bytes_text(v)}" for k, v in memory.items() if k != "peak"),
        f"actors      {acting.actors} of {acting.environments} environments, "
        f"{bytes_text(report['actor_bytes'])} each ({settings.run.runtime})",
        f"frames      {frames['total']:,} in {settings.method.steps:,} updates of "
        f"{frames['per_update']:,}",
        f"disk        {bytes_text(disk['peak'])} ({settings.run.keep} checkpoints of "
        f"{bytes_text(disk['checkpoint'])} stay, one more while it is written)",
        f"time        about {duration_text(taken['seconds'])}: an environment's step "
        f"{taken['environment_step_seconds'] * 1e6:,.0f} us, a batch of inference "
        f"{taken['inference_batch_seconds'] * 1e3:.2f} ms, learning "
        f"{taken['learning_seconds'] * 1e3:.1f} ms an update, measured just now",
    ]
    if not report["fits"]:
        lines.append(f"does not fit: {report['advice']}")
    for line in lines:
        screen.print(line, markup=False)
