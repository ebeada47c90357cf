"""What a page shows of policies that learned from a reward: fronts, figures, samples.

    alignment: of results.json, from the demo and from `warp`

    policies: [{name, role, reward, kl (nats of a whole completion, from the start),
                parts: {name: share or mean}, entropy (nats a token), length, stopped, distinct}]
    fronts: [{label, role, points: [{kl, reward, label (share of the way from the start)}]}]
    hypervolumes: of each front, within the KL that all of them reach
    angles: [{iteration, cosines (of the members' task vectors, M M), norms}]
    gain: {of (reward, or a part of it), before, after, difference, kl, preference}
    samples: [{prompt, before, after, before_reward, after_reward}]

Figures of a policy are {mean, interval}; intervals are 95%, over prompts that nothing learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cabochon.evaluation import figures
from cabochon.evaluation.figures import Interval, Line

__all__ = ["findings", "gain_text", "page", "picture"]

KL = "KL from the start, nats per completion"
REWARD = "mean reward on held-out prompts"


def page(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the page that only a finished `warp` has."""
    aligned = results["alignment"]
    return {
        "title": results["title"],
        "headline": _headline(aligned["gain"]),
        "verdict": gain_text(aligned["gain"]),
        **findings(aligned),
    }


def findings(aligned: Mapping[str, Any]) -> dict[str, Any]:
    """What `alignment.html.jinja` needs, wherever it stands."""
    found: dict[str, Any] = {
        "aligned": aligned,
        "aligned_gain": gain_text(aligned["gain"]),
        "fronts": None,
        "parts": None,
    }
    if figures.available():
        found["fronts"] = Markup(
            figures.curves_svg(_lines(aligned), x_label=KL, y_label=REWARD, name="fronts")
        )
        rows = [
            _interval(each, aligned["gain"]["of"])
            for each in aligned["policies"]
            if each["name"] != "policy"
        ]
        found["parts"] = Markup(
            figures.intervals_svg(rows, x_label=aligned["gain"]["of"], name="rewarded")
        )
    return found


def picture(results: Mapping[str, Any], path: Path) -> None:
    """A PNG of the fronts.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    aligned = results["alignment"]
    figures.curves_png(
        path, _lines(aligned), x_label=KL, y_label=REWARD, title=_headline(aligned["gain"])
    )


def gain_text(gain: Mapping[str, Any]) -> str:
    """What alignment changed, in a sentence that claims no more than its interval does."""
    difference, kl = gain["difference"], gain["kl"]["mean"]
    interval = difference["interval"]
    far = f"at a KL of {kl:.2f} nats per completion from where it began"
    moved = f"from {gain['before']:.3f} to {gain['after']:.3f}"
    if interval is None:
        return f"On the only prompt {gain['of']} went {moved}, {far}; one tells nothing of others."
    low, high = interval
    between = f"{difference['mean']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    if low <= 0.0 <= high:
        return f"This run does not show that {gain['of']} changed ({between}), {far}."
    verb = "rose" if low > 0.0 else "fell"
    return f"On held-out prompts {gain['of']} {verb} {moved} ({between}), {far}."


def _headline(gain: Mapping[str, Any]) -> str:
    low, high = gain["difference"]["interval"] or (0.0, 0.0)
    if low <= 0.0 <= high:
        return "No gain shown"
    return "The reward rose" if low > 0.0 else "The reward fell"


def _lines(aligned: Mapping[str, Any]) -> list[Line]:
    """The fronts, and beside them the policies that are on none."""
    alone = [_dot(each) for each in aligned["policies"] if each["role"] in ("bond", "member")]
    return [*(_line(front) for front in aligned["fronts"]), *alone]


def _line(front: Mapping[str, Any]) -> Line:
    points = sorted(front["points"], key=lambda point: float(point["kl"]))
    return Line(
        label=front["label"],
        role=front["role"],
        x=[max(0.0, point["kl"]) for point in points],
        y=[point["reward"] for point in points],
    )


def _dot(policy: Mapping[str, Any]) -> Line:
    return Line(
        label=policy["name"].replace("_", " "),
        role=policy["role"],
        x=[max(0.0, policy["kl"]["mean"])],
        y=[policy["reward"]["mean"]],
    )


def _interval(policy: Mapping[str, Any], of: str) -> Interval:
    figure = policy["parts"].get(of, policy["reward"])
    low, high = figure["interval"] or (figure["mean"], figure["mean"])
    return Interval(
        label=policy["name"].replace("_", " "),
        role=policy["role"],
        value=figure["mean"],
        low=low,
        high=high,
    )
