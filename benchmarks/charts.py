"""Charts of the result pages as SVG, readable on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#7d8590"
STYLE: dict[Any, Any] = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label")},
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "charts",  # the same chart gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> str:
    """Draws named lines of (x, y) points with a legend; ``logarithmic`` is for both axes."""

    def draw(axes: Any) -> None:
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel=x_label, ylabel=y_label, **({"xscale": "log", "yscale": "log"} if logarithmic else {}))

    return _chart(title, draw)


def bar_chart(title: str, groups: Mapping[str, Mapping[str, tuple[float, float]]], *, y_label: str) -> str:
    """Draws one bar with its standard error for each member of each group.

    Args:
        title: Above the chart.
        groups: (mean, standard error) by member, by group; members may be absent from a group.
        y_label: What the values are.
    """
    members = list(dict.fromkeys(name for group in groups.values() for name in group))

    def draw(axes: Any) -> None:
        for index, member in enumerate(members):
            bars = {place: group[member] for place, group in enumerate(groups.values()) if member in group}
            means, errors = zip(*bars.values(), strict=True)
            left = [place + (index - (len(members) - 1) / 2) * 0.84 / len(members) for place in bars]
            axes.bar(left, means, 0.77 / len(members), yerr=errors, ecolor=INK, capsize=2, label=member)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylabel=y_label)

    return _chart(title, draw)


def _chart(title: str, draw: Any) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left")
        axes.grid(axis="y", color=INK, alpha=0.25)
        figure.legend(loc="outside right upper", frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
