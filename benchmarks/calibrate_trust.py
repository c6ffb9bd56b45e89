"""What the verdict of a prediction is worth: ``python -m benchmarks.calibrate_trust``.

Fine-tunes networks of every kind from predicted weights and from He initialisation, both at the best of the same
learning rates, on images that the hypernetwork was not trained on (the test images of CIFAR-10),
and sets the gain beside the verdict.
Every second network of the list is kept apart from the choice of thresholds. ``--heads`` compares classifiers for
another number of classes instead. Fills its part of ``docs/results.md`` with what is measured so far.

A run can be stopped and goes on where it was: finished trainings are kept as lines of ``--cells``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.experiment import Cell, file_digest, fill_page, grouped, run_cells
from ghn_architectures.architecture import Interface
from ghn_architectures.registry import build_network
from ghn_client import GHNClient
from ghn_client.finetune.images import ImageSet, measure_normalization
from ghn_service.training.evaluation.fine_tune import FineTuneData, FineTuneSettings, fine_tune
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.evaluation.results import read_lines
from ghn_service.training.evaluation.zero_shot import he_initialize
from ghn_service.training.images import require_split
from ghn_service.training.networks import find_network
from ghn_service.training.precision import choose_precision, keep_freed_memory

PREDICTED, HE = "predicted", "He"
VERDICTS = ("typical", "unusual", "far")
STEPS = (100, 500)
SETTINGS = FineTuneSettings(
    (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), choose_at=50, budgets=STEPS, longest=500, every=100, batch_size=16
)
SIZE = 32
#: Numbers of random networks: the first ones of at most 12 million multiply-adds.
RANDOM: Mapping[str, tuple[int, ...]] = {
    "test": (0, 1, 3, *range(4, 23), 24, 25, *range(28, 34), 35, 36),
    "deep": (17, 46, 48, 61, 64, 96),
    "dense": (3, 4, 6, 21, 26, 34, 37, 45),
    "bnfree": (0, 1, 4, 7, 8, 9, 10, 11, 13, 14, 15, 17),
    "wide": (87,),
}
#: Ways to make a classifier for another number of classes; of 5 classes, no row is a copy.
HEADS: Mapping[int, tuple[str, ...]] = {20: ("copies", "reset", "noise"), 5: ("copies", "reset")}
HEAD_NETWORKS = ("timm/test_resnet", "reference/se_mobilenet_mini", "torchvision/shufflenet_v2_x0_5", "test/5")
REFERENCES = ("resnet20", "se_mobilenet_mini", "convnext_atto", "vit_mini", "swin_mini", "mixer_small", "mlp",
              "resnet20_normfree")  # fmt: skip
TORCHVISION = ("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1",
               "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "shufflenet_v2_x1_0", "resnet18")  # fmt: skip
TIMM: Mapping[str, Mapping[str, Any]] = {
    "test_resnet": {}, "test_vit": {"img_size": SIZE}, "test_byobnet": {}, "test_convnext": {},
    "test_efficientnet": {}, "test_mambaout": {}, "test_nfnet": {}, "test_convnext2": {},
    "test_vit2": {"img_size": SIZE}, "test_efficientnet_gn": {}, "test_efficientnet_ln": {}, "resnet10t": {},
    "mobilenetv3_small_050": {}, "lcnet_050": {}, "tinynet_e": {}, "mobilenetv4_conv_small": {},
    "vit_tiny_patch16_224": {"img_size": SIZE}, "edgenext_xx_small": {}, "efficientvit_b0": {},
    "mobilevit_xxs": {}, "pvt_v2_b0": {}, "ghostnet_050": {}, "convnextv2_atto": {},
    "gmlp_ti16_224": {"img_size": SIZE},
}  # fmt: skip


class _Rows(nn.Module):
    """A recurrent classifier that reads an image row by row."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], layers: int) -> None:
        super().__init__()
        self.recurrent = kind(3 * SIZE, 128, layers, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        states, _ = self.recurrent(images.permute(0, 2, 1, 3).flatten(2))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


def _perceptron(*widths: int) -> nn.Module:
    sizes = (3 * SIZE * SIZE, *widths)
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *itertools.chain(*layers), nn.Linear(widths[-1], 10))


OWN: Mapping[str, Callable[[], nn.Module]] = {
    "lstm": functools.partial(_Rows, nn.LSTM, 1),
    "tanh_perceptron": functools.partial(_perceptron, 256, 256),
    "gru_2": functools.partial(_Rows, nn.GRU, 2),
    "deep_perceptron": functools.partial(_perceptron, *(128,) * 8),
    "lstm_2": functools.partial(_Rows, nn.LSTM, 2),
}


def network_names() -> list[str]:
    """``SOURCE/NAME`` of every network, the sources in turn, so that a part of the list has some of each."""
    sources: list[Iterable[str]] = [[f"{split}/{number}" for number in numbers] for split, numbers in RANDOM.items()]
    sources += [(f"reference/{name}" for name in REFERENCES), (f"torchvision/{name}" for name in TORCHVISION)]
    sources += [(f"timm/{name}" for name in TIMM), (f"own/{name}" for name in OWN)]
    return [name for turn in itertools.zip_longest(*sources) for name in turn if name is not None]


def build(name: str, num_classes: int = 10) -> nn.Module:
    """The network ``SOURCE/NAME``, with its own seeded initial values."""
    source, _, which = name.partition("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if source == "own":
            return OWN[which]()
        if source == "reference":
            return build_network(which, num_classes=num_classes)
        if source in ("torchvision", "timm"):
            zoo: Any = importlib.import_module("tests.zoo_support")
            if source == "timm":
                return zoo.import_timm().create_model(which, num_classes=num_classes, **TIMM[which])  # type: ignore[no-any-return]
            return zoo.import_torchvision().models.get_model(which, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]
        return find_network(source, which, Interface(num_classes)).build()


@functools.cache
def images_of(folder: Path, cache: Path, *, labels: int = 10, beside: Path | None = None) -> FineTuneData:
    """The test images of a folder in three parts: to train on, to choose rates on, and to score (1,000 each).

    Args:
        folder: The images.
        cache: Where decoded images are kept.
        labels: Only images of so many first classes.
        beside: Another folder, whose classes follow those of the first.
    """
    sets = [require_split(each, "test", image_size=SIZE, channels=3, cache=cache) for each in (folder, beside) if each]
    images = sets[0].subset((sets[0].labels < labels).nonzero().flatten())
    images = ImageSet(images.images, images.labels, images.class_names[:labels])
    for other in sets[1:]:
        pixels, marks = torch.cat((images.images, other.images)), torch.cat((images.labels, other.labels + labels))
        images = ImageSet(pixels, marks, images.class_names + other.class_names)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, validation, test = (images.subset(part) for part in (order[2000:], order[:1000], order[1000:2000]))
    return FineTuneData(training, validation, test, measure_normalization(training))


@torch.no_grad()
def change_head(module: nn.Module, head: str) -> None:
    """Leaves the predicted classifier as it is, draws it anew, or adds noise of half its size to its rows."""
    layer = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    if head == "reset":
        layer.weight.copy_(noise / layer.in_features**0.5)
        layer.bias.zero_()
    elif head == "noise":
        layer.weight.add_(noise * 0.5 * layer.weight.square().mean().sqrt())


def measure(cell: Cell, arguments: argparse.Namespace, client: GHNClient) -> Cell:
    """Accuracy of a start before fine-tuning and after 100 and 500 steps, at its best rate."""
    classes = cell.get("classes", 10)
    if classes > 10:
        data = images_of(arguments.data, arguments.cache, beside=arguments.fashion)
    else:
        folder = arguments.fashion if "classes" in cell else arguments.data
        data = images_of(folder, arguments.cache, labels=classes)
    module = build(cell["network"], classes)
    if cell["start"] == HE:
        he_initialize(module, seed=0)
    else:
        client.predict(module, torch.zeros(2, 3, SIZE, SIZE), head="predicted").load_into(module)
        if "head" in cell:
            change_head(module, cell["head"])
    precision = choose_precision("auto", torch.device("cpu"))
    try:
        curve = fine_tune(module, data, SETTINGS, steps=max(STEPS), seed=0, precision=precision)
    except RuntimeError as error:
        return {"error": str(error)[:200]}
    return {"rate": curve.learning_rate, **{str(step): curve.at(step) for step in (0, *STEPS)}}


def main() -> None:
    """Runs what is missing and fills the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoint", type=Path, default=Path("ghn_service/checkpoints/ghn-cifar10.safetensors"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--cells", type=Path, default=Path("runs/calibrate_trust.jsonl"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--report", action="store_true", help="measure nothing more; fill the page with what there is")
    parser.add_argument("--heads", action="store_true", help="compare classifiers instead")
    parser.add_argument("--networks", type=int, help="only the first so many")
    arguments = parser.parse_args()
    keep_freed_memory()
    digest = file_digest(arguments.checkpoint)
    predicted: Cell = {"start": PREDICTED, "checkpoint": digest}
    pairs = [
        {"network": name, "data": arguments.data.name, **start}
        for name in network_names()[: arguments.networks]
        for start in (predicted, {"start": HE})
    ]
    heads = [
        {"network": name, "classes": classes, "head": head, **predicted}
        for name in HEAD_NETWORKS
        for classes, ways in HEADS.items()
        for head in ways
    ]
    finished = [json.loads(line)["cell"] for line in read_lines(arguments.cells)] if arguments.report else []

    def known(cells: list[Cell]) -> list[Cell]:
        return [cell for cell in cells if cell in finished or not arguments.report]

    with GHNClient.embedded(arguments.checkpoint) as client:
        one = functools.partial(measure, arguments=arguments, client=client)
        if arguments.heads:
            measured = run_cells(arguments.cells, known(heads), one)
            fill_page(arguments.docs, {"trust: heads": head_table(measured)}, {})
        else:
            measured = run_cells(arguments.cells, known(pairs), one)
            table = [*gain_table(measured, client), "", edges(measured)]
            fill_page(arguments.docs, {"trust: gains": table}, {})


def gain_table(measured: list[Cell], client: GHNClient) -> list[str]:
    """Gain over He initialisation by verdict, in points; networks that thresholds were chosen on, and the others."""
    gains: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    for number, ((name,), cells) in enumerate(grouped(measured, "network").items()):
        sides = {cell["start"]: cell for cell in cells if "error" not in cell}
        if len(sides) == 2:
            verdict = client.analyze(build(name), torch.zeros(2, 3, SIZE, SIZE)).trust.verdict
            gain = tuple(100 * (sides[PREDICTED][str(step)] - sides[HE][str(step)]) for step in STEPS)
            gains.setdefault((number % 2, verdict), []).append(gain)
    rows = []
    for half, verdict in itertools.product((0, 1), VERDICTS):
        found = gains.get((half, verdict), [])
        columns = [[gain[index] for gain in found] for index in range(len(STEPS))]
        texts = [f"{median(column):+.1f} ({sum(value > 0 for value in column)})" for column in columns if column]
        rows.append([("thresholds", "others")[half], verdict, len(found), *(texts or ["-"] * len(STEPS))])
    return markdown_table(
        ["networks", "verdict", "number", *(f"median gain after {step} (ahead)" for step in STEPS)], rows
    )


def edges(measured: list[Cell]) -> str:
    """How often a side chose the lowest or highest rate: how often another grid might have served it better."""
    low, *_, high = SETTINGS.learning_rates
    counts = []
    for (start,), cells in grouped(measured, "start").items():
        rates = [cell["rate"] for cell in cells if "error" not in cell]
        counts.append(f"{start} {rates.count(low)} and {rates.count(high)} times of {len(rates)}")
    return f"The lowest and the highest rate were chosen: {', '.join(counts)}."


def head_table(measured: list[Cell]) -> list[str]:
    """Accuracy in percent after both budgets, by number of classes, network and classifier."""
    rows = []
    for (classes, network), cells in grouped(measured, "classes", "network").items():
        texts = {cell["head"]: " / ".join(f"{100 * cell[str(step)]:.1f}" for step in STEPS) for cell in cells}
        rows.append([classes, network, *(texts.get(head, "-") for head in HEADS[20])])
    return markdown_table(["classes", "network", *HEADS[20]], sorted(rows))


if __name__ == "__main__":
    main()
