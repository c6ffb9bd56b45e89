"""Tables and summaries for people."""

from __future__ import annotations

import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from ghn_client.info import Analysis, LowRankLayer, ModelInfo
from ghn_client.prediction import Prediction

MAX_ROWS = 80
"""Layers that are shown unless all are asked for."""

PIPE_WIDTH = 160


@dataclass(slots=True)
class LayerRow:
    """A layer: tensors whose names differ in the last part only."""

    name: str
    shapes: list[str] = field(default_factory=list)
    origins: dict[str, None] = field(default_factory=dict)
    num_elements: int = 0
    spread: str = ""


def data_console() -> Console:
    """Where data goes: stdout, wide where no terminal says how wide it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def shape_text(shape: Sequence[int]) -> str:
    """A shape such as ``64x3x7x7``."""
    return "x".join(map(str, shape)) if shape else "scalar"


def count_text(count: int) -> str:
    """A count with a unit that reads at a glance, such as ``25.6 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def bytes_text(count: int) -> str:
    """Bytes with a binary unit."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} bytes"


def print_prediction(console: Console, prediction: Prediction, *, show_all: bool) -> None:
    """One line a layer: name, shapes, origin, standard deviation of its largest tensor; then the totals."""
    labels = {name: note.torch_name or name for name, note in prediction.notes.items()}
    shapes = {labels.get(name, name): tuple(tensor.shape) for name, tensor in prediction.items()}
    origins = {labels.get(name, name): origin for name, origin in prediction.origins.items()}
    spreads = {labels.get(name, name): spread for name, spread in _spreads(prediction).items()}
    _print_rows(console, _layer_rows(shapes, origins, spreads), show_all=show_all, with_spread=True)
    _print_shares(console, origins, {name: _num_elements(shape) for name, shape in shapes.items()})


def print_analysis(console: Console, analysis: Analysis, *, show_all: bool) -> None:
    """One line a layer, then what the graph is made of."""
    shapes = {item.torch_name or item.name: item.shape for item in analysis.tensors}
    origins = {item.torch_name or item.name: item.origin for item in analysis.tensors}
    _print_rows(console, _layer_rows(shapes, origins, {}), show_all=show_all, with_spread=False)
    counts = {name: _num_elements(shape) for name, shape in shapes.items()}
    _print_shares(console, origins, counts)
    types = ", ".join(f"{count} {name}" for name, count in sorted(analysis.op_type_counts.items()))
    console.print(f"graph: {analysis.num_nodes} nodes ({types}), {analysis.num_edges} edges")
    console.print(
        f"reply: {bytes_text(analysis.total_bytes)} from {analysis.model}; digest {analysis.graph_digest[:16]}"
    )
    if analysis.buffers:
        console.print(f"not weights, left to you: {len(analysis.buffers)} buffers, such as {analysis.buffers[0]}")


def print_low_rank(console: Console, layers: Sequence[LowRankLayer]) -> None:
    """One line a layer: what it would become, and its error at other ranks; then the notes, and what is saved."""
    notes = dict.fromkeys(layer.note for layer in layers if layer.note)
    marks = dict(zip(notes, string.ascii_lowercase, strict=False))
    table = _table("layer", "then", "rank", "error", "parameters", "multiply-adds", "error at other ranks", "note")
    for layer in layers:
        dense, chosen = layer.dense, layer.chosen
        then = f"{'norm ' if layer.normalized else ''}{layer.activation}".strip() or "-"
        found = [str(chosen.rank), f"{chosen.function_error:.3f}"] if chosen.rank else ["dense", ""]
        costs = [(dense.parameters, chosen.parameters), (dense.multiply_adds, chosen.multiply_adds)]
        curve = "  ".join(f"{cost.rank}: {cost.function_error:.3f}" for cost in layer.curve)
        table.add_row(layer.parameter, then, *found, *map(_change_text, costs), curve, marks.get(layer.note, ""))
    console.print(table)
    for note, mark in marks.items():
        console.print(f"{mark}: {note}")
    parameters = sum(layer.dense.parameters for layer in layers), sum(layer.chosen.parameters for layer in layers)
    told = f"weighted layers: {_change_text(parameters)} parameters"
    if all(layer.dense.multiply_adds for layer in layers):
        work = sum(layer.dense.multiply_adds for layer in layers), sum(layer.chosen.multiply_adds for layer in layers)
        told += f", {_change_text(work)} multiply-adds per example"
    console.print(f"{told}; errors are those of the layer's function, relative to its output")


def _change_text(costs: tuple[int, int]) -> str:
    before, after = map(count_text, costs)
    return before if before == after else f"{before} > {after}"


def print_models(console: Console, models: Sequence[ModelInfo]) -> None:
    """One line a hypernetwork."""
    table = _table("name", "kind", "parameters", "classes", "trained on", "device", "digest")
    for model in models:
        name = f"{model.name} (default)" if model.is_default else model.name
        size, trained_on = count_text(model.num_parameters), model.dataset or "unknown"
        table.add_row(name, model.kind, size, str(model.num_classes), trained_on, model.device, model.digest[:12])
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in ("parameters", "classes", "std") else "left")
    return table


def _layer_rows(
    shapes: Mapping[str, Sequence[int]], origins: Mapping[str, str], spreads: Mapping[str, float]
) -> list[LayerRow]:
    rows: dict[str, LayerRow] = {}
    largest: dict[str, int] = {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0] or name
        row = rows.setdefault(layer, LayerRow(layer))
        count = _num_elements(shape)
        row.shapes.append(shape_text(shape))
        row.origins[origins.get(name, "")] = None
        row.num_elements += count
        if count > largest.get(layer, 0):
            largest[layer] = count
            row.spread = f"{spreads[name]:.3g}" if name in spreads else ""
    return list(rows.values())


def _print_rows(console: Console, rows: Sequence[LayerRow], *, show_all: bool, with_spread: bool) -> None:
    table = _table("layer", "shape", "origin", "parameters", *(["std"] if with_spread else []))
    hidden = 0 if show_all or len(rows) <= MAX_ROWS + 4 else len(rows) - MAX_ROWS
    head = MAX_ROWS * 3 // 4 if hidden else len(rows)
    for index, row in enumerate(rows):
        if head <= index < head + hidden:
            if index == head:
                table.add_row(f"… {hidden} more layers (--all shows them)")
            continue
        cells = [row.name, " + ".join(row.shapes), ", ".join(row.origins), count_text(row.num_elements)]
        table.add_row(*cells, *([row.spread] if with_spread else []))
    console.print(table)


def _print_shares(console: Console, origins: Mapping[str, str], counts: Mapping[str, int]) -> None:
    total = sum(counts.values())
    shares: dict[str, int] = {}
    for name, count in counts.items():
        origin = origins.get(name, "").partition(":")[0]
        shares[origin] = shares.get(origin, 0) + count
    parts = [f"{count / max(total, 1):.1%} {origin}" for origin, count in sorted(shares.items(), key=lambda x: -x[1])]
    console.print(f"{count_text(total)} parameters in {len(counts)} tensors: {', '.join(parts)}")


def _num_elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _spreads(prediction: Prediction) -> dict[str, float]:
    """Standard deviation of every tensor."""
    return {
        name: float(torch.std(tensor.float(), correction=0)) for name, tensor in prediction.items() if tensor.numel()
    }
