"""Curves of a training run as one SVG page: loss, accuracy, speed and learning rate over target networks.

The drawing is a few polylines; it needs no plotting library, so ``ghn-train plot`` works wherever training works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from ghn_service.errors import DataError
from ghn_service.training.run_log import read_log

WIDTH, HEIGHT, MARGIN = 560, 240, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: Text above it.
        lines: Label and points (x, y) of each curve.
    """

    title: str
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


def plot_run(folder: Path, path: Path | None = None) -> Path:
    """Draws the curves of the run in ``folder`` to ``path`` (``curves.svg`` in the folder where omitted).

    Raises:
        DataError: The folder has no log, or nothing was logged yet.
    """
    records = read_log(folder)
    panels = [panel for panel in run_panels(records) if panel.lines]
    if not panels:
        raise DataError(f"the log in {folder} has no curve yet; wait until the first line is written")
    path = path or folder / "curves.svg"
    path.write_text(draw_panels(panels), encoding="utf-8")
    return path


def run_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """The diagrams of a run's records."""
    training = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    return [
        Panel("classification loss", _lines(training, ("loss",))),
        Panel(
            "accuracy",
            _lines(training, ("accuracy",), "training ")
            + _lines(validation, ("accuracy", "best", "worst"), "validation "),
        ),
        Panel("architectures per second", _lines(training, ("networks_per_s",))),
        Panel("gradient norm", _lines(training, ("gradient_norm",))),
    ]


def _lines(
    records: Sequence[dict[str, Any]], names: Sequence[str], prefix: str = ""
) -> tuple[tuple[str, tuple[tuple[float, float], ...]], ...]:
    found = []
    for name in names:
        points = tuple(
            (float(record["step"]), float(record[name])) for record in records if record.get(name) is not None
        )
        if points:
            found.append((prefix + name, points))
    return tuple(found)


def draw_panels(panels: Sequence[Panel]) -> str:
    """Diagrams below each other as an SVG document."""
    total = len(panels) * HEIGHT
    body = "".join(
        f'<g transform="translate(0 {index * HEIGHT})">{_draw(panel)}</g>' for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total}" viewBox="0 0 {WIDTH} {total}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )


def _draw(panel: Panel) -> str:
    xs = [x for _, points in panel.lines for x, _ in points]
    ys = [y for _, points in panel.lines for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1.0)
    low, high = min(ys), max(ys)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - 2 * MARGIN)
        down = HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return across, down

    parts = [f'<text x="{MARGIN}" y="20" font-size="13">{escape(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        _, down = place(left, value)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{down:.1f}" y2="{down:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 4}" y="{down + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        across, _ = place(left + share * (right - left), low)
        step = left + share * (right - left)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{step:.0f}</text>')
    for number, (label, points) in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        across = MARGIN + 130 * number
        parts.append(f'<text x="{across}" y="{HEIGHT - 12}" fill="{colour}">{escape(label)}</text>')
    return "".join(parts)
