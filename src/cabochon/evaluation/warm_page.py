"""What a page shows of reward models that were averaged; their figures are `results.json`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SETS", "page"]

SETS = {
    "corrupted": "training pairs with swapped labels (learned by heart: less is better)",
    "clean": "training pairs with their own labels",
    "held_out": "held-out pairs",
    "ood": "pairs of another kind",
}
"""Set of pairs -> what it is."""


def page(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the page that only a finished `warm` has."""
    held_out = results["sets"]["held_out"]
    average, members = held_out["average"], len(results["averaged"])
    sure = average["interval"]
    within = f" (95%: {sure[0]:.1%} to {sure[1]:.1%})" if sure else ""
    return {
        "title": results["title"],
        "headline": f"The average of {members} against its members and their ensemble",
        "verdict": (
            f"The average judges {average['accuracy']:.1%} of {average['pairs']:,} held-out pairs "
            f"as people did{within}; its mean member {held_out['mean_member']:.1%}, their ensemble "
            f"{held_out['ensemble']['accuracy']:.1%}."
        ),
        "set_names": SETS,
    }
