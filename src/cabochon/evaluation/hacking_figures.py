"""The pictures of teacher hacking: golden against proxy, and both against the number of updates.

Needs matplotlib (extra `report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cabochon.core.errors import MissingExtra
from cabochon.evaluation.figures import COLOURS, GROUND, INK, MUTED, available, drawn_svg, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "against_updates_svg", "plane_svg", "summary_png"]

ROOM = 1.7
"""How far beyond the worst of the lowest distances a picture reaches: what comes before is the
fall from the beginning, beside which nothing else could be seen."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One regime's distances, nats for a response."""

    label: str
    role: str
    """A key of `figures.COLOURS`."""
    steps: Sequence[float]
    proxy: Sequence[float]
    golden: Sequence[float]
    proxy_band: Sequence[tuple[float, float]] = ()
    """95% intervals; none where there is a single prompt."""
    golden_band: Sequence[tuple[float, float]] = ()
    law: Sequence[float] = ()
    """The proxy that the detector's law foretells; none where it has none."""
    broken: float | None = None
    """The update at which the detector says that the law breaks."""


def plane_svg(curves: Sequence[Curve], *, name: str) -> str:
    """Golden over proxy, an SVG element: a curve that falls, turns and rises is teacher hacking.

    Args:
        curves: at least one.
        name: begins the ids in the element.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(5.4, 3.9))
        _draw_plane(figure.add_subplot(), curves)
        return drawn_svg(figure, name)


def against_updates_svg(
    curves: Sequence[Curve], *, golden: bool, name: str, level: float | None = None
) -> str:
    """The proxy (both axes logarithmic, with the law) or golden over the updates, an SVG element.

    Args:
        curves: at least one.
        golden: golden instead of the proxy.
        name: begins the ids in the element.
        level: a horizontal line: what the teacher's own distance to the oracle is.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(5.4, 3.6))
        axes = figure.add_subplot()
        if golden:
            _draw_golden(axes, curves, level)
        else:
            _draw_proxy(axes, curves)
        return drawn_svg(figure, name)


def summary_png(path: Path, curves: Sequence[Curve], *, level: float | None, title: str) -> None:
    """The three pictures side by side, a PNG on white.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not available():
        raise MissingExtra("matplotlib", "report", "drawing a picture")
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(15.6, 4.7), facecolor="white")
        figure.text(0.02, 0.95, title, fontsize=14, fontweight="bold", color=INK, va="center")
        first, second, third = figure.subplots(
            1, 3, gridspec_kw={"left": 0.04, "right": 0.905, "top": 0.82, "bottom": 0.12,
                               "wspace": 0.5},
        )  # fmt: skip
        _draw_plane(first, curves)
        _draw_golden(second, curves, level)
        _draw_proxy(third, curves)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, metadata={"Software": None})


def _draw_plane(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        colour = COLOURS[curve.role]
        axes.plot(
            curve.proxy, curve.golden, color=colour, linewidth=1.6, marker="o", markersize=2.6
        )
        axes.plot([curve.proxy[-1]], [curve.golden[-1]], color=colour, marker="o", markersize=6.5)
    axes.set_xlabel("proxy: distance to the teacher, nats per response")
    axes.set_title("golden: distance to the oracle, nats per response", pad=10)
    axes.set_xlim(*_limits([curve.proxy for curve in curves]))
    axes.set_ylim(*_limits([curve.golden for curve in curves]))
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    _name(axes, [(c, c.proxy[-1], c.golden[-1]) for c in curves], aside=True)


def _draw_golden(axes: Axes, curves: Sequence[Curve], level: float | None) -> None:
    low, high = _limits([curve.golden for curve in curves])
    if level is not None:
        low = min(low, level - 0.06 * (high - level))
        axes.axhline(level, color=MUTED, linewidth=1.0, linestyle="--")
        axes.annotate(
            "the teacher's own", xy=(curves[0].steps[0], level), xytext=(0, 4),
            textcoords="offset points", color=MUTED, fontsize=8.5,
        )  # fmt: skip
    for curve in curves:
        _draw_banded(axes, curve, curve.golden, curve.golden_band)
    axes.set_title("golden: distance to the oracle, nats per response", pad=10)
    axes.set_ylim(low, high)
    _updates(axes, curves)
    _name(axes, [(c, c.steps[-1], c.golden[-1]) for c in curves])


def _draw_proxy(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for curve in curves:
        colour = COLOURS[curve.role]
        _draw_banded(axes, curve, curve.proxy, curve.proxy_band)
        if curve.law:
            axes.plot(curve.steps, curve.law, color=colour, linewidth=1.0, linestyle=":")
        if curve.broken is not None:
            at = list(curve.steps).index(curve.broken)
            axes.plot(
                [curve.broken], [curve.proxy[at]], color=colour, marker="x", markersize=9,
                markeredgewidth=2.2,
            )  # fmt: skip
    axes.set_title("proxy, its law (dotted), its break (cross)", pad=10)
    values = [value for curve in curves for value in curve.proxy]
    axes.set_yscale("log")
    axes.set_ylim(0.8 * min(values), 1.15 * max(values))
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _updates(axes, curves)
    _name(axes, [(c, c.steps[-1], c.proxy[-1]) for c in curves])


def _draw_banded(
    axes: Axes, curve: Curve, values: Sequence[float], band: Sequence[tuple[float, float]]
) -> None:
    colour = COLOURS[curve.role]
    if band:
        low, high = zip(*band, strict=True)
        axes.fill_between(curve.steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(curve.steps, values, color=colour, linewidth=1.8, marker="o", markersize=2.6)


def _updates(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(curves[0].steps[0], curves[0].steps[-1])
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("updates")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """From the lowest value of all to a little above the worst curve's late values."""
    low = min(min(values) for values in curves)
    worst = max(max(min(values), values[-1]) for values in curves)
    high = max(worst + 0.08 * (worst - low), low + ROOM * (worst - low))
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _name(axes: Axes, ends: Sequence[tuple[Curve, float, float]], *, aside: bool = False) -> None:
    """Each curve's name at its end, or beside the axes; names that would touch move apart."""
    low, high = axes.get_ylim()
    scale = axes.transAxes.inverted()
    ordered = sorted(ends, key=lambda end: end[2])
    heights = [scale.transform(axes.transData.transform((x, y)))[1] for _, x, y in ordered]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + 0.075)
    for (curve, _, _), height in zip(ordered, heights, strict=True):
        axes.annotate(
            curve.label, xy=(1.0, height), xycoords="axes fraction",
            xytext=(8 if aside else 6, 0), textcoords="offset points",
            color=COLOURS[curve.role], fontweight="bold", va="center", annotation_clip=False,
            bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.set_ylim(low, high)
