"""Norm-only tuning against its controls, from random and from predicted weights.

``python -m benchmarks.reproduce_norm_only --data FOLDER`` (``make reproduce-norm-only``) fills its part of
``docs/results.md``: the order of arXiv:2003.00152 (all > norm + head > norm-only > random parameters
of the same number > head only) on a size that two cores finish within the hour, the scales after training, and what
setting those near zero to zero costs. With ``--story`` it also writes the table of three architectures, two starts and
four strategies. The protocol follows the paper at a smaller size: momentum 0.9, running statistics follow the batches,
and scales that start uniform in [0, 1] with He weights. In the second table random weights start with scales of one, as
everybody starts.

A run can be stopped and goes on where it was: finished cells are kept by their settings, those of predicted starts also
by the digest of the hypernetwork, so that another hypernetwork measures only those anew.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.charts import line_chart
from benchmarks.experiment import Cell, file_digest, fill_page, grouped, run_cells, table
from ghn_architectures.architecture import Interface
from ghn_architectures.convnet import ConvNetConfiguration
from ghn_architectures.mobilenet import MobileNetConfiguration
from ghn_architectures.resnet import ResNetConfiguration
from ghn_client import GHNClient
from ghn_client.batchnorm import UPDATE, recalibrate_batchnorm, travelling_statistics
from ghn_client.finetune.fit import FitSettings, evaluate, fit
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.images import ImageBatches, load_images
from ghn_client.finetune.matrix_layers import find_head, matrix_layers, norm_layers
from ghn_client.finetune.norm_only import gamma_report
from ghn_client.finetune.strategies import prepare
from ghn_service.published import BUNDLED_CHECKPOINTS

#: Strategy, options and learning rate by the name in the tables; the first five in the order that the paper predicts.
#: Single weights have small gradients: of 0.1, 0.5 and 2 the last is the best rate for them (3,000 images, 5 epochs).
STRATEGIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "all": ("all", {}, 0.1),
    "norm + head": ("norm_only", {"head": True}, 0.1),
    "norm only": ("norm_only", {"head": False}, 0.1),
    "random 2 per channel": ("random_per_channel", {}, 2.0),
    "head only": ("head_only", {}, 0.1),
    "additive": ("additive", {"width": 64}, 0.05),
    "low-rank": ("low_rank_update", {"rank": 4}, 0.05),
}
CONTROLS = ("all", "norm + head", "norm only", "random 2 per channel", "head only")
STORY = ("all", "norm + head", "additive", "low-rank")
CONTROLLED = "resnet14"
FULL = {"images": 8_000, "test": 2_000, "epochs": 8, "batch": 128}
QUICK = {"images": 64, "test": 32, "epochs": 1, "batch": 32}
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
IMAGE_SIZE = 32
HE, UNIFORM, PREDICTED = "He", "He, scales in [0, 1]", "GHN"

#: Upper end of each of the 20 bins of |gamma|; the last one also holds all larger scales.
BIN_WIDTH = 0.1


def networks() -> dict[str, Any]:
    """Configurations by name: a ResNet-14 of half width, and two of other families for the story."""
    return {
        CONTROLLED: ResNetConfiguration((8, 16, 32), (2, 2, 2)),
        "convnet": ConvNetConfiguration((16, 32, 64), (1, 1, 1)),
        "mobilenet": MobileNetConfiguration(
            widths=(8, 16, 24),
            depths=(1, 2, 2),
            strides=(2, 2, 1),
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
    return training, held_out.first(test)


def start(cell: Cell, batches: ImageBatches, checkpoint: Path) -> nn.Module:
    """The network at its start: He weights, with the paper's scales or scales of one, or predicted weights."""
    network = build(cell["network"], cell["seed"])
    if cell["start"] == UNIFORM:
        generator = torch.Generator().manual_seed(cell["seed"])
        for layer in norm_layers(network).values():
            scale = layer.get_parameter("weight")
            scale.data = torch.rand(scale.shape, generator=generator)
    elif cell["start"] == PREDICTED:
        with GHNClient.embedded(checkpoint) as client:
            prediction = client.predict(network, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), seed=cell["seed"])
        prediction.load_into(network)
    recalibrate_batchnorm(network, batches, num_batches=10)
    return network


def measure(cell: Cell, *, data: str, checkpoint: Path) -> Cell:
    """Accuracy before and after, sizes, scales and processor time of one start, strategy and seed."""
    training, test = images(data, cell["images"], cell["test"])
    batches = ImageBatches(training, batch_size=cell["batch"], augment=True, seed=cell["seed"])
    held_out = ImageBatches(test, batch_size=500, augment=False)
    network = start(cell, batches, checkpoint)
    before = evaluate(network, held_out)[0]
    strategy, options, _ = STRATEGIES[cell["strategy"]]
    torch.manual_seed(cell["seed"])
    handle = random_per_channel(network) if strategy == "random_per_channel" else prepare(network, strategy, **options)
    begin = time.process_time()
    fit(handle, batches, settings=FitSettings(epochs=cell["epochs"], learning_rate=cell["rate"]))
    result: Cell = {
        "seconds": round(time.process_time() - begin, 1),
        "accuracy": evaluate(handle.module, held_out)[0],
        "accuracy_before": before,
        "trainable": handle.num_trainable,
        "delta_bytes": 4 * sum(value.numel() for part in handle.parts for value in part.state().values()),
    }
    if strategy in ("all", "norm_only") and cell["network"] == CONTROLLED:
        result.update(_scales(handle.merge(), held_out))
    return result


def _scales(network: nn.Module, held_out: ImageBatches) -> Cell:
    report = gamma_report(network, evaluate=lambda module: evaluate(module, held_out)[0])
    histogram = [sum(counts) for counts in zip(*(layer.histogram for layer in report.layers), strict=True)]
    return {
        "disabled": report.share,
        "accuracy_zeroed": report.score_zeroed,
        "histogram": histogram,
    }


class SparseUpdate(nn.Module):
    """The parametrization that replaces chosen entries (C, k) of the flattened rows of a weight by trained values."""

    def __init__(self, weight: torch.Tensor, indices: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(weight.detach().flatten(1).gather(1, indices))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the chosen entries replaced."""
        return weight.flatten(1).scatter(1, self.get_buffer("indices"), self.values).view_as(weight)


def random_per_channel(module: nn.Module, *, count: int = 2, seed: int = 0) -> FineTuneHandle:
    """Tunes ``count`` random weights of every output channel of every matrix layer but the head.

    The control of arXiv:2003.00152: two are as many as a norm layer has, and really so many numbers are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, layer in matrix_layers(module).items():
        if name == find_head(module):
            continue
        fan_in = layer.weight[0].numel()
        indices = torch.rand(len(layer.weight), fan_in, generator=generator).topk(min(count, fan_in), dim=1).indices
        parametrize.register_parametrization(layer, "weight", SparseUpdate(layer.weight, indices), unsafe=True)
        names.append(f"{name}.parametrizations.weight.0.values")
    part = Part("random_per_channel", {}, module, {"random": names}, travelling_statistics(module, UPDATE))
    return FineTuneHandle(part)


def cells_of(
    networks: Iterable[str],
    starts: Iterable[Cell],
    names: Iterable[str],
    seeds: Iterable[int],
    settings: dict[str, Any],
) -> list[Cell]:
    """Every strategy from every start with every seed; the sizes of the run are a part of every cell."""
    return [
        {"network": network, **start, "strategy": name, "rate": STRATEGIES[name][2], "seed": seed, **settings}
        for seed, network, start, name in itertools.product(seeds, networks, starts, names)
    ]


def predicted_starts(checkpoint: Path) -> list[Cell]:
    """The part of a cell that stands for weights of this hypernetwork."""
    return [{"start": PREDICTED, "checkpoint": file_digest(checkpoint)}]


def protocol(controls: list[Cell], settings: dict[str, Any]) -> list[str]:
    """Sizes of the run, its seeds, and the hypernetwork."""
    seeds = ", ".join(str(seed) for (seed,) in grouped(controls, "seed"))
    digests = {cell["checkpoint"] for cell in controls if "checkpoint" in cell}
    hypernetwork = f" The hypernetwork is the one whose file has SHA-256 `{digests.pop()}...`." if digests else ""
    sizes = (
        f"{settings['images']:,} training and {settings['test']:,} test images of CIFAR-10, {settings['epochs']} epochs"
    )
    return [f"{sizes}, seeds {seeds}; mean and standard deviation.{hypernetwork}"]


def _control_table(controls: list[Cell]) -> list[str]:
    rows = []
    for (start, strategy), group in grouped(controls, "start", "strategy").items():
        spread = statistics.stdev(cell["accuracy"] for cell in group) if len(group) > 1 else 0.0
        accuracy = f"{_mean(group, 'accuracy'):.2%} ± {spread:.2%}"
        row = [start, strategy, f"{group[0]['trainable']:,}", f"{_mean(group, 'accuracy_before'):.2%}", accuracy]
        if "disabled" in group[0]:
            row += [f"{_mean(group, 'disabled'):.1%}", f"{_mean(group, 'accuracy_zeroed'):.2%}"]
        rows.append([*row, "-", "-"][:7])
    header = ["start", "tuned", "numbers", "accuracy before", "accuracy", "disabled channels", "with those at zero"]
    return table(header, rows)


def _verdicts(controls: list[Cell]) -> list[str]:
    """Whether the expected order holds for each start, also where it does not."""
    lines = []
    for (start,), cells in grouped(controls, "start").items():
        means = {name: _mean(group, "accuracy") for (name,), group in grouped(cells, "strategy").items()}
        order = sorted(means, key=lambda name: -means[name])
        verdict = "holds" if order == list(means) else "does not hold"
        lines.append(f"- {start}: {' > '.join(order)}. The expected order {verdict}.")
    return lines


def _histograms(controls: list[Cell]) -> dict[str, list[tuple[float, float]]]:
    """Share of all scales per bin, by strategy and start; the middle of each bin on the x axis."""
    lines = {}
    for (start, strategy), group in grouped(controls, "start", "strategy").items():
        if "histogram" in group[0]:
            counts = [sum(values) for values in zip(*(cell["histogram"] for cell in group), strict=True)]
            shares = [(BIN_WIDTH * (i + 0.5), count / max(sum(counts), 1)) for i, count in enumerate(counts)]
            lines[f"{strategy}, {start.partition(',')[0]}"] = shares
    return lines


def _story_table(story: list[Cell]) -> list[str]:
    starts = list(dict.fromkeys(cell["start"] for cell in story))
    rows: list[list[str]] = []
    for (network,), cells in grouped(story, "network").items():
        before = {cell["start"]: f"{cell['accuracy_before']:.2%}" for cell in cells}
        rows.append([network, "nothing", "0", "0 KiB", *(before[start] for start in starts)])
        for (strategy,), group in grouped(cells, "strategy").items():
            found = {cell["start"]: f"{cell['accuracy']:.2%} in {cell['seconds']:.0f} s" for cell in group}
            sizes = [f"{group[0]['trainable']:,}", f"{group[0]['delta_bytes'] / 1024:.1f} KiB"]
            rows.append([network, strategy, *sizes, *(found[start] for start in starts)])
    return table(["network", "tuned", "numbers", "delta", *(f"from {start}" for start in starts)], rows)


def _mean(group: list[Cell], key: str) -> float:
    return float(statistics.fmean(cell[key] for cell in group))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--cells", type=Path, default=Path("runs/norm_only.jsonl"))
    parser.add_argument("--checkpoint", type=Path, help="hypernetwork for predicted starts; the shipped one by default")
    parser.add_argument("--no-predicted", action="store_true", help="random starts only")
    parser.add_argument("--story", action="store_true", help="also three architectures and four strategies")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="a minute, for a test")
    options = parser.parse_args(arguments)
    settings, seeds = (QUICK, QUICK_SEEDS) if options.quick else (FULL, SEEDS)
    checkpoint = options.checkpoint or min(BUNDLED_CHECKPOINTS.glob("*.safetensors"))
    predicted = [] if options.no_predicted else predicted_starts(checkpoint)
    run = partial(run_cells, options.cells, workers=options.workers)
    one = partial(measure, data=options.data, checkpoint=checkpoint)
    controls = run(cells_of([CONTROLLED], [{"start": UNIFORM}, *predicted], CONTROLS, seeds, settings), one)
    blocks = {"norm only: protocol": protocol(controls, settings), "norm only: accuracy": _control_table(controls)}
    blocks["norm only: order"] = _verdicts(controls)
    if options.story:
        story = cells_of(networks(), [{"start": HE}, *predicted], STORY, seeds[:1], settings)
        blocks["norm only: story"] = _story_table(run(story, one))
    chart = line_chart("Scales after training", _histograms(controls), x_label="|gamma|", y_label="share of channels")
    fill_page(options.output, blocks, {"norm_only_results": chart})


if __name__ == "__main__":
    main()
