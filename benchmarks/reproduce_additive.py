"""How many neurons change how many labels: closed form and trained, two and three layers.

``python -m benchmarks.reproduce_additive --data FOLDER`` (``make reproduce-additive``) fills its part of
``docs/results.md``. The order of growth is the claim of arXiv:2408.00359 (slope 1 and 1/2 of neurons against
labels, flat in the number of samples); the constants are ours. Samples are real images as a small convolutional network
sees them. A run can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.charts import line_chart
from benchmarks.experiment import Cell, fill_page, grouped, run_cells
from ghn_client.finetune.additive import additive
from ghn_client.finetune.images import ImageBatches, load_images
from ghn_client.finetune.patch.solver import patch
from ghn_service.training.evaluation.report import markdown_table

FULL = {
    "samples": (1000, 5000, 20000),
    "changed": (1, 3, 10, 30, 100, 400),
    "dimensions": (2, 8),
    "trained": (4, 16, 64, 256),
    "seeds": 3,
    "steps": 3000,
}
QUICK = {"samples": (100, 200), "changed": (2, 8), "dimensions": (4,), "trained": (2, 4), "seeds": 1, "steps": 300}
CLASSES = 10
TRAINED_SAMPLES = 512


@cache
def real_features(data: str, count: int) -> torch.Tensor:
    """(count, 192) 8 x 8 colour thumbnails of real images, normalised."""
    training, _ = load_images(data, image_size=32, limit=count)
    images = torch.cat([batch for batch, _ in ImageBatches(training, batch_size=1000, augment=False)])
    return nn.functional.avg_pool2d(images, 4).flatten(1)


@cache
def principal_components(data: str, dimensions: int) -> torch.Tensor:
    """(512, dimensions) leading principal components of thumbnails, each of variance 1."""
    features = real_features(data, TRAINED_SAMPLES)
    left: torch.Tensor = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)[0]
    return left[:, :dimensions] * math.sqrt(TRAINED_SAMPLES)


def frozen_network(inputs: int = 192, seed: int = 0) -> nn.Module:
    """A fixed random classifier; its labels are what is changed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, CLASSES)).eval()


def closed_form(cell: Cell, data: str) -> Cell:
    """Certificate of a patch of ``changed`` of ``samples`` labels, all to one class for the count per output."""
    samples, changed, depth = cell["samples"], cell["changed"], cell["depth"]
    features = real_features(data, samples + samples // 4)
    inputs, held_out = features[:samples], features[samples:]
    network = frozen_network()
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
    others = order[labels[order] != 0]
    wrong = others[:changed]
    keep = order[~torch.isin(order, wrong)]
    certificate = patch(
        network,
        inputs[wrong],
        torch.zeros(changed, dtype=torch.long),
        inputs[keep],
        depth=depth,
        directions=cell["directions"],
        held_out_inputs=held_out,
    ).certificate
    return {
        "neurons": certificate.neurons,
        "bound": certificate.neuron_bound,
        "holds": certificate.holds,
        "precision": certificate.precision,
        "touched": certificate.touched,
    }


def smallest_trained(cell: Cell, data: str) -> Cell:
    """Smallest width per hidden layer with which Adam reaches zero errors on changed and kept labels, by bisection.

    The labels of ``changed`` random samples become other random classes; few dimensions, as samples in many are
    separated by a linear layer.
    """
    changed, depth, seed = cell["changed"], cell["depth"], cell["seed"]
    inputs = principal_components(data, cell["dimensions"])
    network = frozen_network(cell["dimensions"], seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    wrong = torch.randperm(len(inputs), generator=generator)[:changed]
    labels[wrong] = (labels[wrong] + torch.randint(1, CLASSES, (changed,), generator=generator)) % CLASSES
    low, high = 1, 4 * changed + 8
    while low < high:
        middle = (low + high) // 2
        is_enough = _reaches_zero(network, inputs, labels, depth, middle, cell["steps"])
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return {"neurons": low * (depth - 1), "is_enough": low < 4 * changed + 8}


def _reaches_zero(
    network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, depth: int, width: int, steps: int
) -> bool:
    handle = additive(copy.deepcopy(network), width=width, depth=depth, at="logits", example_inputs=inputs[:1])
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-2)
    for step in range(steps):
        logits = handle.module(inputs)
        if step % 50 == 0 and bool((logits.argmax(1) == labels).all()):
            return True
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
        optimizer.step()
    return bool((handle.module(inputs).argmax(1) == labels).all())


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of log y against log x by least squares."""
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope


def cells_of(settings: Mapping[str, Any]) -> Iterator[Cell]:
    for samples in settings["samples"]:
        for changed in settings["changed"]:
            for depth, directions in ((2, "shared"), (2, "own"), (3, "shared")):
                cell = {"kind": "closed", "samples": samples, "changed": changed}
                yield {**cell, "depth": depth, "directions": directions}
    for changed, depth, dimensions, seed in itertools.product(
        settings["trained"], (2, 3), settings["dimensions"], range(settings["seeds"])
    ):
        cell = {"kind": "trained", "dimensions": dimensions, "changed": changed, "depth": depth, "seed": seed}
        yield {**cell, "steps": settings["steps"]}


def report(results: list[Cell]) -> tuple[dict[str, list[str]], str]:
    """The blocks of the page and the plot."""
    closed, trained = ([cell for cell in results if cell["kind"] == kind] for kind in ("closed", "trained"))
    largest = max(cell["samples"] for cell in closed)
    kinds = list(dict.fromkeys((cell["depth"], cell["directions"]) for cell in closed))
    names = [f"{depth} layers, {directions}" for depth, directions in kinds]
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for cell in closed:
        if cell["samples"] == largest:
            lines[names[kinds.index((cell["depth"], cell["directions"]))]].append((cell["changed"], cell["neurons"]))
    certificates = (
        f"{sum(cell['holds'] for cell in closed)} of {len(closed)} certificates hold, "
        f"{sum(cell['precision'] == 'float64' for cell in closed)} of them in float64, the others in float32."
    )
    slopes = ", ".join(f"{slope(points):.2f} ({name})" for name, points in lines.items() if len(points) > 1)
    blocks = {
        "additive: certificates": [certificates],
        "additive: closed form": markdown_table(
            ["samples K", "labels N", *names],
            (_row(closed, kinds, *size) for size in grouped(closed, "samples", "changed")),
        ),
        "additive: slopes": [f"Slope of log neurons against log labels at the largest K: {slopes}."],
        "additive: trained": _trained_table(trained),
    }
    chart = line_chart(
        f"Neurons that change N of {largest:,} labels", lines, x_label="labels N", y_label="neurons", logarithmic=True
    )
    return blocks, chart


def _row(cells: list[Cell], kinds: Sequence[tuple[int, str]], samples: int, changed: int) -> list[str]:
    """Samples, labels, and for each kind the neurons, their bound and what else changed."""
    here = grouped(cells, "samples", "changed", "depth", "directions")
    row = [f"{samples:,}", str(changed)]
    for kind in kinds:
        (cell,) = here[samples, changed, *kind]
        failed = "" if cell["holds"] else " FAIL"
        row.append(f"{cell['neurons']} of {cell['bound']}, {cell['touched']:.2%}{failed}")
    return row


def _trained_table(cells: list[Cell]) -> list[str]:
    """Median neurons and their range over seeds by dimensions and depth, and the slopes of the medians."""
    kinds = grouped(cells, "dimensions", "depth")
    rows: list[list[str]] = []
    medians: dict[tuple[Any, ...], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for changed in dict.fromkeys(cell["changed"] for cell in cells):
        row = [str(changed)]
        for kind, group in kinds.items():
            here = [cell for cell in group if cell["changed"] == changed]
            neurons = [cell["neurons"] for cell in here]
            open_end = "" if all(cell["is_enough"] for cell in here) else "+"
            medians[kind].append((changed, statistics.median(neurons)))
            row.append(f"{statistics.median(neurons):.0f} ({min(neurons)} to {max(neurons)}{open_end})")
        rows.append(row)
    rows.append(["slope", *(f"{slope(points):.2f}" for points in medians.values())])
    return markdown_table(["labels N", *(f"{dimensions} inputs, {depth} layers" for dimensions, depth in kinds)], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--cells", type=Path, default=Path("runs/additive.jsonl"))
    parser.add_argument("--quick", action="store_true", help="a minute, for a test")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL

    def measure(cell: Cell) -> Cell:
        if cell["kind"] == "closed":
            return closed_form(cell, options.data)
        return smallest_trained(cell, options.data)

    blocks, chart = report(run_cells(options.cells, cells_of(settings), measure))
    fill_page(options.output, blocks, {"additive_results": chart})


if __name__ == "__main__":
    main()
