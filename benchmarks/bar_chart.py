"""Grouped bars with standard errors as SVG, readable on light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

COLOURS = ("#8a8f98", "#1f6fd1", "#5aa9e6", "#c2630c", "#1a7f37", "#8250df")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 52, 12, 34, 62
INK = "#7d8590"
FONT = 'font-family="sans-serif" font-size="12"'

Group = Mapping[str, tuple[float, float]]


def bar_chart(title: str, groups: Mapping[str, Group], *, y_label: str) -> str:
    """Draws one bar for each member of each group.

    Args:
        title: Above the chart.
        groups: (mean, standard error) by member, by group; members may be absent from a group.
        y_label: What the values are; they are drawn from zero, or from below zero where some are negative.
    """
    members = list(dict.fromkeys(name for group in groups.values() for name in group))
    values = [mean + sign * error for group in groups.values() for mean, error in group.values() for sign in (-1, 1)]
    low, high = min([*values, 0.0]), max([*values, 0.0]) * 1.05 or 1.0
    axis, middle = _Axis(low * 1.05, high), HEIGHT / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT} fill="{INK}">',
        f'<text x="{LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>',
    ]
    parts += axis.lines()
    span = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    for index, (name, group) in enumerate(groups.items()):
        start = LEFT + index * span
        parts += _group(start, span, group, members, axis)
        parts.append(
            f'<text x="{start + span / 2:.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{html.escape(name)}</text>'
        )
    for index, member in enumerate(members):
        x = LEFT + index * (WIDTH - LEFT - RIGHT) / len(members)
        parts.append(f'<rect x="{x:.1f}" y="{HEIGHT - 24}" width="11" height="11" fill="{_colour(index)}"/>')
        parts.append(f'<text x="{x + 16:.1f}" y="{HEIGHT - 14}">{html.escape(member)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """The vertical axis, from ``low`` to ``high`` in the unit of the values."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def lines(self) -> list[str]:
        parts = []
        step = _round_step((self.high - self.low) / 5)
        tick = step * -(-self.low // step)
        while tick <= self.high:
            y = self.place(tick)
            weight = "" if abs(tick) > step / 2 else ' stroke-width="1.5"'
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}" '
                f'stroke-opacity="{0.25 if weight == "" else 0.8}"{weight}/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick + 0.0:g}</text>'
            )
            tick = round(tick + step, 10)
        return parts


def _round_step(size: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    unit = math.pow(10.0, math.floor(math.log10(size)))
    return next((factor * unit for factor in (1.0, 2.0, 5.0) if factor * unit >= size), 10 * unit)


def _group(start: float, span: float, group: Group, members: list[str], axis: _Axis) -> list[str]:
    bar = span * 0.84 / len(members)
    parts = []
    for index, member in enumerate(members):
        if member not in group:
            continue
        mean, error = group[member]
        x, middle = start + span * 0.08 + index * bar, start + span * 0.08 + (index + 0.46) * bar
        top, foot = sorted((axis.place(mean), axis.place(0)))
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar * 0.92:.1f}" height="{foot - top:.1f}" '
            f'fill="{_colour(index)}"><title>{html.escape(member)}: {mean:.2f} ± {error:.2f}</title></rect>'
        )
        span_of_error = f'y1="{axis.place(mean - error):.1f}" y2="{axis.place(mean + error):.1f}"'
        parts += [
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" {span_of_error} stroke="{colour}" stroke-width="{width}"/>'
            for colour, width in (("#fffc", 3.5), ("#333", 1.5))
        ]
    return parts


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
