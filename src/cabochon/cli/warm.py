"""`cabochon run warm`: reward models that learned apart, averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cabochon.cli.configuration import FLAT, build, read
from cabochon.cli.machine import device_of, model_folder
from cabochon.cli.output import say
from cabochon.cli.stages import carry_out
from cabochon.pipelines import warm

__all__ = ["WarmSettings", "main", "resume"]


@dataclass(frozen=True, kw_only=True)
class WarmSettings:
    """Settings of `run warm`."""

    out: Path
    """The folder of all stages; begun there, interrupted and called again, it goes on."""
    recipe: Annotated[warm.Config, FLAT]


def main(words: Sequence[str], *, description: str) -> int:
    """Trains, averages, compares; or goes on."""
    invocation = read(
        WarmSettings,
        words,
        prog="cabochon run warm",
        description=description,
        names={"pipeline": "warm"},
    )
    settings = invocation.settings
    starts = tuple(str(model_folder(start)) for start in settings.recipe.starts)
    recipe = replace(settings.recipe, starts=starts)
    return _carried_out(recipe, settings.out, as_json=invocation.json)


def resume(folder: Path, content: Mapping[str, Any], *, as_json: bool) -> int:
    """Goes on with the pipeline that `content`, of `folder`'s config.yaml, describes."""
    recipe = build(warm.Config, dict(content), origin=str(folder / "config.yaml"))
    return _carried_out(recipe, folder, as_json=as_json)


def _carried_out(recipe: warm.Config, folder: Path, *, as_json: bool) -> int:
    device_of(recipe.device)  # refuses what is none
    code = carry_out(lambda observe: warm.run(recipe, folder, observe), folder, as_json=as_json)
    if not as_json:
        say((folder / "report.md").read_text(encoding="utf-8"))
    return code
