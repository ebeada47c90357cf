"""What a report says of an agent: its learning curve, the episodes it played, a film of one.

RUN/metrics.jsonl     frames, return, episode_length, rho, lag, ... of every update
RUN/evaluation.json   if there: {"returns", "lengths", "mean", "actions"}
RUN/episode.gif       if there
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from markupsafe import Markup

from cabochon.core.errors import FolderError
from cabochon.evaluation import figures
from cabochon.evaluation.figures import Line

__all__ = ["CURVES", "is_agent", "page"]

CURVES = (
    ("return", "mean return of the last 100 episodes"),
    ("entropy", "entropy of the policy, nats"),
    ("rho", "mean importance ratio"),
    ("lag", "updates between acting and learning"),
)
"""Which metrics are drawn over the frames, and what they are."""


def is_agent(config: Mapping[str, Any]) -> bool:
    """Whether a run with these settings is of an agent in an environment."""
    return "env" in config and "algorithm" in config


def page(
    folder: Path, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the template shows of the run in `folder`.

    Raises:
        FolderError: its evaluation.json is damaged.
    """
    curves = []
    for name, label in CURVES if figures.available() else ():
        points = [(m["frames"], m[name]) for m in metrics if m.get(name) is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            line = Line(label=name, role="plain", x=x, y=y)
            drawn = figures.curves_svg([line], x_label="frames", y_label=label, name=f"agent{name}")
            curves.append({"label": label, "picture": Markup(drawn)})
    film = folder / "episode.gif"
    return {
        "title": f"{config['algorithm']} on {config['env']}",
        "agent": {
            "frames": metrics[-1]["frames"] if metrics else 0,
            "episodes": metrics[-1]["episodes"] if metrics else 0,
            "runtime": config["runtime"],
            "environments": config["actors"] * config["environments"],
            "curves": curves,
            "played": _played(folder / "evaluation.json"),
            "film": base64.b64encode(film.read_bytes()).decode() if film.is_file() else None,
            "film_bytes": film.stat().st_size if film.is_file() else 0,
        },
    }


def _played(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        returns = [float(each) for each in found["returns"]]
        return {
            "count": len(returns),
            "mean": fmean(returns),
            "error": pstdev(returns) / len(returns) ** 0.5,
            "least": min(returns),
            "most": max(returns),
            "actions": found["actions"],
            "returns": ", ".join(f"{each:g}" for each in returns),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged: {error}") from error
