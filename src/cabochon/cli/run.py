"""`cabochon run PIPELINE`: several trainings that make one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cabochon.cli import demo as demo_verb
from cabochon.cli import warm as warm_verb
from cabochon.cli import warp as warp_verb
from cabochon.cli.configuration import FLAT, build, read
from cabochon.cli.machine import device_of, model_folder
from cabochon.cli.stages import carry_out
from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError
from cabochon.pipelines import demo, gemma2, teacher_hacking
from cabochon.pipelines.stages import Observe

__all__ = ["PIPELINES", "Gemma2Settings", "TeacherHackingSettings", "main", "resume"]

PIPELINES = {
    "gemma2": "a teacher, a student distilled from it, the same student from scratch, tuning",
    "demo": "gemma2, sized for minutes, on the source of the standard library",
    "teacher_hacking": "does a student that nears its teacher leave the truth? five kinds of data",
    "warm": "reward models that learned apart, averaged, beside their ensemble",
    "warp": "policies that learned from a reward apart, merged, and the fronts of reward and KL",
}
"""Pipeline -> what it makes."""


@dataclass(frozen=True, kw_only=True)
class Gemma2Settings:
    """Settings of `run gemma2`."""

    out: Path
    """The folder of all stages; begun there, interrupted and called again, it goes on."""
    recipe: Annotated[gemma2.Config, FLAT]


@dataclass(frozen=True, kw_only=True)
class TeacherHackingSettings:
    """Settings of `run teacher_hacking`."""

    out: Path
    """The folder of all stages; begun there, interrupted and called again, it goes on."""
    experiment: Annotated[teacher_hacking.Config, FLAT] = field(
        default_factory=teacher_hacking.Config
    )


def main(argv: Sequence[str]) -> int:
    """Runs a pipeline, or goes on with it."""
    if argv and argv[0] in {"-h", "--help"}:
        print("usage: cabochon run PIPELINE [OPTIONS]\n")
        width = max(map(len, PIPELINES))
        for name, purpose in PIPELINES.items():
            print(f"  {name:<{width}}  {purpose}")
        print("\ncabochon run PIPELINE --help lists the options.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"which pipeline? cabochon run {' | '.join(PIPELINES)} ...")
    name, *words = argv
    if name not in PIPELINES:
        raise ConfigError(unknown("pipeline", name, PIPELINES))
    if name == "demo":
        return demo_verb.main(words)
    if name == "warm":
        return warm_verb.main(words, description=PIPELINES[name])
    if name == "warp":
        return warp_verb.main(words, description=PIPELINES[name])
    kind: Any = Gemma2Settings if name == "gemma2" else TeacherHackingSettings
    invocation = read(
        kind,
        words,
        prog=f"cabochon run {name}",
        description=PIPELINES[name],
        names={"pipeline": name},
    )
    settings = invocation.settings
    if isinstance(settings, Gemma2Settings):
        recipe: Any = settings.recipe
    else:
        recipe = _with_folders(settings.experiment)
    device_of(recipe.device)  # refuses what is none
    return carry_out(_pipeline(recipe, settings.out), settings.out, as_json=invocation.json)


def resume(folder: Path, content: Mapping[str, Any], *, as_json: bool) -> int:
    """Goes on with the pipeline that `content`, of `folder`'s config.yaml, describes."""
    name = content["pipeline"]
    if name not in PIPELINES:
        raise ConfigError(f"{folder}: " + unknown("pipeline", str(name), PIPELINES))
    rest = {key: value for key, value in content.items() if key != "pipeline"}
    origin = str(folder / "config.yaml")
    if name == "demo":
        config = build(demo.Config, rest, origin=origin)
        return carry_out(lambda o: demo.run(config, folder, o), folder, as_json=as_json)
    if name == "warm":
        return warm_verb.resume(folder, rest, as_json=as_json)
    if name == "warp":
        return warp_verb.resume(folder, rest, as_json=as_json)
    kind: Any = gemma2.Config if name == "gemma2" else teacher_hacking.Config
    recipe = build(kind, rest, origin=origin)
    return carry_out(_pipeline(recipe, folder), folder, as_json=as_json)


def _with_folders(config: teacher_hacking.Config) -> teacher_hacking.Config:
    """The same, with the model folder of each run that was named for a model."""
    return replace(
        config,
        oracle=_folder(config.oracle),
        teacher=_folder(config.teacher),
        student=_folder(config.student),
    )


def _folder(named: str) -> str:
    return str(model_folder(named)) if named else ""


def _pipeline(
    recipe: gemma2.Config | teacher_hacking.Config, folder: Path
) -> Callable[[Observe], dict[str, object]]:
    """The pipeline of which this is the recipe, with everything but its observer decided."""
    if isinstance(recipe, gemma2.Config):
        return lambda observe: gemma2.run(recipe, folder, observe)
    return lambda observe: teacher_hacking.run(recipe, folder, observe)
