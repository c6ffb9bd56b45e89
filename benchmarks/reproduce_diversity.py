"""Does repairing diversity help? ``make reproduce-diversity``, or ``python -m benchmarks.reproduce_diversity``.

Fine-tunes each network on 1,000 CIFAR-10 images from He initialisation and from predictions with no step, noise, QR,
polar and auto: same number of steps, same batches per seed, learning rate of each start from the same grid on
validation images, with a seed that is not among those reported. Fills its part of ``docs/results.md``.
The published recipes (arXiv:2207.10049) train far longer and act from a late layer on; ``--layer`` asks for that.

A run can be stopped and goes on where it was: finished trainings are kept as lines of ``--cells``, those from
predictions with the digest of the hypernetwork's file, so that another hypernetwork does not reuse them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.charts import bar_chart
from benchmarks.experiment import (
    CHOOSING_SEED,
    Cell,
    cifar10,
    file_digest,
    fill_page,
    grouped,
    percent,
    run_seeds,
    table,
    verdict,
)
from ghn_architectures.architecture import Architecture, Configuration, Interface
from ghn_architectures.convnext import ConvNeXtConfiguration
from ghn_architectures.registry import ARCHITECTURES
from ghn_architectures.resnet import ResNetConfiguration
from ghn_architectures.vit import VisionTransformerConfiguration
from ghn_client.options import parse_step
from ghn_service.postprocess.diversity import measure_network
from ghn_service.postprocess.steps import Step
from ghn_service.predictor import PredictionOptions, Predictor
from ghn_service.training.evaluation.fine_tune import (
    FineTuneData,
    FineTuneSettings,
    fine_tune,
    mean_and_error,
    small_training_set,
)
from ghn_service.training.evaluation.zero_shot import he_module, initial_module, load_tensors
from ghn_service.training.precision import choose_precision

HE, GHN = "He", "GHN"
STARTS: Mapping[str, tuple[str, ...] | None] = {
    HE: None,
    GHN: (),
    "GHN + noise": ("noise:beta=3e-5",),
    "GHN + QR": ("noise:beta=3e-5", "orthogonal:method=qr"),
    "GHN + polar": ("noise:beta=3e-5", "orthogonal:method=polar"),
    "GHN + auto": ("auto",),
}
#: Small enough for one core, wide enough for layers beyond the 64 channels that the bundled hypernetwork predicts.
NETWORKS: Mapping[str, Configuration] = {
    "resnet8_wide": ResNetConfiguration((48, 96, 192), (1, 1, 1), stem_stride=2),
    "convnext_small": ConvNeXtConfiguration((64, 128, 256), (1, 1, 2), patch=4),
    "vit_small": VisionTransformerConfiguration(96, 2, 3),
}
VALIDATION_IMAGES = 1000
RANKS = ("rank", "effective_rank")


def find_network(name: str) -> Architecture:
    """A network of this file, or of the registry of reference networks."""
    configuration = NETWORKS[name] if name in NETWORKS else ARCHITECTURES[name]
    return Architecture(configuration.family, configuration, Interface(), name)


def start_module(start: str, architecture: Architecture, predictor: Predictor, seed: int, layer: int) -> nn.Module:
    """The network with the start of this name; ``layer`` is the first that the steps change."""
    texts = STARTS[start]
    if texts is None:
        return he_module(architecture, seed=seed)
    module = initial_module(architecture, seed=seed)
    load_tensors(module, predictor.predict(architecture.graph(), options=options_of(texts, seed, layer)))
    return module


def options_of(texts: Sequence[str], seed: int, layer: int) -> PredictionOptions:
    """Options with these steps, which change nothing before ``layer``."""
    steps = [parse_step(text) for text in texts]
    options = {"layer": str(layer)} if layer else {}
    return PredictionOptions(seed=seed, steps=tuple(Step(step.name, {**step.options, **options}) for step in steps))


def measure(cell: Cell, arguments: argparse.Namespace, predictor: Predictor) -> Cell:
    """Accuracy of the start of a cell before and after fine-tuning on a class-balanced small training set."""
    steps, seed = cell["steps"], cell["seed"]
    size = Interface().image_size
    data = cifar10(arguments.data, arguments.cache, image_size=size, held_out=VALIDATION_IMAGES)
    scored = data.validation if seed == CHOOSING_SEED else data.test.first(arguments.test_images)
    training = small_training_set(data.training, arguments.images, seed=seed)
    data = FineTuneData(training, data.validation, scored, data.normalization)
    rule = FineTuneSettings((cell["rate"],), choose_at=0, budgets=(steps,), longest=steps, every=steps)
    module = start_module(cell["start"], find_network(cell["network"]), predictor, seed, cell.get("layer", 0))
    precision = choose_precision("auto", torch.device("cpu"))
    curve = fine_tune(module, data, rule, steps=steps, seed=seed, precision=precision)
    return {"accuracy": curve.at(steps), "before": curve.at(0)}


def run_rows(arguments: argparse.Namespace) -> list[Cell]:
    """Every training; one entry for each network, start and seed, with the chosen rate."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    one = partial(measure, arguments=arguments, predictor=predictor)
    digest = file_digest(arguments.checkpoint)
    finished = []
    for network in arguments.networks:
        for start in arguments.starts:
            cell: Cell = {"network": network, "start": start, "images": arguments.images, "steps": arguments.steps}
            cell["test_images"] = arguments.test_images
            cell |= {} if start == HE else {"checkpoint": digest, "layer": arguments.layer}
            finished += run_seeds(arguments.cells, cell, one, rates=arguments.rates, seeds=arguments.seeds)
    return finished


Scores = Mapping[str, Mapping[str, Sequence[Cell]]]


def group_rows(results: Sequence[Cell]) -> dict[str, dict[str, list[Cell]]]:
    """Results by network and start."""
    networks = grouped(results, "network").items()
    return {name: {start: group for (start,), group in grouped(cells, "start").items()} for (name,), cells in networks}


def accuracy_table(rows: Scores, key: str) -> list[str]:
    """Mean and standard error in percent; bold is the best of a row."""
    starts = list(dict.fromkeys(start for scores in rows.values() for start in scores))
    lines = []
    for network, scores in rows.items():
        values = {start: [cell[key] for cell in cells] for start, cells in scores.items()}
        best = max(values, key=lambda start: sum(values[start]) / len(values[start]))
        texts = {start: percent(accuracies) for start, accuracies in values.items()}
        texts[best] = f"**{texts[best]}**"
        lines.append([network, *(texts.get(start, "-") for start in starts)])
    return table(["network", *starts], lines)


def differences(rows: Scores) -> Iterator[list[str]]:
    """What each start gains over the one before it, in percentage points paired by seed; bold where that counts."""
    pairs = [(GHN, HE), *((name, GHN) for name in STARTS if name not in (HE, GHN))]
    for network, scores in rows.items():
        row = [network]
        for start, reference in pairs:
            if start not in scores or reference not in scores:
                row.append("-")
                continue
            both = zip(scores[start], scores[reference], strict=True)
            gaps = [a["accuracy"] - b["accuracy"] for a, b in both]
            counts = verdict(gaps) in ("helps", "hurts")
            row.append(f"**{percent(gaps, 1, '+')}**" if counts else percent(gaps, 1, "+"))
        yield row


def diversity_table(arguments: argparse.Namespace) -> list[str]:
    """What the steps do to the weights themselves."""
    predictor = Predictor.from_checkpoint(arguments.checkpoint, device="cpu")
    starts = {start: texts for start, texts in STARTS.items() if texts is not None and start in arguments.starts}
    rows = []
    for network in arguments.networks:
        graph = find_network(network).graph()
        row = [network]
        for texts in starts.values():
            parameters = predictor.predict(graph, options=options_of(texts, 0, arguments.layer))
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
    return table(["network", *starts], rows)


def setting(arguments: argparse.Namespace) -> str:
    """How the networks were fine-tuned."""
    rates = ", ".join(f"{rate:g}" for rate in arguments.rates)
    return (
        f"{arguments.images:,} CIFAR-10 training images (class-balanced, another draw for each seed), "
        f"{arguments.steps} steps of 64 images, SGD with momentum 0.9 at a constant rate chosen for each network and "
        f"start from {rates} on {VALIDATION_IMAGES:,} validation images with a seed of its own, "
        f"{arguments.seeds} seeds, {arguments.test_images:,} test images (BatchNorm with batch statistics). "
        f"The hypernetwork is the one whose file has SHA-256 `{file_digest(arguments.checkpoint)}...`."
    )


def blocks(results: Sequence[Cell], arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What the page of results says of this experiment."""
    rows = group_rows(results)
    rates = [[network, *(f"{cells[0]['rate']:g}" for cells in scores.values())] for network, scores in rows.items()]
    return {
        "diversity: protocol": [setting(arguments)],
        "diversity: accuracy": accuracy_table(rows, "accuracy"),
        "diversity: differences": table(["network", *(name for name in STARTS if name != HE)], differences(rows)),
        "diversity: before": accuracy_table(rows, "before"),
        "diversity: weights": diversity_table(arguments),
        "diversity: rates": table(["network", *next(iter(rows.values()))], rates),
    }


def chart(results: Sequence[Cell]) -> str:
    """Accuracy after fine-tuning by network and start."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for network, scores in group_rows(results).items():
        for start, cells in scores.items():
            groups.setdefault(network, {})[start] = mean_and_error([100 * cell["accuracy"] for cell in cells])
    return bar_chart("Accuracy after fine-tuning on 1,000 images", groups, y_label="test accuracy, percent")


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the hypernetwork")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--cells", type=Path, default=Path(".cache/diversity.jsonl"), help="finished trainings")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of results.md")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=[*NETWORKS, *ARCHITECTURES])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="steps of 64 images; 80 are five epochs of 1,000")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--layer", type=int, default=0, help="first layer that steps change")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet, prints the page and writes it with its plot."""
    arguments: Any = parse_arguments(words)
    torch.set_num_threads(1)
    results = run_rows(arguments)
    fill_page(arguments.output, blocks(results, arguments), {"diversity_results": chart(results)})


if __name__ == "__main__":
    main()
