"""Does repairing diversity help? ``make reproduce-diversity``, or ``python -m benchmarks.reproduce_diversity``.

Fine-tunes each network on 1,000 images of data that the hypernetwork has not seen, from He initialisation and from
predictions with no step, noise, half of the variance random, QR, polar and auto; steps act on all layers, on those in
need, and on the last third, where the published recipes (arXiv:2207.10049) act. Same number of steps, cosine to zero,
same batches per seed, weight decay of the published recipe of each kind; the learning rate of each row is chosen on
validation images by one rule (``experiment.run_seeds``) with seeds that are not among those reported. Fills its part of
``docs/results.md``.

A run can be stopped and goes on where it was: finished trainings are kept as lines of ``--cells``, those from
predictions with the digest of the hypernetwork's file, so that another hypernetwork does not reuse them.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.charts import bar_chart
from benchmarks.experiment import (
    CHOOSING_SEEDS,
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
from ghn_architectures.architecture import Architecture, Configuration, Interface
from ghn_architectures.convnext import ConvNeXtConfiguration
from ghn_architectures.registry import ARCHITECTURES
from ghn_architectures.resnet import ResNetConfiguration
from ghn_architectures.vit import VisionTransformerConfiguration
from ghn_client.options import parse_step
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.postprocess.diversity import measure_network
from ghn_service.postprocess.steps import Step
from ghn_service.postprocess.weighted_layers import weighted_layers
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.training.evaluation.fine_tune import (
    FineTuneData,
    FineTuneSettings,
    fine_tune,
    mean_and_error,
    small_training_set,
)
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.evaluation.zero_shot import he_module, initial_module, load_tensors
from ghn_service.training.precision import choose_precision

HE, GHN, MIMETIC = "He", "GHN", "mimetic"
ALL, IN_NEED, LAST_THIRD = "all layers", "layers in need", "last third"
NOISE = "noise:beta=3e-5"
HALF_RANDOM = "noise:beta=1,scale=relative,keep_rms=true"
STEPS: Mapping[str, tuple[str, ...]] = {
    "QR": (NOISE, "orthogonal:method=qr"),
    "polar": (NOISE, "orthogonal:method=polar"),
    "auto": ("auto",),
}
#: Steps of each start and the layers they change; None for He initialisation.
STARTS: Mapping[str, tuple[tuple[str, ...], str] | None] = {
    HE: None,
    GHN: ((), ALL),
    "noise": ((NOISE,), ALL),
    "half random": ((HALF_RANDOM,), ALL),
    MIMETIC: ((MIMETIC,), ALL),
    **{f"{name}, {scope}": (steps, scope) for name, steps in STEPS.items() for scope in (ALL, IN_NEED, LAST_THIRD)},
}
#: Small enough for one core, wide enough for layers beyond the 64 channels that the bundled hypernetwork predicts.
NETWORKS: Mapping[str, Configuration] = {
    "resnet8_wide": ResNetConfiguration((48, 96, 192), (1, 1, 1), stem_stride=2),
    "convnext_small": ConvNeXtConfiguration((64, 128, 256), (1, 1, 2), patch=4),
    "vit_small": VisionTransformerConfiguration(96, 2, 3),
}
#: Optimizer and weight decay as in the published recipes, for every start.
RECIPES: Mapping[str, tuple[str, float]] = {"resnet8_wide": ("sgd", 0.01)}
OTHER_RECIPE = ("adamw", 0.1)
VALIDATION_IMAGES = 1000
BATCH_SIZE = 32
RANKS = ("rank", "effective_rank")


def find_network(name: str) -> Architecture:
    """A network of this file, or of the registry of reference networks."""
    configuration = NETWORKS[name] if name in NETWORKS else ARCHITECTURES[name]
    return Architecture(configuration.family, configuration, Interface(), name)


def start_module(start: str, architecture: Architecture, predictor: Predictor, seed: int) -> nn.Module:
    """The network with the start of this name."""
    if STARTS[start] is None:
        return he_module(architecture, seed=seed)
    module = initial_module(architecture, seed=seed)
    graph = architecture.graph()
    load_tensors(module, predictor.predict(graph, options=options_of(start, graph, seed)))
    return module


def options_of(start: str, graph: ArchitectureGraph, seed: int) -> PredictionOptions:
    """Options with the steps of a start, on its layers."""
    texts, scope = STARTS[start] or ((), ALL)
    first = {ALL: 1, IN_NEED: 0, LAST_THIRD: 2 * len(list(weighted_layers(graph))) // 3 + 1}[scope]
    parsed = (parse_step(text) for text in texts)
    steps = (Step(step.name, {**step.options, "layer": str(first)}) for step in parsed)
    return PredictionOptions(seed=seed, steps=tuple(steps))


def measure(cell: Cell, arguments: argparse.Namespace, predictor: Predictor) -> Cell:
    """Accuracy of the start of a cell before and after fine-tuning on a class-balanced small training set."""
    steps, seed = cell["steps"], cell["seed"]
    folder = next(folder for folder in arguments.data if folder.name == cell["data"])
    data = image_data(folder, arguments.cache, image_size=Interface().image_size, held_out=VALIDATION_IMAGES)
    scored = data.validation if seed in CHOOSING_SEEDS else data.test.first(arguments.test_images)
    training = small_training_set(data.training, arguments.images, seed=seed)
    data = FineTuneData(training, data.validation, scored, data.normalization)
    rule = FineTuneSettings(
        (cell["rate"],),
        longest=steps,
        every=steps,
        optimizer=cell["optimizer"],
        batch_size=BATCH_SIZE,
        weight_decay=cell["weight_decay"],
        schedule="cosine",
    )
    module = start_module(cell["start"], find_network(cell["network"]), predictor, seed)
    precision = choose_precision("auto", torch.device("cpu"))
    curve = fine_tune(module, data, rule, steps=steps, seed=seed, precision=precision)
    return {"accuracy": curve.at(steps), "before": curve.at(0)}


def run_rows(arguments: argparse.Namespace) -> list[Cell]:
    """Every training; one entry for each data set, length, network, start and seed, with the chosen rate."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    one = partial(measure, arguments=arguments, predictor=predictor)
    digest = file_digest(arguments.checkpoint)
    finished: list[Cell] = []
    chosen: dict[tuple[str, ...], float] = {}  # rates of the shorter fine-tuning
    for steps, folder, network, start in itertools.product(
        sorted(arguments.steps), arguments.data, arguments.networks, arguments.starts
    ):
        optimizer, decay = RECIPES.get(network, OTHER_RECIPE)
        cell: Cell = {"data": folder.name, "network": network, "start": start, "images": arguments.images}
        cell |= {"steps": steps, "optimizer": optimizer, "weight_decay": decay, "test_images": arguments.test_images}
        cell |= {} if start == HE else {"checkpoint": digest}
        row = folder.name, network, start
        finished += run_seeds(arguments.cells, cell, one, seeds=arguments.seeds, near=chosen.get(row))
        chosen[row] = finished[-1]["rate"]
    return finished


def group_rows(results: Sequence[Cell]) -> dict[tuple[str, str], dict[str, list[Cell]]]:
    """Results by network and data, then by start."""
    return {
        (network, data): {start: group for (start,), group in grouped(cells, "start").items()}
        for (network, data), cells in grouped(results, "network", "data").items()
    }


def accuracy_table(results: Sequence[Cell]) -> list[str]:
    """Before, after (bold: the best of a column) and what that gains over the plain prediction, with the rate."""
    columns = group_rows(results)
    means = {
        key: {start: mean_and_error([cell["accuracy"] for cell in cells])[0] for start, cells in column.items()}
        for key, column in columns.items()
    }
    rows = []
    for start in dict.fromkeys(start for column in columns.values() for start in column):
        row = [start]
        for key, column in columns.items():
            if start not in column:
                row.append("-")
                continue
            cells = column[start]
            after = percent([cell["accuracy"] for cell in cells])
            after = f"**{after}**" if means[key][start] == max(means[key].values()) else after
            before = mean_and_error([cell["before"] for cell in cells])[0]
            text = f"{100 * before:.1f} → {after}"
            if start != GHN and GHN in column:
                both = zip(cells, column[GHN], strict=True)
                text += f" ({percent([a['accuracy'] - b['accuracy'] for a, b in both], 1, '+')})"
            row.append(f"{text}, {cells[0]['rate']:g}")
        rows.append(row)
    return markdown_table(["start", *(f"{network}, {data}" for network, data in columns)], rows)


def verdicts(results: Sequence[Cell]) -> Iterator[str]:
    """For each start, in how many columns it helps, hurts or does neither, against the plain prediction."""
    outcomes: dict[str, Counter[str]] = {}
    for column in group_rows(results).values():
        for start in (name for name in column if name != GHN and GHN in column):
            both = zip(column[start], column[GHN], strict=True)
            outcomes.setdefault(start, Counter())[verdict([a["accuracy"] - b["accuracy"] for a, b in both])] += 1
    for start, counts in outcomes.items():
        found = ", ".join(f"{outcome} in {count}" for outcome, count in counts.items())
        yield f"- {start}: {found} of {counts.total()}."


def diversity_table(arguments: argparse.Namespace) -> list[str]:
    """What the steps do to the weights themselves."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    starts = [start for start in arguments.starts if start != HE]
    rows = []
    for start in starts:
        row = [start]
        for network in arguments.networks:
            graph = find_network(network).graph()
            parameters = predictor.predict(graph, options=options_of(start, graph, 0))
            measured = measure_network(parameters, graph)
            sizes = {name: parameters[name].numel() for name in measured}
            full = sum(item.full_rank for item in measured.values())
            rank, effective = (sum(getattr(item, key) for item in measured.values()) for key in RANKS)
            tiled, cosine = (
                sum(getattr(item, key) * sizes[name] for name, item in measured.items()) / sum(sizes.values())
                for key in ("tiled_share", "mean_abs_cosine")
            )
            row.append(f"{tiled:.0%}, {rank / full:.0%}, {effective / full:.0%}, {cosine:.3f}")
        rows.append(row)
    return markdown_table(["start", *arguments.networks], rows)


def setting(arguments: argparse.Namespace) -> str:
    """How the networks were fine-tuned."""
    names = " and ".join(folder.name for folder in arguments.data)
    return (
        f"{arguments.images:,} training images of {names} at 32 x 32 (class-balanced, another draw for each seed), "
        f"batches of 32, cosine to zero; for every start SGD with momentum 0.9 and weight decay 0.01 for the ResNet, "
        f"AdamW with 0.1 for the others; rates chosen by the mean of {len(CHOOSING_SEEDS)} seeds on validation "
        f"images, {RATES}; {arguments.seeds} further seeds, at most {arguments.test_images:,} test images (BatchNorm "
        f"with batch statistics). Before → after in percent, mean ± standard error (gain over GHN, paired by seed), "
        f"learning rate. The hypernetwork is the one whose file has SHA-256 "
        f"`{file_digest(arguments.checkpoint)}...`."
    )


def blocks(results: Sequence[Cell], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What the page of results says of this experiment."""
    accuracy, found = [], []
    for (steps,), cells in grouped(results, "steps").items():
        accuracy += [f"{steps:,} steps:", "", *accuracy_table(cells), ""]
        found += [f"After {steps:,} steps, against GHN:", "", *verdicts(cells), ""]
    return {
        "diversity: protocol": [setting(arguments)],
        "diversity: accuracy": accuracy[:-1],
        "diversity: verdicts": found[:-1],
        "diversity: weights": diversity_table(arguments),
    }


def chart(results: Sequence[Cell]) -> str:
    """Accuracy after the longest fine-tuning by network, data and start."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    longest = max(cell["steps"] for cell in results)
    for (network, data), column in group_rows([cell for cell in results if cell["steps"] == longest]).items():
        for start, cells in column.items():
            scores = [100 * cell["accuracy"] for cell in cells]
            groups.setdefault(f"{network}, {data}", {})[start] = mean_and_error(scores)
    return bar_chart(f"Accuracy after {longest:,} steps", groups, y_label="test accuracy, percent")


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of images")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the hypernetwork")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--cells", type=Path, default=Path(".cache/diversity.jsonl"), help="finished trainings")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of results.md")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=[*NETWORKS, *ARCHITECTURES])
    usual = [start for start in STARTS if start != MIMETIC]  # which changes transformers alone
    parser.add_argument("--starts", nargs="+", default=usual, choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="lengths of fine-tuning")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet, prints the page and writes it with its plot."""
    arguments: Any = parse_arguments(words)
    torch.set_num_threads(1)
    results = run_rows(arguments)
    fill_page(arguments.output, blocks(results, arguments), {"diversity_results": chart(results)})


if __name__ == "__main__":
    main()
