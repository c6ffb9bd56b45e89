"""The plot of a rank plan: error against rank of every layer, as a self-contained SVG image."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 56, 30, 20, 48
ACROSS, UP = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def plan_svg(plan: Mapping[str, Any]) -> str:
    """Error against rank of every layer that can be factored; dots are the chosen ranks."""
    entries = [entry for entry in plan["layers"] if len(entry["points"]) > 1]
    axes = _Axes.around(entries)
    curves = []
    for number, entry in enumerate(entries):
        hue = round(240 * (1 - number / max(len(entries) - 1, 1)))
        curves.append(_curve(entry, f"hsl({hue} 60% 48%)", axes))
    title = "Relative function error against rank, blue (input) to red (output)"
    title += ", dots: chosen" if plan["chosen"] else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#888"><text x="{LEFT}" y="18" font-size="14">{title}</text>{axes.ticks()}'
        f'{"".join(curves)}<text x="{LEFT + ACROSS / 2}" y="{HEIGHT - 8}" text-anchor="middle">rank / full rank</text>'
        "</svg>\n"
    )


@dataclass(frozen=True, slots=True)
class _Axes:
    """Errors from 0 to ``quarters`` / 4, and shares of the full rank from 0 to ``widest``."""

    quarters: int
    widest: float

    @staticmethod
    def around(entries: Sequence[Mapping[str, Any]]) -> _Axes:
        errors = [point["function_error"] for entry in entries for point in entry["points"]]
        shares = [point["rank"] / entry["full_rank"] for entry in entries for point in entry["points"]]
        return _Axes(max(math.ceil(4 * max(errors, default=1.0)), 1), max(shares, default=1.0))

    def place(self, share: float, error: float) -> tuple[float, float]:
        return LEFT + ACROSS * share / self.widest, TOP + UP * (1 - 4 * error / self.quarters)

    def ticks(self) -> str:
        parts = []
        for quarter in range(self.quarters + 1):
            _, y = self.place(0, quarter / 4)
            parts.append(f'<line x1="{LEFT}" x2="{LEFT + ACROSS}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{quarter / 4:g}</text>')
        for step in range(5):
            share = self.widest * step / 4
            x, _ = self.place(share, 0)
            parts.append(f'<text x="{x:.1f}" y="{TOP + UP + 18}" text-anchor="middle">{share:.3g}</text>')
        return "".join(parts)


def _curve(entry: Mapping[str, Any], colour: str, axes: _Axes) -> str:
    full_rank = entry["full_rank"]
    placed = {
        point["rank"]: axes.place(point["rank"] / full_rank, point["function_error"]) for point in entry["points"]
    }
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed.values())
    curve = (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.8">'
        f"<title>{html.escape(entry['parameter'])}</title></polyline>"
    )
    if entry["chosen_rank"] not in placed:
        return curve
    x, y = placed[entry["chosen_rank"]]
    return f'{curve}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
