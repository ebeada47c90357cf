"""What the page of a teacher-hacking experiment shows beside its trainings.

    PIPELINE/results.json, when all is done:

    format: 1
    pipeline: "teacher_hacking"; title, text, repeat, seed, threads
    divergence, steps, rows: of every distillation
    prompts: {oracle, distillation, responses, held_out, held_out_responses, prompt_tokens,
              response_tokens, cut}
    models: [{name, parameters, weights}]
    start: {proxy, golden} of the student as it began; teacher: {golden}
    regimes: [{name, responses (drawn in all), points: [{step, proxy, golden}],
               judgement: {lowest (update), interior, kind, golden, proxy (changes since)},
               detector: {law, left, turned (updates), reasons},
               final: {teacher, oracle: {forward_kl, reverse_kl, sequence_js, token_js}}}]
    compared: [{regime, difference (golden at the end less that of offline)}]

A distance is {mean, interval}, a change {mean, interval}, all in nats for a response (`token_js`:
for a token); intervals are 95%, over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cabochon.evaluation import figures, hacking_figures
from cabochon.evaluation.hacking_figures import Curve

__all__ = ["REGIME_NAMES", "curves_of", "findings", "picture"]

REGIME_NAMES = {
    "offline": "offline",
    "diverse": "more responses",
    "more_prompts": "more prompts",
    "online_teacher": "online teacher",
    "online_student": "online student",
}
"""What they are called on the page."""


def findings(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the page that only a finished experiment has."""
    page: dict[str, Any] = {
        "title": results["title"],
        "headline": _headline(results),
        "verdict": _verdict(results),
        "names": {name: name for name in ("oracle", "teacher", "student")} | REGIME_NAMES,
        "said": {each["name"]: _said(each) for each in results["regimes"]},
        "watched": {each["name"]: _watched(each) for each in results["regimes"]},
        "plane": None,
        "golden": None,
        "proxy": None,
    }
    if figures.available():
        curves = curves_of(results)
        level = results["teacher"]["golden"]["mean"]
        page["plane"] = Markup(hacking_figures.plane_svg(curves, name="plane"))
        page["golden"] = Markup(
            hacking_figures.against_updates_svg(curves, golden=True, name="golden", level=level)
        )
        page["proxy"] = Markup(
            hacking_figures.against_updates_svg(curves, golden=False, name="proxy")
        )
    return page


def picture(results: Mapping[str, Any], path: Path) -> None:
    """A PNG of the three pictures side by side.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    hacking_figures.summary_png(
        path,
        curves_of(results),
        level=results["teacher"]["golden"]["mean"],
        title=_headline(results),
    )


def curves_of(results: Mapping[str, Any]) -> list[Curve]:
    """The curves of every regime, as they are drawn."""
    return [_curve(each) for each in results["regimes"]]


def _curve(regime: Mapping[str, Any]) -> Curve:
    points, detector = regime["points"], regime["detector"]
    steps = [each["step"] for each in points]
    law = detector["law"]
    flagged = [each for each in (detector["left"], detector["turned"]) if each is not None]
    return Curve(
        label=REGIME_NAMES[regime["name"]],
        role=regime["name"],
        steps=steps,
        proxy=[each["proxy"]["mean"] for each in points],
        golden=[each["golden"]["mean"] for each in points],
        proxy_band=_band(points, "proxy"),
        golden_band=_band(points, "golden"),
        law=[]
        if law is None
        else [math.exp(law["intercept"] - law["slope"] * math.log(step)) for step in steps],
        broken=detector["turned"] if detector["turned"] is not None else min(flagged, default=None),
    )


def _band(points: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    bands = [each[name]["interval"] for each in points]
    return [] if None in bands else [(low, high) for low, high in bands]


def _headline(results: Mapping[str, Any]) -> str:
    kinds = {each["name"]: each["judgement"]["kind"] for each in results["regimes"]}
    hacked = [REGIME_NAMES[name] for name, kind in kinds.items() if kind == "hacking"]
    fitted = [REGIME_NAMES[name] for name, kind in kinds.items() if kind == "overfitting"]
    if hacked:
        return "Teacher hacking: " + ", ".join(hacked)
    if fitted:
        return "Overfitting, no teacher hacking: " + ", ".join(fitted)
    return "No regime ends farther from the oracle than it once was"


def _verdict(results: Mapping[str, Any]) -> str:
    """How the other regimes end beside the offline one, in a sentence."""
    better = []
    for each in results["compared"]:
        moved = each["difference"]
        if moved["interval"] is not None and moved["interval"][1] < 0.0:
            better.append(f"{REGIME_NAMES[each['regime']]} ({_change(moved)})")
    if not results["compared"]:
        return "Only one regime was run, so there is nothing to compare it with."
    if not better:
        return "No regime ends nearer to the oracle than offline data does, as far as this shows."
    return (
        "At equally many updates these end nearer to the oracle than offline data: "
        + "; ".join(better)
        + " nats per response."
    )


def _said(regime: Mapping[str, Any]) -> str:
    """The judgement of both curves in a sentence."""
    found = regime["judgement"]
    last = regime["points"][-1]["step"]
    if found["kind"] == "none":
        return f"Golden is lowest at update {found['lowest']} of {last} and does not surely rise."
    name = "teacher hacking" if found["kind"] == "hacking" else "overfitting"
    return (
        f"Golden is lowest at update {found['lowest']} and has risen by {_change(found['golden'])} "
        f"at update {last}, while the proxy changed by {_change(found['proxy'])}: {name}."
    )


def _watched(regime: Mapping[str, Any]) -> str:
    """The detector's word in a sentence."""
    found = regime["detector"]
    if found["law"] is None:
        return "The detector had too few points."
    if not found["reasons"]:
        return "The proxy follows its law to the end."
    said = "; ".join(found["reasons"])
    return said[0].upper() + said[1:] + "."


def _change(moved: Mapping[str, Any]) -> str:
    if moved["interval"] is None:
        return f"{moved['mean']:+.3f}"
    low, high = moved["interval"]
    return f"{moved['mean']:+.3f} (95% interval {low:+.3f} to {high:+.3f})"
