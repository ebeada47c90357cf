"""`cabochon resume RUN`: goes on where an interrupted run stopped."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cabochon.cli.configuration import build, mapping, parse
from cabochon.cli.output import answer, say
from cabochon.core.errors import CheckpointError, ConfigError, FolderError

__all__ = ["ResumeSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class ResumeSettings:
    """Which run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, or the folder of a pipeline or of the demo."""
    step: int | None = None
    """Go on from this checkpoint instead of the newest; the later ones are removed."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Goes on, bit for bit; or says that there is nothing left to do."""
    settings = parse(
        ResumeSettings, argv, prog="cabochon resume", description="Go on with an interrupted run."
    )
    path = settings.run / "config.yaml"
    if not settings.run.exists():
        raise FolderError(f"there is no run at {settings.run}")
    if not path.is_file():
        raise FolderError(f"{settings.run} is not a run directory: it has no config.yaml")
    content = mapping(path.read_text(encoding="utf-8"), str(path))
    if "stage" in content:
        raise FolderError(
            f"{settings.run} is the stage {content['stage']!r} of a pipeline; resume the folder "
            f"that holds it: cabochon resume {settings.run.parent}"
        )
    if not {"algorithm", "pipeline"} & content.keys():
        raise FolderError(f"{path} names neither an algorithm nor a pipeline; was it edited?")
    if "pipeline" in content:
        if settings.step is not None:
            raise ConfigError("--step goes with the run of an algorithm, not with a pipeline")
        verb = importlib.import_module("cabochon.cli.run")
        code: int = verb.resume(settings.run, content, as_json=settings.json)
        return code
    from cabochon.cli.recipe import AGENTS

    if content["algorithm"] in AGENTS:
        agents = importlib.import_module("cabochon.cli.agents")
        return int(agents.go_on(settings.run, content, step=settings.step, as_json=settings.json))
    return _resume_training(settings, content)


def _resume_training(settings: ResumeSettings, content: dict[str, Any]) -> int:
    from cabochon.cli.machine import device_of, use_threads
    from cabochon.cli.ranks import joined
    from cabochon.cli.recipe import recipe_of
    from cabochon.cli.session import prepare
    from cabochon.cli.train import carry_out
    from cabochon.training import checkpoint
    from cabochon.training.run_directory import Run

    run = Run(settings.run.resolve())
    recipe = recipe_of(str(content.pop("algorithm")))
    wanted = build(recipe.settings, content, origin=str(settings.run / "config.yaml"))
    here = replace(wanted.run, out=str(run.folder))  # the folder may have been moved or copied
    wanted = replace(wanted, run=here)
    run.refuse_changes(run.config(), run.manifest()["inputs"])
    saved = checkpoint.completed(run.checkpoints)
    done = max(saved, default=0) if settings.step is None else settings.step
    if done not in {0, *saved}:
        listing = ", ".join(map(str, saved)) or "none"
        raise CheckpointError(f"{run.folder} has no checkpoint of step {done}; it has: {listing}")
    total = int(wanted.method.steps)
    if done >= total:
        checkpoint.verify(saved[done])
        say(f"{settings.run} is complete: all {total} updates were made; nothing to do")
        if settings.json:
            answer({"run": run.folder, "steps": done, "complete": True, "checkpoint": saved[done]})
        return 0
    use_threads(wanted.run.threads)
    with joined(device_of(wanted.run.device)):
        session = prepare(recipe, wanted)
        run.refuse_changes(run.config(), session.inputs)
        for change in run.environment_changes():
            say(f"note: {change}; the last bits of the result may differ")
        say(f"going on after update {done} of {total}")
        return carry_out(recipe, session, run, done=done, at=settings.step, as_json=settings.json)
