"""Figures as sentences that claim no more than their intervals do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NAMES", "count_text", "duration_text", "headline", "reading_text", "verdict"]

NAMES = {
    "teacher": "teacher",
    "scratch": "student from scratch",
    "distilled": "distilled student",
    "tuned": "tuned student",
    "writer": "writer of functions",
    "bond": "writer after BOND",
    "iteration_1_member_1": "first member of WARP",
    "iteration_1_member_2": "second member of WARP",
    "iteration_1_merged": "merge of WARP",
    "before": "student before tuning",
    "after": "tuned student",
}
"""What the parts of a pipeline are called in sentences."""


def headline(comparison: Mapping[str, Any]) -> str:
    """The outcome of a comparison in a few words."""
    first, second = NAMES[comparison["first"]], NAMES[comparison["second"]]
    if not comparison["decided"]:
        return f"No difference shown between the {first} and the {second}"
    better = "better" if comparison["difference"] < 0 else "worse"
    return f"The {second} is {better} than the {first}"


def verdict(comparison: Mapping[str, Any]) -> str:
    """A comparison in one sentence."""
    first, second = NAMES[comparison["first"]], NAMES[comparison["second"]]
    difference, interval = comparison["difference"], comparison["interval"]
    if interval is None:
        return (
            f"On the only document the {second} costs {difference:+.3f} nats per token more than "
            f"the {first}; one document tells nothing of others."
        )
    wins = f"{comparison['wins']} of {comparison['documents']} documents cost it less"
    if not comparison["decided"]:
        return (
            f"This run does not show a difference between the {first} and the {second}: "
            f"{difference:+.3f} nats per token, 95% interval {interval[0]:+.3f} to "
            f"{interval[1]:+.3f}, which holds 0."
        )
    low, high = sorted(abs(end) for end in interval)
    better = "better" if difference < 0 else "worse"
    return (
        f"The {second} is {better} than the {first} by {abs(difference):.3f} nats per token "
        f"(95% interval {low:.3f} to {high:.3f}); {wins}."
    )


def reading_text(comparison: Mapping[str, Any]) -> str:
    """What the comparison of another question (first) with the own one (second) tells."""
    difference, interval = comparison["difference"], comparison["interval"]
    if not comparison["decided"]:
        return "So this run does not show that the model heeds the question at all."
    low, high = sorted(abs(end) for end in interval)
    worth = (
        f"{abs(difference):.3f} nats per token of the answer (95% interval {low:.3f} to {high:.3f})"
    )
    if difference < 0:
        return f"So reading the question is worth {worth}."
    return f"So the right question makes the answer less likely, by {worth}."


def count_text(count: float) -> str:
    """1050752 -> 1.05 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def duration_text(seconds: float) -> str:
    """95 -> 1 min 35 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
