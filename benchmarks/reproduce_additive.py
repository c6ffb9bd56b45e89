"""How many neurons change how many labels: closed form and trained, two and three layers.

``python -m benchmarks.reproduce_additive --data FOLDER`` (``make reproduce-additive``) fills its part of
``docs/results.md``. The order of growth is the claim of arXiv:2408.00359 (slope 1 and 1/2 of neurons against
labels, flat in the number of samples); the constants are ours. Samples are real images as a small convolutional network
sees them. A run can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.charts import line_chart
from benchmarks.experiment import Cell, fill_page, run_cells, table
from ghn_client.finetune.additive import additive
from ghn_client.finetune.images import ImageBatches, load_images
from ghn_client.finetune.patch.capacity import three_layer_neurons
from ghn_client.finetune.patch.solver import patch

FULL = {
    "samples": (1000, 5000, 20000),
    "changed": (1, 3, 10, 30, 100, 400),
    "trained": ((64, 2), (64, 4), (64, 8), (64, 16), (256, 4), (256, 8), (256, 16)),
    "steps": 3000,
}
QUICK = {"samples": (100, 200), "changed": (2, 8), "trained": ((32, 2),), "steps": 300}
CLASSES = 10


@cache
def real_features(data: str, count: int) -> torch.Tensor:
    """(count, 192) 8 x 8 colour thumbnails of real images, normalised."""
    training, _ = load_images(data, image_size=32, limit=count)
    images = torch.cat([batch for batch, _ in ImageBatches(training, batch_size=1000, augment=False)])
    return nn.functional.avg_pool2d(images, 4).flatten(1)


def frozen_network() -> nn.Module:
    """A fixed random classifier of thumbnails; its labels are what is changed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, CLASSES)).eval()


def wrong_labels(network: nn.Module, inputs: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels other than those of the network, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    return (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES


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


def smallest_trained(cell: Cell, data: str, steps: int) -> Cell:
    """Smallest width per hidden layer with which Adam reaches zero errors on changed and kept labels, by bisection."""
    samples, changed, depth = cell["samples"], cell["changed"], cell["depth"]
    inputs = real_features(data, samples)[:samples]
    network = frozen_network()
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    labels[:changed] = wrong_labels(network, inputs[:changed], 2)
    low, high = 1, 4 * changed + 8
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _reaches_zero(inputs, labels, depth, middle, steps) else (middle + 1, high)
    return {"neurons": low * (depth - 1)}


def _reaches_zero(inputs: torch.Tensor, labels: torch.Tensor, depth: int, width: int, steps: int) -> bool:
    handle = additive(frozen_network(), width=width, depth=depth, at="logits", example_inputs=inputs[:1])
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-2)
    for step in range(steps):
        logits = handle.module(inputs)
        if step % 50 == 0 and bool((logits.argmax(1) == labels).all()):
            return True
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return bool((handle.module(inputs).argmax(1) == labels).all())


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of log y against log x by least squares."""
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope


def cells_of(settings: dict) -> Iterator[Cell]:
    for samples in settings["samples"]:
        for changed in settings["changed"]:
            for depth, directions in ((2, "shared"), (2, "own"), (3, "shared")):
                cell = {"kind": "closed", "samples": samples, "changed": changed}
                yield {**cell, "depth": depth, "directions": directions}
    for samples, changed in settings["trained"]:
        for depth in (2, 3):
            yield {"kind": "trained", "samples": samples, "changed": changed, "depth": depth}


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
    depths = ["2 layers", "3 layers, in all of at most per output"]
    blocks = {
        "additive: certificates": [certificates],
        "additive: closed form": table(
            ["samples K", "labels N", *names], (_row(closed, kinds, size) for size in _sizes(closed))
        ),
        "additive: slopes": [f"Slope of log neurons against log labels at the largest K: {slopes}."],
        "additive: trained": table(
            ["samples K", "labels N", *depths],
            (_row(trained, [(2, None), (3, None)], size) for size in _sizes(trained)),
        ),
    }
    chart = line_chart(
        f"Neurons that change N of {largest:,} labels", lines, x_label="labels N", y_label="neurons", logarithmic=True
    )
    return blocks, chart


def _sizes(cells: list[Cell]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((cell["samples"], cell["changed"]) for cell in cells))


def _row(cells: list[Cell], kinds: Sequence[tuple[int, str | None]], size: tuple[int, int]) -> list[str]:
    """Samples, labels, and for each kind the neurons, their bound and what else changed."""
    samples, changed = size
    found = {
        (cell["depth"], cell.get("directions")): cell for cell in cells if (cell["samples"], cell["changed"]) == size
    }
    row = [f"{samples:,}", str(changed)]
    for kind in kinds:
        cell = found[kind]
        bound = three_layer_neurons(changed) if kind[0] == 3 else min(3 * changed, samples - 1)
        touched = f", {cell['touched']:.2%}{'' if cell['holds'] else ' FAIL'}" if "touched" in cell else ""
        row.append(f"{cell['neurons']} of {cell.get('bound', bound)}{touched}")
    return row


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
        return smallest_trained(cell, options.data, settings["steps"])

    blocks, chart = report(run_cells(options.cells, cells_of(settings), measure))
    fill_page(options.output, blocks, {"additive_results": chart})


if __name__ == "__main__":
    main()
