"""`cabochon report RUN`: one page about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cabochon.cli.configuration import parse

__all__ = ["ReportSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What to report on."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, or the folder of a pipeline or of the demo."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Writes RUN/report.html and says where it is."""
    settings = parse(
        ReportSettings, argv, prog="cabochon report", description="Write one HTML page about a run."
    )
    from cabochon.cli.output import answer
    from cabochon.core.errors import FolderError
    from cabochon.evaluation.report import render

    if not settings.run.is_dir():
        raise FolderError(f"there is no run directory at {settings.run}")
    page = render(settings.run)
    if settings.json:
        answer({"report": page.resolve()})
    else:
        print(page)
    return 0
