"""Norm-only tuning against its controls, from random and from predicted weights.

``python -m benchmarks.reproduce_norm_only --data FOLDER --other-data FOLDER`` (``make reproduce-norm-only``) fills its
part of ``docs/results.md``: the order of arXiv:2003.00152 (all > norm + head > norm only > random parameters of the
same number > head only) from random weights on CIFAR-10, for several depths and widths, and from predicted weights on
images that the hypernetwork has not seen; the scales after training, and what setting those near zero to zero costs.
With ``--story`` it also writes the table of three architectures, two starts and four strategies. The protocol follows
the paper at a smaller size: momentum 0.9, weight decay 1e-4, running statistics follow the batches, and scales that
start uniform in [0, 1] with He weights. From predicted weights, and in the table of the story, random weights start
with scales of one, as everybody starts. The learning rate of every row is chosen on validation images by one rule
(``experiment.run_seeds``), with seeds that are not among those reported.

A run can be stopped and goes on where it was: finished cells are kept by their settings, those of predicted starts also
by the digest of the hypernetwork, so that another hypernetwork measures only those anew.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.charts import line_chart
from benchmarks.experiment import (
    CHOOSING_SEEDS,
    HELPS,
    HURTS,
    NO_DIFFERENCE,
    RATES,
    Cell,
    file_digest,
    fill_page,
    grouped,
    image_data,
    percent,
    run_seeds,
    verdict,
)
from ghn_architectures.architecture import Interface
from ghn_architectures.convnet import ConvNetConfiguration
from ghn_architectures.mobilenet import MobileNetConfiguration
from ghn_architectures.resnet import ResNetConfiguration
from ghn_client import GHNClient
from ghn_client.batchnorm import UPDATE, recalibrate_batchnorm, travelling_statistics
from ghn_client.finetune.fit import FitSettings, evaluate, fit
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.images import ImageBatches
from ghn_client.finetune.matrix_layers import find_head, matrix_layers, norm_layers
from ghn_client.finetune.norm_only import gamma_report
from ghn_client.finetune.strategies import prepare
from ghn_service.published import BUNDLED_CHECKPOINTS
from ghn_service.training.evaluation.fine_tune import small_training_set
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.networks import to_channels_last
from ghn_service.training.precision import avoid_slow_layers, choose_precision, target_passes

#: Strategy and options by the name in the tables; the first five in the order that the paper predicts.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all", {}),
    "norm + head": ("norm_only", {"head": True}),
    "norm only": ("norm_only", {"head": False}),
    "random 2 per channel": ("random_per_channel", {}),
    "head only": ("head_only", {}),
    "all but norm": ("all_but_norm", {}),
    "additive": ("additive", {"width": 64}),
    "low-rank": ("low_rank_update", {"rank": 4}),
}
ORDER = ("all", "norm + head", "norm only", "random 2 per channel", "head only")
CONTROLS = (*ORDER, "all but norm")
STORY = ("all", "norm + head", "additive", "low-rank")
CONTROLLED = "resnet14"
SIZES = ("resnet8", "resnet32", "resnet14, half width", "resnet14, double width")
SIZE_CONTROLS = ("all", "norm only", "random 2 per channel")
FULL = {"images": 2_000, "test": 2_000, "epochs": 30, "batch": 32, "size": 16}
FEW = {"images": 500, "test": 2_000, "epochs": 30, "batch": 32, "size": 32}
QUICK = {"images": 64, "test": 32, "epochs": 1, "batch": 32, "size": 16}
VALIDATION_IMAGES = 1_000
WEIGHT_DECAY = 1e-4
HE, UNIFORM, PREDICTED = "He", "He, scales in [0, 1]", "GHN"

#: Upper end of each of the 20 bins of |gamma|; the last one also holds all larger scales.
BIN_WIDTH = 0.1
#: What ``experiment.verdict`` says of a step of the expected order.
_OUTCOMES = {HELPS: "seen", HURTS: "reversed", NO_DIFFERENCE: "cannot be told"}


def networks() -> dict[str, Any]:
    """Configurations by name: a ResNet-14 of 8 to 32 channels, its sizes, and two of other families for the story."""
    return {
        CONTROLLED: ResNetConfiguration((8, 16, 32), (2, 2, 2)),
        "resnet8": ResNetConfiguration((8, 16, 32), (1, 1, 1)),
        "resnet32": ResNetConfiguration((8, 16, 32), (5, 5, 5)),
        "resnet14, half width": ResNetConfiguration((4, 8, 16), (2, 2, 2)),
        "resnet14, double width": ResNetConfiguration((16, 32, 64), (2, 2, 2)),
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
            prediction = client.predict(network, torch.zeros(1, 3, cell["size"], cell["size"]), seed=cell["seed"])
        prediction.load_into(network)
    recalibrate_batchnorm(network, batches, num_batches=10)
    return network


def measure(cell: Cell, *, folders: Mapping[str, Path], checkpoint: Path) -> Cell:
    """Accuracy before and after, sizes, scales and processor time of one start, strategy and seed."""
    data = image_data(folders[cell["data"]], None, image_size=cell["size"], held_out=VALIDATION_IMAGES)
    training = small_training_set(data.training, cell["images"], seed=cell["seed"])
    scored = data.validation if cell["seed"] in CHOOSING_SEEDS else data.test.first(cell["test"])
    batches = ImageBatches(training, batch_size=cell["batch"], augment=True, seed=cell["seed"])
    held_out = ImageBatches(scored, batch_size=500, augment=False)
    network = start(cell, batches, checkpoint)
    before = evaluate(network, held_out)[0]
    strategy, options = STRATEGIES[cell["strategy"]]
    torch.manual_seed(cell["seed"])
    handle = OWN_STRATEGIES[strategy](network) if strategy in OWN_STRATEGIES else prepare(network, strategy, **options)
    avoid_slow_layers(to_channels_last(handle.module))
    cpu = torch.device("cpu")
    begin = time.process_time()
    with target_passes(cpu, choose_precision("auto", cpu)):
        fit(handle, batches, settings=FitSettings(cell["epochs"], cell["rate"], weight_decay=cell["weight_decay"]))
    result: Cell = {
        "seconds": round(time.process_time() - begin, 1),
        "accuracy": evaluate(handle.module, held_out)[0],
        "before": before,
        "trainable": handle.num_trainable,
        "delta_bytes": 4 * sum(value.numel() for part in handle.parts for value in part.state().values()),
    }
    if strategy in ("all", "norm_only"):
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


def random_per_channel(module: nn.Module, *, count: int = 2) -> FineTuneHandle:
    """Tunes ``count`` random weights of every output channel of every matrix layer but the head.

    The control of arXiv:2003.00152: two are as many as a norm layer has, and really so many numbers are trained. Which
    ones is drawn from torch's own generator, which ``measure`` seeds.
    """
    names = []
    for name, layer in matrix_layers(module).items():
        if name == find_head(module):
            continue
        fan_in = layer.weight[0].numel()
        indices = torch.rand(len(layer.weight), fan_in).topk(min(count, fan_in), dim=1).indices
        parametrize.register_parametrization(layer, "weight", SparseUpdate(layer.weight, indices), unsafe=True)
        names.append(f"{name}.parametrizations.weight.0.values")
    part = Part("random_per_channel", {}, module, {"random": names}, travelling_statistics(module, UPDATE))
    return FineTuneHandle(part)


def all_but_norm(module: nn.Module) -> FineTuneHandle:
    """Tunes every parameter but scales and shifts of norm layers: what training gains from them."""
    norms = {f"{path}." for path in norm_layers(module)}
    names = [name for name, _ in module.named_parameters() if not any(name.startswith(path) for path in norms)]
    return FineTuneHandle(Part("all_but_norm", {}, module, {"tuned": names}, travelling_statistics(module, UPDATE)))


OWN_STRATEGIES = {"random_per_channel": random_per_channel, "all_but_norm": all_but_norm}


def predicted_starts(checkpoint: Path) -> list[Cell]:
    """The part of a cell that stands for weights of this hypernetwork."""
    return [{"start": PREDICTED, "checkpoint": file_digest(checkpoint)}]


def _accuracies(group: Iterable[Cell], key: str = "accuracy") -> list[float]:
    return [cell[key] for cell in group]


def _control_table(cells: list[Cell]) -> list[str]:
    rows = []
    for (network, start, strategy), group in grouped(cells, "network", "start", "strategy").items():
        accuracy = f"{percent(_accuracies(group, 'before'))} → {percent(_accuracies(group))}"
        row = [network, start, strategy, f"{group[0]['trainable']:,}", accuracy, f"{group[0]['rate']:g}"]
        if "disabled" in group[0]:
            row += [f"{_mean(group, 'disabled'):.1%}", f"{100 * _mean(group, 'accuracy_zeroed'):.1f}"]
        rows.append([*row, "-", "-"][:8])
    header = [
        "network",
        "start",
        "tuned",
        "numbers",
        "before → after",
        "rate",
        "disabled channels",
        "with those at zero",
    ]
    return markdown_table(header, rows)


def _verdicts(cells: list[Cell]) -> list[str]:
    """Which steps of the expected order are seen, are reversed, or cannot be told, for each network and start."""
    lines = []
    for (network, start), group in grouped(cells, "network", "start").items():
        accuracies = {
            name: _accuracies(found) for (name,), found in grouped(group, "strategy").items() if name in ORDER
        }
        found: dict[str, list[str]] = {}
        for (name, better), (other, worse) in itertools.pairwise(accuracies.items()):
            outcome = verdict([a - b for a, b in zip(better, worse, strict=True)])
            found.setdefault(_OUTCOMES[outcome], []).append(f"{name} > {other}")
        steps = "; ".join(f"{outcome}: {', '.join(pairs)}" for outcome, pairs in found.items())
        lines.append(f"- {network}, {start}: {steps}.")
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
        before = {cell["start"]: f"{cell['before']:.2%}" for cell in cells}
        rows.append([network, "nothing", "0", "0 KiB", *(before[start] for start in starts)])
        for (strategy,), group in grouped(cells, "strategy").items():
            starts_found = grouped(group, "start").items()
            found = {
                name: f"{percent(_accuracies(own))} in {_mean(own, 'seconds'):.0f} s" for (name,), own in starts_found
            }
            sizes = [f"{group[0]['trainable']:,}", f"{group[0]['delta_bytes'] / 1024:.1f} KiB"]
            rows.append([network, strategy, *sizes, *(found[start] for start in starts)])
    return markdown_table(["network", "tuned", "numbers", "delta", *(f"from {start}" for start in starts)], rows)


def _mean(group: list[Cell], key: str) -> float:
    return float(statistics.fmean(cell[key] for cell in group))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of CIFAR-10, for random starts")
    parser.add_argument("--other-data", type=Path, help="images that the hypernetwork has not seen; none by default")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--cells", type=Path, default=Path("runs/norm_only.jsonl"))
    parser.add_argument("--checkpoint", type=Path, help="hypernetwork for predicted starts; the shipped one by default")
    parser.add_argument("--sizes", action="store_true", help="also other depths and widths")
    parser.add_argument("--story", action="store_true", help="also three architectures and four strategies")
    parser.add_argument("--quick", action="store_true", help="a minute, for a test")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    many, few, seeds, rate = (QUICK, QUICK, 1, 0.1) if options.quick else (FULL, FEW, 5, None)
    checkpoint = options.checkpoint or min(BUNDLED_CHECKPOINTS.glob("*.safetensors"))
    folders = {folder.name: folder for folder in (options.data, options.other_data) if folder}
    one = partial(measure, folders=folders, checkpoint=checkpoint)

    def rows(data: Path, networks: Iterable[str], starts: Iterable[Cell], names: Iterable[str]) -> list[Cell]:
        found, settings = [], many if data == options.data else few
        for network, start, name in itertools.product(networks, starts, names):
            cell = {"data": data.name, "network": network, **start, "strategy": name, "weight_decay": WEIGHT_DECAY}
            near = chosen.get((start["start"], name))
            found += run_seeds(options.cells, {**cell, **settings}, one, seeds=seeds, rate=rate, near=near)
            chosen.setdefault((start["start"], name), found[-1]["rate"])
        return found

    chosen: dict[tuple[str, str], float] = {}  # the first rate of each start and strategy, where others begin to seek

    controls = rows(options.data, [CONTROLLED], [{"start": UNIFORM}], CONTROLS)
    blocks = {"norm only: protocol": [protocol(many, few, seeds)], "norm only: accuracy": _control_table(controls)}
    blocks["norm only: order"] = _verdicts(controls)
    chart = line_chart("Scales after training", _histograms(controls), x_label="|gamma|", y_label="share of channels")
    starts = [{"start": HE}, *predicted_starts(checkpoint)]
    if options.other_data:
        predicted = rows(options.other_data, [CONTROLLED], starts, ORDER)
        blocks["norm only: predicted"] = [f"On {options.other_data.name}:", "", *_control_table(predicted)]
        blocks["norm only: predicted"] += ["", f"Hypernetwork: SHA-256 `{file_digest(checkpoint)}...`."]
    if options.sizes:
        sizes = rows(options.data, SIZES, [{"start": UNIFORM}], SIZE_CONTROLS)
        blocks["norm only: sizes"] = [*_control_table(sizes), "", *_verdicts(sizes)]
    if options.story and options.other_data:
        story = rows(options.other_data, (CONTROLLED, "convnet", "mobilenet"), starts, STORY)
        blocks["norm only: story"] = _story_table(story)
    fill_page(options.output, blocks, {"norm_only_results": chart})


def protocol(many: Mapping[str, int], few: Mapping[str, int], seeds: int) -> str:
    """How the networks were trained."""
    return (
        f"From random weights alone {many['images']:,} training images at {many['size']} x {many['size']}, beside "
        f"predicted weights {few['images']:,} at {few['size']} x {few['size']} (class-balanced, another draw for each "
        f"seed); at most {many['test']:,} test images, {many['epochs']} epochs in batches of {many['batch']}, SGD with "
        f"momentum 0.9, cosine to zero, weight decay {WEIGHT_DECAY:g}, bfloat16 where the processor has it; rates "
        f"chosen by the mean of {len(CHOOSING_SEEDS)} seeds on validation images, {RATES}; {seeds} further seeds, mean "
        "± standard error in percent. A channel counts as disabled where |gamma| < 0.01."
    )


if __name__ == "__main__":
    main()
