"""What people see: progress, tables and sentences; and predictions as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

from ghn_client.cli.options import messages
from ghn_client.info import Analysis, LowRankLayer, ModelInfo, SourceInfo, Transfer, Trust
from ghn_client.prediction import Prediction
from ghn_client.wire.codec import Progress as Event

MAX_ROWS = 16
"""Layers that are shown unless all are asked for."""

PIPE_WIDTH = 160
_RIGHT = ("parameters", "classes", "accuracy", "std")
_STAGES = {
    "queued": "waiting for a device",
    "encoding": "reading the architecture",
    "transferring": "taking weights from the source",
    "predicting": "predicting weights",
    "post_processing": "post-processing",
    "streaming": "receiving weights",
}


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[Event], None]]:
    """A callback that draws a line on stderr, gone at the end; it does nothing where stderr is no terminal."""
    console = messages()
    if not console.is_terminal:
        yield lambda event: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("asking the server", total=None)

        def show(event: Event) -> None:
            text = _STAGES.get(event.stage, event.stage)
            if event.queue_position:
                text += f" ({event.queue_position} requests ahead)"
            progress.update(task, description=text, total=event.total_bytes or None, completed=event.received_bytes)

        yield show


class _Row(NamedTuple):
    """A tensor in a table; ``spread`` is its standard deviation."""

    name: str
    shape: tuple[int, ...]
    origin: str
    spread: float | None = None


def print_prediction(prediction: Prediction, written: Sequence[str], seconds: float, *, show_all: bool) -> None:
    """One line a layer, the totals, and where the weights went."""
    rows = []
    for name, tensor in prediction.items():
        note = prediction.notes[name]
        spread = float(torch.std(tensor.float(), correction=0)) if tensor.numel() else None
        rows.append(_Row(note.torch_name or name, tuple(tensor.shape), note.origin, spread))
    console, metadata = _data_console(), prediction.metadata
    _print_layers(console, rows, prediction.trust, show_all=show_all)
    files = " and ".join([f"{written[0]} ({_bytes_text(len(prediction.buffer))})", *written[1:]])
    if prediction.transfer is not None:
        _print_transfer(console, prediction.transfer)
        advice = "measure the running statistics anew (recalibrate_batchnorm)"
        console.print(f"before use: {advice if prediction.needs_recalibration else 'nothing; keep running statistics'}")
    console.print(f"written to {files} in {seconds:.1f} s; hypernetwork {metadata.model}, seed {metadata.seed}")
    console.print(f"trust: {prediction.trust}", soft_wrap=True)


def print_analysis(analysis: Analysis, *, show_all: bool) -> None:
    """One line a layer, what low rank would do with it where that is asked; then the graph and what a source gives."""
    console = _data_console()
    rows = [_Row(item.torch_name or item.name, item.shape, item.origin) for item in analysis.tensors]
    if analysis.low_rank:
        _print_low_rank(console, analysis.low_rank, show_all=show_all)
    if show_all or not analysis.low_rank:  # one table to a screen
        _print_layers(console, rows, analysis.trust, show_all=show_all)
    else:
        _print_totals(console, rows, analysis.trust)
    types = ", ".join(f"{count} {name}" for name, count in sorted(analysis.op_type_counts.items()))
    console.print(f"graph: {analysis.num_nodes} nodes ({types}), {analysis.num_edges} edges")
    console.print(
        f"reply: {_bytes_text(analysis.total_bytes)} from {analysis.model}; digest {analysis.graph_digest[:16]}"
    )
    if analysis.buffers:
        console.print(f"not weights, left to you: {len(analysis.buffers)} buffers, such as {analysis.buffers[0]}")
    if analysis.transfer is not None:
        _print_transfer(console, analysis.transfer)
    console.print(f"trust: {analysis.trust}", soft_wrap=True)


def _print_layers(console: Console, rows: Sequence[_Row], trust: Trust, *, show_all: bool) -> None:
    """One line a layer (tensors whose names differ in the last part only): shapes, origins, spread of its largest."""
    layers: dict[str, list[_Row]] = {}
    for row in rows:
        layers.setdefault(row.name.rpartition(".")[0] or row.name, []).append(row)
    with_spread = any(row.spread is not None for row in rows)
    table = _table("layer", "shape", "origin", "parameters", *(["std"] if with_spread else []))
    lines = []
    for layer, parts in layers.items():
        shapes = " + ".join("x".join(map(str, part.shape)) or "scalar" for part in parts)
        origins = ", ".join(dict.fromkeys(part.origin for part in parts))
        spread = max(parts, key=lambda part: math.prod(part.shape)).spread
        cells = [layer, shapes, origins, _count_text(sum(math.prod(part.shape) for part in parts))]
        lines.append([*cells, *(["" if spread is None else f"{spread:.3g}"] if with_spread else [])])
    _print_table(console, table, lines, show_all=show_all)
    _print_totals(console, rows, trust)


def _print_totals(console: Console, rows: Sequence[_Row], trust: Trust) -> None:
    """How many weights there are, and where they come from."""
    total = sum(math.prod(row.shape) for row in rows)
    told = f": {shares}" if (shares := trust.describe_shares()) else ""
    console.print(f"{_count_text(total)} parameters in {len(rows)} tensors{told}")
    if any(row.origin == "tiled" for row in rows):
        console.print("tiled: the layer is wider than what is predicted, so the predicted block is repeated in it")


def _print_transfer(console: Console, transfer: Transfer) -> None:
    """What a source gives, and what is known of it."""
    source = transfer.source
    known = {
        "trained on": source.dataset,
        "accuracy": "" if source.accuracy is None else f"{source.accuracy:.1%}",
        "licence": source.licence,
        "digest": source.digest[:16],
    }
    console.print(f"source: {transfer}")
    console.print("source: " + ", ".join(f"{name} {value}" for name, value in known.items() if value))
    normalization = source.card.get("normalization")
    if normalization:
        told = ", ".join(f"{key} {tuple(round(x, 4) for x in values)}" for key, values in normalization.items())
        console.print(f"source: its images have {told}")


def _print_low_rank(console: Console, layers: Sequence[LowRankLayer], *, show_all: bool) -> None:
    """One line a layer: what it would become, and its error at other ranks; then the notes, and what is saved."""
    notes = dict.fromkeys(layer.note for layer in layers if layer.note)
    marks = dict(zip(notes, string.ascii_lowercase, strict=False))
    is_wide = show_all or console.width >= PIPE_WIDTH
    columns = ("layer", "then", "rank", "error", "parameters", "multiply-adds", "note")
    table = _table(*columns, *(["error at other ranks"] if is_wide else []))
    lines = []
    for layer in layers:
        dense, chosen = layer.dense, layer.chosen
        then = f"{'norm ' if layer.normalized else ''}{layer.activation}".strip() or "-"
        found = [str(chosen.rank), f"{chosen.function_error:.3f}"] if chosen.rank else ["dense", ""]
        costs = [(dense.parameters, chosen.parameters), (dense.multiply_adds, chosen.multiply_adds)]
        curve = [f"{cost.rank}: {cost.function_error:.3f}" for cost in layer.curve if cost.function_error >= 0.0005]
        cells = [layer.parameter, then, *found, *map(_change_text, costs), marks.get(layer.note, "")]
        lines.append([*cells, *(["  ".join(curve)] if is_wide else [])])
    _print_table(console, table, lines, show_all=show_all)
    for note, mark in marks.items():
        console.print(f"{mark}: {note}")
    parameters = sum(layer.dense.parameters for layer in layers), sum(layer.chosen.parameters for layer in layers)
    told = f"weighted layers: {_change_text(parameters)} parameters"
    if all(layer.dense.multiply_adds for layer in layers):
        work = sum(layer.dense.multiply_adds for layer in layers), sum(layer.chosen.multiply_adds for layer in layers)
        told += f", {_change_text(work)} multiply-adds per example"
    console.print(f"{told}; errors are those of the layer's function, relative to its output")


def print_models(models: Sequence[ModelInfo], sources: Sequence[SourceInfo], steps: Sequence[str]) -> None:
    """One line a hypernetwork, one a source, then the post-processing steps."""
    table = _table("name", "kind", "parameters", "classes", "trained on", "device", "digest")
    for model in models:
        name = f"{model.name} (default)" if model.is_default else model.name
        size, trained_on = _count_text(model.num_parameters), model.dataset or "unknown"
        table.add_row(name, model.kind, size, str(model.num_classes), trained_on, model.device, model.digest[:12])
    console = _data_console()
    console.print(table)
    table = _table("source", "parameters", "trained on", "classes", "accuracy", "licence", "digest")
    for source in sources:
        accuracy = "" if source.accuracy is None else f"{source.accuracy:.1%}"
        classes = str(len(source.class_names)) if source.class_names else "unknown"
        about = [source.dataset or "unknown", classes, accuracy, source.licence or "unknown"]
        table.add_row(source.name, _count_text(source.num_parameters), *about, source.digest[:12])
    if sources:
        console.print()
        console.print(table)
    console.print(f"post-processing steps: {', '.join(steps) or 'none'}")


def _data_console() -> Console:
    """Where data goes: stdout, wide where no terminal says how wide it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in _RIGHT else "left")
    return table


def _print_table(console: Console, table: Table, lines: Sequence[Sequence[str]], *, show_all: bool) -> None:
    """The first and the last lines where there are more than a screen takes."""
    hidden = 0 if show_all or len(lines) <= MAX_ROWS + 4 else len(lines) - MAX_ROWS
    head = MAX_ROWS * 3 // 4 if hidden else len(lines)
    for line in lines[:head]:
        table.add_row(*line)
    if hidden:
        table.add_row(f"… {hidden} more layers (--all shows them)")
    for line in lines[head + hidden :]:
        table.add_row(*line)
    console.print(table)


def _change_text(costs: tuple[int, int]) -> str:
    before, after = map(_count_text, costs)
    return before if before == after else f"{before} > {after}"


def _count_text(count: int) -> str:
    """A count with a unit that reads at a glance, such as ``25.6 M``."""
    return _with_unit(count, {"G": 10**9, "M": 10**6, "k": 10**3}, "")


def _bytes_text(count: int) -> str:
    return _with_unit(count, {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}, " bytes")


def _with_unit(count: int, units: Mapping[str, int], unit: str) -> str:
    return next((f"{count / size:.1f} {name}" for name, size in units.items() if count >= size), f"{count}{unit}")


def prediction_document(prediction: Prediction, written: Sequence[str], seconds: float) -> dict[str, Any]:
    """What ``predict --json`` prints."""
    metadata, notes = prediction.metadata, prediction.notes
    return {
        "output": written[0],
        "onnx_output": written[1] if len(written) > 1 else None,
        "bytes": len(prediction.buffer),
        **{key: getattr(metadata, key) for key in ("model", "model_digest", "graph_digest", "seed", "dtype")},
        "num_parameters": prediction.num_parameters,
        "trust": dataclasses.asdict(prediction.trust),
        "tensors": [
            {
                "name": name,
                "shape": list(value.shape),
                "origin": notes[name].origin,
                "torch_name": notes[name].torch_name,
            }
            for name, value in prediction.items()
        ],
        "transfer": dataclasses.asdict(prediction.transfer) if prediction.transfer else None,
        "statistics": list(prediction.statistics),
        "needs_recalibration": prediction.needs_recalibration,
        "warnings": list(prediction.warnings),
        "server_seconds": dict(prediction.seconds),
        "seconds": round(seconds, 3),
    }
