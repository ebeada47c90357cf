"""`cabochon demo`: the main job on text that every machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cabochon.cli.configuration import FLAT, read
from cabochon.cli.stages import carry_out
from cabochon.pipelines import demo

__all__ = ["DemoSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How long, and where to."""

    out: Path = Path("runs/demo")
    """The folder of the demo; begun there, interrupted and called again, it goes on."""
    demo: Annotated[demo.Config, FLAT] = field(default_factory=demo.Config)


def main(argv: Sequence[str]) -> int:
    """Builds the family and says where its report is."""
    invocation = read(
        DemoSettings,
        argv,
        prog="cabochon demo",
        description="Build a small model family from the source of the standard library.",
        names={"pipeline": "demo"},
    )
    settings = invocation.settings
    return carry_out(
        lambda observe: demo.run(settings.demo, settings.out, observe),
        settings.out,
        as_json=invocation.json,
    )
