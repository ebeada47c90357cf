"""`cabochon run PIPELINE`: several trainings that make one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cabochon.cli import demo as demo_verb
from cabochon.cli.configuration import FLAT, build, read
from cabochon.cli.machine import device_of
from cabochon.cli.stages import carry_out
from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError
from cabochon.pipelines import demo, gemma2

__all__ = ["PIPELINES", "Gemma2Settings", "main", "resume"]

PIPELINES = {
    "gemma2": "a teacher, a student distilled from it, the same student from scratch, tuning",
    "demo": "gemma2, sized for minutes, on the source of the standard library",
}
"""Pipeline -> what it makes."""


@dataclass(frozen=True, kw_only=True)
class Gemma2Settings:
    """Settings of `run gemma2`."""

    out: Path
    """The folder of all stages; begun there, interrupted and called again, it goes on."""
    recipe: Annotated[gemma2.Config, FLAT]


def main(argv: Sequence[str]) -> int:
    """Runs a pipeline, or goes on with it."""
    if argv and argv[0] in {"-h", "--help"}:
        print("usage: cabochon run PIPELINE [OPTIONS]\n")
        for name, purpose in PIPELINES.items():
            print(f"  {name:<8}  {purpose}")
        print("\ncabochon run PIPELINE --help lists the options.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"which pipeline? cabochon run {' | '.join(PIPELINES)} ...")
    if argv[0] == "demo":
        return demo_verb.main(argv[1:])
    if argv[0] != "gemma2":
        raise ConfigError(unknown("pipeline", argv[0], PIPELINES))
    invocation = read(
        Gemma2Settings,
        argv[1:],
        prog="cabochon run gemma2",
        description=PIPELINES["gemma2"],
        names={"pipeline": "gemma2"},
    )
    settings = invocation.settings
    device_of(settings.recipe.device)  # refuses what is none
    return carry_out(
        lambda observe: gemma2.run(settings.recipe, settings.out, observe),
        settings.out,
        as_json=invocation.json,
    )


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
    recipe = build(gemma2.Config, rest, origin=origin)
    return carry_out(lambda o: gemma2.run(recipe, folder, o), folder, as_json=as_json)
