"""A line chart as SVG, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#4a4a4a", "#2aa198")
FONT = 'font-family="sans-serif" font-size="12"'
PLOT_WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 400, 70, 50, 40
CHARACTER_WIDTH = 7
Place = Callable[[float, float], tuple[float, float]]


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
    right = LEFT + PLOT_WIDTH
    width = right + 40 + CHARACTER_WIDTH * max(map(len, lines))
    points = [(scale(x), scale(y)) for line in lines.values() for x, y in line]
    ticks = [_ticks([point[axis] for point in points], logarithmic) for axis in (0, 1)]
    low = [min(marks[0], *(point[axis] for point in points)) for axis, marks in enumerate(ticks)]
    high = [max(marks[-1], *(point[axis] for point in points)) for axis, marks in enumerate(ticks)]
    span = [max(b - a, 1e-9) for a, b in zip(low, high, strict=True)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - low[0]) / span[0] * PLOT_WIDTH + LEFT
        up = (scale(y) - low[1]) / span[1] * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{title}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{x_label}</text>',
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">{y_label}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{right}" fill="none" stroke="#888"/>',
    ]
    for axis, marks in enumerate(ticks):
        parts += [_mark(axis, 10**mark if logarithmic else mark, place, low, logarithmic) for mark in marks]
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in placed]
        height = TOP + 18 * index
        parts.append(f'<rect x="{right + 12}" y="{height - 9}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 30}" y="{height - 3}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _ticks(values: Sequence[float], logarithmic: bool) -> list[float]:
    """Round numbers over the range of the values, or whole exponents of ten."""
    low, high = min(values), max(values)
    if logarithmic:
        return [float(exponent) for exponent in range(math.floor(low), math.ceil(high) + 1)]
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _mark(axis: int, value: float, place: Place, low: Sequence[float], logarithmic: bool) -> str:
    corner = [10**bound if logarithmic else bound for bound in low]
    if axis == 0:
        across, _ = place(value, corner[1])
        return f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>'
    _, up = place(corner[0], value)
    return f'<text x="{LEFT - 6}" y="{up + 4}" text-anchor="end">{_number(value)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
