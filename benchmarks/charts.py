"""A line chart as SVG, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#4a4a4a", "#2aa198")
FONT = 'font-family="sans-serif" font-size="12"'
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 70, 50, 40, 150


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> str:
    """Draws named lines of (x, y) points with a legend.

    Args:
        title: Above the chart.
        lines: Points by name.
        x_label: Below it.
        y_label: Beside it.
        logarithmic: Both axes; all values must be positive then.
    """
    scale = math.log10 if logarithmic else float
    points = [(scale(x), scale(y)) for line in lines.values() for x, y in line]
    low = [min(point[axis] for point in points) for axis in (0, 1)]
    high = [max(point[axis] for point in points) for axis in (0, 1)]
    span = [max(b - a, 1e-9) for a, b in zip(low, high, strict=True)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - low[0]) / span[0] * (WIDTH - LEFT - RIGHT) + LEFT
        up = (scale(y) - low[1]) / span[1] * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{title}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{x_label}</text>',
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">{y_label}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
    ]
    parts += _ticks(low, high, logarithmic, place)
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in placed]
        height = TOP + 18 * index
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{height - 9}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 30}" y="{height - 3}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: Sequence[float], high: Sequence[float], logarithmic: bool, place: object) -> list[str]:
    assert callable(place)
    parts = []
    for step in range(5):
        x, y = (low[axis] + (high[axis] - low[axis]) * step / 4 for axis in (0, 1))
        real = (10**x, 10**y) if logarithmic else (x, y)
        across, up = place(*real)
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{real[0]:.3g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{up + 4}" text-anchor="end">{real[1]:.3g}</text>')
    return parts
