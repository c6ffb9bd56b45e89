"""Norm-only tuning against its controls, from random and from predicted weights.

``python -m benchmarks.reproduce_norm_only --data FOLDER`` (``make reproduce-norm-only``) writes the tables and the
plot of ``docs/norm_only_results.md``: the order of arXiv:2003.00152 on a size that two cores finish (all > norm +
head > norm-only > random parameters of the same number > head only), the scales after training, and what pruning the
disabled channels costs. With ``--story`` it also writes the table of three architectures, two starts and four
strategies. A run can be stopped and goes on where it was. The protocol follows the paper at a smaller size: scales
start uniform in [0, 1] and shifts at 0 for He weights, momentum 0.9, running statistics follow the batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures.convnet import ConvNetConfiguration
from architectures.interface import Interface
from architectures.mobilenet import MobileNetConfiguration
from architectures.resnet import ResNetConfiguration
from benchmarks.cells import Cell, run_cells
from benchmarks.charts import line_chart
from ghn_client.finetune.fit import FitSettings, evaluate, fit
from ghn_client.finetune.gamma import gamma_report
from ghn_client.finetune.image_data import ImageBatches, load_images
from ghn_client.finetune.norm_layers import find_norm_layers
from ghn_client.finetune.pruning import prune_disabled_channels
from ghn_client.finetune.strategies import prepare
from ghn_client.recalibrate import recalibrate_batchnorm

#: name, strategy, options: in the order that the paper's result predicts.
CONTROLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("all", "all", {}),
    ("norm + head", "norm_only", {"head": True}),
    ("norm only", "norm_only", {"head": False}),
    ("random 2 per channel", "random_per_channel", {"count": 2}),
    ("head only", "head_only", {}),
)
STORY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("all", "all", {}),
    ("norm-only", "norm_only", {"head": True}),
    ("additive", "additive", {"width": 64}),
    ("low-rank", "low_rank_update", {"rank": 4}),
)
FULL = {"images": 10_000, "test": 2_000, "epochs": 12, "seeds": (0, 1, 2), "batch": 128}
QUICK = {"images": 64, "test": 32, "epochs": 1, "seeds": (0,), "batch": 32}
LEARNING_RATES = {"all": 0.1, "norm_only": 0.1, "random_per_channel": 0.1, "head_only": 0.1, "additive": 0.05}
IMAGE_SIZE = 32


def networks() -> dict[str, Any]:
    """Configurations by name: a ResNet-14 of half width, and two of other families for the story."""
    return {
        "resnet14": ResNetConfiguration((8, 16, 32), (2, 2, 2)),
        "convnet": ConvNetConfiguration((16, 32, 64), (1, 1, 1)),
        "mobilenet": MobileNetConfiguration(
            widths=(8, 16, 24),
            depths=(1, 2, 2),
            strides=(1, 2, 2),
            expansions=(1, 4, 4),
            kernels=(3, 3, 3),
            head_width=64,
        ),
    }


def build(name: str, seed: int) -> nn.Module:
    """A network with its own (He) initial weights."""
    torch.manual_seed(seed)
    module: nn.Module = networks()[name].build(Interface())
    return module


@cache
def images(data: str, count: int, test: int) -> tuple[Any, Any]:
    """Training and test images."""
    training, held_out = load_images(data, image_size=IMAGE_SIZE, limit=count)
    chosen = slice(0, test)
    return training, type(held_out)(held_out.images[chosen], held_out.labels[chosen])


def start(cell: Cell, batches: ImageBatches, checkpoint: str | None) -> nn.Module:
    """The network at its start: He weights with the paper's scales, or predicted weights."""
    network = build(cell["network"], cell["seed"])
    if cell["start"] == "He":
        generator = torch.Generator().manual_seed(cell["seed"])
        for layer in find_norm_layers(network):
            scale = layer.parameters["weight"]
            scale.data = torch.rand(scale.shape, generator=generator)
    else:
        from ghn_client import GHNClient

        with GHNClient.embedded(checkpoint) as client:
            prediction = client.predict(network, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), seed=cell["seed"])
        prediction.load_into(network)
    recalibrate_batchnorm(network, batches, num_batches=10)
    return network


def measure(cell: Cell, data: str, settings: dict[str, Any], checkpoint: str | None) -> Cell:
    """Accuracy, sizes, scales and time of one start, strategy and seed."""
    training, test = images(data, settings["images"], settings["test"])
    batches = ImageBatches(training, batch_size=settings["batch"], augment=True, seed=cell["seed"])
    held_out = ImageBatches(test, batch_size=500, augment=False)
    network = start(cell, batches, checkpoint)
    _, strategy, options = next(entry for entry in (*CONTROLS, *STORY) if entry[0] == cell["strategy"])
    handle = prepare(network, strategy, **options)
    begin = time.perf_counter()
    rate = LEARNING_RATES.get(strategy, 0.05)
    epochs = FitSettings(epochs=settings["epochs"], learning_rate=rate)
    fit(handle, batches, settings=epochs)
    seconds = time.perf_counter() - begin
    result: Cell = {
        "accuracy": evaluate(handle.module, held_out)[0],
        "trainable": handle.num_trainable,
        "delta_bytes": 4 * sum(value.numel() for part in handle.parts for value in part.state().values()),
        "seconds": round(seconds, 1),
    }
    if strategy in ("all", "norm_only") and cell["network"] == "resnet14":
        result.update(_scales(handle.merge(), held_out, test.images[:4].float() / 128 - 1))
    return result


def _scales(network: nn.Module, held_out: ImageBatches, example: torch.Tensor) -> Cell:
    report = gamma_report(network, evaluate=lambda module: evaluate(module, held_out)[0])
    pruned = prune_disabled_channels(network, example)
    histogram = [sum(counts) for counts in zip(*(layer.histogram for layer in report.layers), strict=True)]
    return {
        "disabled": report.share,
        "accuracy_zeroed": report.score_zeroed,
        "accuracy_pruned": evaluate(pruned.module, held_out)[0],
        "parameters_before": pruned.report.parameters_before,
        "parameters_after": pruned.report.parameters_after,
        "histogram": histogram,
    }


def cells_of(settings: dict[str, Any], starts: tuple[str, ...], *, story: bool) -> Iterator[Cell]:
    for seed in settings["seeds"]:
        for begin in starts:
            for name, _, _ in CONTROLS:
                yield {"network": "resnet14", "start": begin, "strategy": name, "seed": seed}
    if story:
        for network in networks():
            for begin in starts:
                for name, _, _ in STORY:
                    yield {"network": network, "start": begin, "strategy": name, "seed": 0}


def report(results: list[Cell], settings: dict[str, Any]) -> tuple[str, str]:
    """The document and the histogram plot."""
    seeds = ", ".join(map(str, settings["seeds"]))
    text = [
        "# Norm-only tuning and its controls",
        "",
        f"Written by `make reproduce-norm-only`: ResNet-14 with 8, 16 and 32 channels, {settings['images']:,} images",
        f"of CIFAR-10, {settings['epochs']} epochs, {settings['test']:,} test images, seeds {seeds}; mean and standard",
        "deviation. A much smaller setting than that of arXiv:2003.00152: the order is what is compared, not the",
        "percentages.",
        "",
        "| start | tuned | numbers | accuracy | disabled channels | accuracy when pruned | parameters left |",
        "|---|---|---|---|---|---|---|",
    ]
    controls = [cell for cell in results if cell["strategy"] in {name for name, _, _ in CONTROLS}]
    controls = [cell for cell in controls if cell["network"] == "resnet14"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for begin in dict.fromkeys(cell["start"] for cell in controls):
        for name, _, _ in CONTROLS:
            group = [cell for cell in controls if cell["start"] == begin and cell["strategy"] == name]
            text.append(_row(begin, name, group))
            if "histogram" in group[0]:
                counts = [sum(values) for values in zip(*(cell["histogram"] for cell in group), strict=True)]
                total = max(sum(counts), 1)
                lines[f"{name}, {begin}"] = [(0.1 * i + 0.05, count / total) for i, count in enumerate(counts)]
    text += ["", *_verdicts(controls), "", "![share of scales by size](norm_only_results.svg)", ""]
    text += _story_table([cell for cell in results if cell["strategy"] in {name for name, _, _ in STORY}])
    chart = line_chart("Scales after training", lines, x_label="|gamma|", y_label="share of channels")
    return "\n".join(text), chart


def _row(begin: str, name: str, group: list[Cell]) -> str:
    mean = partial(_mean, group)
    pruned = f"{mean('disabled'):.1%} | {mean('accuracy_pruned'):.2%}" if "disabled" in group[0] else "- | -"
    left = f"{mean('parameters_after') / mean('parameters_before'):.1%}" if "disabled" in group[0] else "-"
    spread = statistics.stdev(cell["accuracy"] for cell in group) if len(group) > 1 else 0.0
    return (
        f"| {begin} | {name} | {group[0]['trainable']:,} | {mean('accuracy'):.2%} ± {spread:.2%} | {pruned} | {left} |"
    )


def _mean(group: list[Cell], key: str) -> float:
    return sum(cell[key] for cell in group) / len(group)


def _verdicts(controls: list[Cell]) -> list[str]:
    """Whether the expected order holds for each start, also where it does not."""
    lines = []
    for begin in dict.fromkeys(cell["start"] for cell in controls):
        means = {
            name: _mean([c for c in controls if c["start"] == begin and c["strategy"] == name], "accuracy")
            for name, _, _ in CONTROLS
        }
        order = sorted(means, key=lambda name: -means[name])
        holds = order == [name for name, _, _ in CONTROLS]
        lines.append(f"- {begin}: {' > '.join(order)}. The expected order {'holds' if holds else 'does not hold'}.")
    return lines


def _story_table(results: list[Cell]) -> list[str]:
    stories = [
        cell for cell in results if cell["network"] != "resnet14" or cell["strategy"] in ("additive", "low-rank")
    ]
    if not stories:
        return []
    rows = [
        "## Three architectures, two starts, four strategies",
        "",
        "One seed, same images and epochs.",
        "",
        "| network | start | strategy | accuracy | trained numbers | delta | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {c['network']} | {c['start']} | {c['strategy']} | {c['accuracy']:.2%} | {c['trainable']:,} |"
        f" {c['delta_bytes'] / 1024:.1f} KiB | {c['seconds']:.0f} |"
        for c in sorted(results, key=lambda c: (c["network"], c["start"]))
        if c["seed"] == 0
    ]
    return [*rows, ""]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--cells", type=Path, default=Path("runs/norm_only.jsonl"))
    parser.add_argument("--checkpoint", help="hypernetwork for predicted starts; the shipped one by default")
    parser.add_argument("--starts", nargs="+", default=["He", "GHN"], choices=["He", "GHN"])
    parser.add_argument("--story", action="store_true", help="also three architectures and four strategies")
    parser.add_argument("--quick", action="store_true", help="a minute, for a test")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    cells = cells_of(settings, tuple(options.starts), story=options.story)
    results = run_cells(options.cells, cells, lambda cell: measure(cell, options.data, settings, options.checkpoint))
    document, chart = report(results, settings)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "norm_only_results.md").write_text(document)
    (options.output / "norm_only_results.svg").write_text(chart)
    print(document)


if __name__ == "__main__":
    main()
