"""Curves and intervals as pictures, in colours that colour-blind eyes tell apart.

Lines are named at their ends, not in a legend. In a page a picture takes the page's colours, so it
is readable on a light and on a dark ground. Needs matplotlib (extra `report`).
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.core.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Interval",
    "Line",
    "available",
    "curves_png",
    "curves_svg",
    "drawn_svg",
    "intervals_svg",
    "short",
    "styled",
    "summary_png",
]

INK, MUTED, RULE, GROUND = "#14181d", "#5d6875", "#dfe4ea", "#fefefe"
COLOURS = {
    "teacher": "#59636f",
    "scratch": "#c4540b",
    "distilled": "#0a6cb3",
    "tuned": "#0b8562",
    "plain": "#0a6cb3",
    "offline": "#b8321a",
    "diverse": "#8c6a00",
    "more_prompts": "#7b3fa0",
    "online_teacher": "#0b5fa5",
    "online_student": "#00796b",
    "start": "#5b5f97",
    "bond": "#b3447a",
    "member": "#7a5230",
    "warp": "#00788a",
}
"""By the role of what is drawn; after the palette of Okabe and Ito, darkened for small text."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 12.0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "cabochon",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve with its name."""

    label: str
    role: str
    """A key of COLOURS."""
    x: Sequence[float]
    y: Sequence[float]
    faint: Sequence[float] = ()
    """The values that `y` smooths, drawn behind it; none where `y` is as measured."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its uncertainty."""

    label: str
    role: str
    value: float
    low: float
    high: float


def available() -> bool:
    """True if pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def curves_svg(lines: Sequence[Line], *, x_label: str, y_label: str, name: str) -> str:
    """Lines over a common axis, as an SVG element that is 100% wide.

    Args:
        lines: at least one, each of at least one point.
        x_label: with its unit.
        y_label: with its unit; stands above the axis.
        name: begins the ids in the element, so that a page can hold several.
    """
    with styled():
        figure, axes = _figure(5.4, 3.1)
        _draw_curves(axes, lines, x_label=x_label, y_label=y_label)
        return drawn_svg(figure, name)


def curves_png(
    path: Path, lines: Sequence[Line], *, x_label: str, y_label: str, title: str
) -> None:
    """The same as a PNG on white, under a title.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not available():
        raise MissingExtra("matplotlib", "report", "drawing a picture")
    with styled():
        figure, axes = _figure(7.2, 4.4)
        figure.set_facecolor("white")
        figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
        _draw_curves(axes, lines, x_label=x_label, y_label=y_label)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=170, bbox_inches="tight", metadata={"Software": None})


def intervals_svg(rows: Sequence[Interval], *, x_label: str, name: str, zero: bool = False) -> str:
    """Dots with 95% intervals, one below another, as an SVG element that is 100% wide.

    Args:
        rows: at least one.
        x_label: with its unit.
        name: begins the ids in the element.
        zero: the axis reaches 0, which is marked: for differences.
    """
    with styled():
        figure, axes = _figure(5.4, 0.75 + 0.5 * len(rows))
        _draw_intervals(axes, rows, x_label=x_label, zero=zero)
        return drawn_svg(figure, name)


def summary_png(
    path: Path,
    lines: Sequence[Line],
    held_out: Sequence[Interval],
    difference: Interval,
    *,
    title: str,
    subtitle: str,
) -> None:
    """The curves beside the held-out comparison, as a PNG on white.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not available():
        raise MissingExtra("matplotlib", "report", "drawing a picture")
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(10.4, 4.7), facecolor="white")
        grid = figure.add_gridspec(
            2,
            2,
            width_ratios=(1.25, 1.0),
            height_ratios=(3.0, 1.35),
            left=0.055,
            right=0.975,
            top=0.76,
            bottom=0.115,
            wspace=0.42,
            hspace=0.95,
        )
        figure.text(0.02, 0.945, title, fontsize=14, fontweight="bold", color=INK, va="center")
        figure.text(0.02, 0.885, subtitle, fontsize=10, color=MUTED, va="center")
        left = figure.add_subplot(grid[:, 0])
        _draw_curves(
            left, lines, x_label="tokens read in training", y_label="held-out nats per token"
        )
        above = figure.add_subplot(grid[0, 1])
        _draw_intervals(above, held_out, x_label="nats per token", zero=False)
        above.set_title("Held-out modules, 95% intervals", pad=10)
        below = figure.add_subplot(grid[1, 1])
        _draw_intervals(below, [difference], x_label="nats per token", zero=True)
        below.set_title("Paired, document by document", pad=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=170, metadata={"Software": None})


def _draw_curves(axes: Axes, lines: Sequence[Line], *, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    places = [line.x for line in lines]
    for line in lines:
        colour = COLOURS[line.role]
        if line.faint:
            axes.plot(line.x, line.faint, color=colour, linewidth=0.7, alpha=0.25)
        few = len(line.x) <= 20
        axes.plot(
            line.x, line.y, color=colour, linewidth=1.8, marker="o" if few else None, markersize=3
        )
    axes.set_xlabel(x_label)
    axes.set_title(y_label, pad=10)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(*_limits(lines))
    first, last = min(0.0, *map(min, places)), max(map(max, places))
    axes.set_xlim(first, last if last > first else first + 1.0)
    _name_ends(axes, lines)


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """From the lowest value to the highest after the first tenth, which would hide the rest."""
    values = sorted(value for line in lines for value in line.y)
    late = [value for line in lines for value in line.y[len(line.y) // 10 :]]
    low, high = values[0], max(late)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line's name at its last point; names that would touch move apart."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    ends = sorted(lines, key=lambda line: line.y[-1])
    heights = [line.y[-1] for line in ends]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + gap)
    for line, height in zip(ends, heights, strict=True):
        # The ground behind a name keeps other lines off it.
        axes.annotate(
            line.label,
            xy=(line.x[-1], height),
            xytext=(6, 0),
            textcoords="offset points",
            color=COLOURS[line.role],
            fontweight="bold",
            va="center",
            annotation_clip=False,
            bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 0.6},
        )


def _draw_intervals(axes: Axes, rows: Sequence[Interval], *, x_label: str, zero: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, row in enumerate(reversed(rows)):
        colour = COLOURS[row.role]
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2)
        axes.plot([row.value], [place], color=colour, marker="o", markersize=6)
        axes.text(
            row.value, place + 0.2, f"{row.value:.3f}", color=colour, ha="center", fontweight="bold"
        )
    lowest, highest = min(row.low for row in rows), max(row.high for row in rows)
    if zero:
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        axes.axvline(0.0, color=MUTED, linewidth=1.0)
    margin = 0.08 * (highest - lowest) or 0.1
    axes.set_xlim(lowest - margin, highest + margin)
    axes.set_ylim(-0.5, len(rows) - 0.35)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(x_label)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def styled() -> Any:
    """Within the block matplotlib draws in the style of this module."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def drawn_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page; `name` begins its ids."""
    text = io.StringIO()
    figure.savefig(
        text,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    return _for_page(text.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """The bare element with ids of its own and the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    # Sizes belong to the page; the viewBox keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    names = {INK: "ink", MUTED: "muted", RULE: "rule", GROUND: "ground"}
    names |= {colour: role for role, colour in COLOURS.items() if role != "plain"}
    for colour, variable in names.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def short(value: float) -> str:
    """250000 -> 250k, so that an axis stays readable on a phone."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e3:
        return f"{value / 1e3:.3g}k"
    return f"{value:g}" if math.isfinite(value) else ""
