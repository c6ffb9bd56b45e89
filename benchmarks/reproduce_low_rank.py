"""Low-rank initialisation: exact layer errors, and accuracy of small networks trained in factored form.

``python -m benchmarks.reproduce_low_rank --data FOLDER`` (``make reproduce-low-rank``) fills its part of
``docs/results.md``.

1. Relative function error of He-normal layers (no data; the table of arXiv:2202.00834's setting as derived in
   ``docs/postprocessing.md``).
2. Test accuracy of a convolutional network trained from factors on small CIFAR-10 images, with and without BatchNorm.
   Factors of one seed come from the same dense weights and see the same batches, so differences are paired. The
   learning rate of every row and way is chosen on validation images by one rule (``experiment.run_seeds``), with seeds
   that are not among those reported. Besides the methods of the product there are two ways that tell which part of them
   helps: rows of the spectral product at the length of their row of W, and optimised factors times one number that
   keeps the norm of W. For ReLU behind Gaussian inputs, keeping the norm keeps the size of the signal.
3. With ``--other-data`` the same from predicted weights, on images that the hypernetwork has not seen.

A run can be stopped and goes on where it was: finished trainings are kept as lines of ``--cells``. ``--costs`` prints
what factoring costs instead: CPU seconds of one thread for He-normal weights of every layer that gets smaller by it,
each distinct shape measured once, beside spectral initialisation through ``torch.linalg.svd`` (arXiv:2202.00834 claims
that matching the function need not cost more) and a randomised SVD with the energy that it misses on such flat spectra.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.charts import bar_chart
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
from ghn_client import GHNClient
from ghn_client.factors import FACTOR_IN, FACTOR_OUT
from ghn_client.finetune import factorize_module
from ghn_client.finetune.factored import frobenius_decay
from ghn_client.finetune.images import ImageSet, Normalization
from ghn_service.postprocess.low_rank.factorize import factorize, relative_function_error
from ghn_service.published import BUNDLED_CHECKPOINTS
from ghn_service.training.evaluation.fine_tune import mean_and_error
from ghn_service.training.evaluation.report import markdown_table
from ghn_service.training.evaluation.zero_shot import accuracy
from ghn_service.training.images import Augmentation, Batches
from ghn_service.training.networks import to_channels_last
from ghn_service.training.precision import choose_precision, target_passes
from tests.zoo_support import build_torchvision

SHAPES = ((64, 64, 1), (64, 512, 4), (256, 256, 4), (256, 256, 32), (576, 256, 4), (576, 256, 32))
SPECTRAL, SCALED, ROWS, OPTIMIZED_SCALED = "spectral", "scaled", "spectral, rows kept", "function_optimized, norm kept"
WAYS = (SPECTRAL, SCALED, ROWS, "function", "function_optimized", OPTIMIZED_SCALED)
PRODUCT_WAYS = (SPECTRAL, SCALED, "function", "function_optimized")
DENSE = "dense"
HE, GHN = "He", "GHN"
PREDICTED_SIZES = (8.0, 0.25)
FEW = {"images": 1000, "steps": 200}
Shape = tuple[int, int]
WIDTHS = (32, 64, 128)
IMAGE_SIZE = 16
BATCH_SIZE = 64
AT_CHANCE = 0.12
NO_RANK = 0.0
DEPTHWISE = 49  # inputs of the depthwise convolutions of the networks here: kernels of 7 x 7


def layer_errors() -> list[str]:
    """The first table, from three draws of each shape."""
    rows = []
    for inputs, width, rank in SHAPES:
        errors = dict.fromkeys(WAYS, 0.0)
        for seed in range(3):
            weight = torch.randn(width, inputs, generator=torch.Generator().manual_seed(seed)) * math.sqrt(2 / inputs)
            for way in WAYS:
                u, v = factors(weight, rank, way)
                errors[way] += relative_function_error(weight, u, v, activation="relu") / 3
        rows.append([f"{inputs} x {width}", rank, *(f"{error:.4f}" for error in errors.values())])
    return markdown_table(["inputs x width", "rank", *WAYS], rows)


def factors(weight: torch.Tensor, rank: int, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors u (m, r) and v (d, r) of a weight (m, d), by a method of the product or one of the two other ways."""
    if way == ROWS:
        u, v = factorize(weight, rank, method=SPECTRAL, activation="relu")
        return u * (weight.norm(dim=1) / (u @ v.T).norm(dim=1))[:, None], v
    if way == OPTIMIZED_SCALED:
        u, v = factorize(weight, rank, method="function_optimized", activation="relu")
        root = (weight.norm() / (u @ v.T).norm()).sqrt()
        return u * root, v * root
    return factorize(weight, rank, method=way, activation="relu")


def build_network(*, normalize: bool) -> nn.Sequential:
    """Three 3 x 3 convolutions, two hidden linear layers and a classifier, He-normal."""
    layers: list[nn.Module] = []
    channels = 3
    for index, width in enumerate(WIDTHS):
        layers.append(nn.Conv2d(channels, width, 3, stride=1 if index == 0 else 2, padding=1, bias=not normalize))
        layers += [nn.BatchNorm2d(width)] if normalize else []
        layers.append(nn.ReLU())
        channels = width
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for inputs in (4 * channels, 256):
        layers.append(nn.Linear(inputs, 256, bias=not normalize))
        layers += [nn.BatchNorm1d(256)] if normalize else []
        layers.append(nn.ReLU())
    network = nn.Sequential(*layers, nn.Linear(256, 10))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def factored_network(network: nn.Sequential, *, size: float, way: str) -> nn.Module:
    """The network with factors of the given way in every layer that gets smaller by it, but the classifier.

    Args:
        network: The dense network.
        size: The rank of every layer where at least 1, else the share of each layer's full rank.
        way: How factors are computed, one of ``WAYS``.
    """
    state = {}
    *hidden, _ = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, module in hidden:
        weight = module.weight.detach()
        matrix = weight.flatten(1)
        full_rank = min(matrix.shape)
        rank = min(int(size), full_rank) if size >= 1 else max(round(size * full_rank), 1)
        if rank * sum(matrix.shape) >= matrix.numel():
            continue
        u, v = factors(matrix, rank, way)
        state[f"{name}.weight{FACTOR_IN}"] = v.T.reshape(rank, *weight.shape[1:])
        state[f"{name}.weight{FACTOR_OUT}"] = u.reshape(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    return factorize_module(network, state)


def train(
    network: nn.Module, images: ImageSet, normalization: Normalization, *, steps: int, rate: float, seed: int
) -> None:
    """SGD with momentum, cosine to zero, and Frobenius decay of the factors; bfloat16 where the processor has it."""
    batches = Batches(images, normalization, Augmentation(pad=2), BATCH_SIZE)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        pixels, labels = batches.draw(generator=generator)
        with target_passes(pixels.device, choose_precision("auto", pixels.device)):
            logits = network(pixels)
        loss = functional.cross_entropy(logits.float(), labels) + 1e-4 * frobenius_decay(network)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()


def measure(cell: Cell, *, arguments: argparse.Namespace) -> Cell:
    """Accuracy of the network of a cell before and after training, and its number of parameters."""
    folder = arguments.other_data if "start" in cell else arguments.data
    data = image_data(folder, arguments.cache, image_size=IMAGE_SIZE, held_out=2000)
    torch.manual_seed(cell["seed"])
    dense = build_network(normalize=cell["batchnorm"])
    if cell.get("start") == GHN:
        with GHNClient.embedded(arguments.checkpoint) as client:
            example = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
            client.predict(dense, example, seed=cell["seed"]).load_into(dense)
    is_dense = cell["way"] == DENSE
    network = dense if is_dense else factored_network(dense, size=cell["size"], way=cell["way"])
    network = to_channels_last(network)
    images = data.training.first(cell["images"])
    train(network, images, data.normalization, steps=cell["steps"], rate=cell["rate"], seed=cell["seed"])
    scored = data.validation if cell["seed"] in CHOOSING_SEEDS else data.test
    reached = accuracy(network.eval(), scored, data.normalization, batch_size=500)
    return {"accuracy": reached, "parameters": sum(parameter.numel() for parameter in network.parameters())}


def run_rows(arguments: argparse.Namespace, rows: Iterable[Cell]) -> list[Cell]:
    """Every training of some rows, with the chosen rates; one entry for each seed."""
    one = partial(measure, arguments=arguments)
    return [cell for row in rows for cell in run_seeds(arguments.cells, row, one, seeds=arguments.seeds)]


def he_rows(arguments: argparse.Namespace) -> Iterator[Cell]:
    """The rows of the second table."""
    sizes = [*map(float, arguments.ranks), *arguments.fractions]
    for batchnorm in (False, True):
        for size, way in [(NO_RANK, DENSE), *itertools.product(sizes, WAYS)]:
            row = {"batchnorm": batchnorm, "size": size, "way": way}
            yield {**row, "images": arguments.images, "steps": arguments.steps}


def predicted_rows(arguments: argparse.Namespace) -> Iterator[Cell]:
    """The rows of the third table: with BatchNorm, from He initialisation and from predicted weights."""
    starts = ({"start": HE}, {"start": GHN, "checkpoint": file_digest(arguments.checkpoint)})
    for size, way in [(NO_RANK, DENSE), *itertools.product(PREDICTED_SIZES, PRODUCT_WAYS)]:
        for start in starts:
            yield {"batchnorm": True, "size": size, "way": way, "data": arguments.other_data.name, **FEW, **start}


def predicted_table(results: Sequence[Cell], arguments: argparse.Namespace) -> list[str]:
    """The third table: mean and standard error in percent and learning rate, by size, start and way."""
    rows = []
    for (size, start), cells in grouped(results, "size", "start").items():
        found = {way: group for (way,), group in grouped(cells, "way").items()}
        texts = (f"{percent(_accuracies(found[way]))}, {found[way][0]['rate']:g}" for way in found)
        rows.append([_size_name(size), start, *texts, *["-"] * (len(PRODUCT_WAYS) - len(found))])
    few = f"{FEW['images']:,} images of {arguments.other_data.name} and {FEW['steps']} steps, otherwise as above"
    digest = f"hypernetwork: SHA-256 `{file_digest(arguments.checkpoint)}...`"
    header = f"{few}; {digest}. A dense network has one figure."
    return [header, "", *markdown_table(["rank", "start", *PRODUCT_WAYS], rows)]


def accuracy_table(results: Sequence[Cell]) -> list[str]:
    """The second table: mean and standard error in percent, learning rate, runs at chance; bold is the best."""
    rows = []
    for (batchnorm, size), ways in _rows(results).items():
        means = {way: mean_and_error(_accuracies(cells))[0] for way, cells in ways.items()}
        row = ["yes" if batchnorm else "no", _size_name(size), f"{next(iter(ways.values()))[0]['parameters']:,}"]
        for way in WAYS if DENSE not in ways else (DENSE,):
            accuracy = percent(_accuracies(ways[way]))
            accuracy = f"**{accuracy}**" if means[way] == max(means.values()) and DENSE not in ways else accuracy
            row.append(f"{accuracy}, {ways[way][0]['rate']:g}{_at_chance(ways[way])}")
        rows.append([*row, *["-"] * (len(WAYS) + 3 - len(row))])
    return markdown_table(["BatchNorm", "rank", "parameters", *WAYS], rows)


def verdicts(results: Sequence[Cell]) -> Iterator[str]:
    """Each way against the one that decides, with the same rule for every row."""
    for batchnorm, reference in itertools.product((False, True), (SPECTRAL, SCALED)):
        for way in WAYS:
            outcomes: dict[str, list[str]] = {HELPS: [], HURTS: [], NO_DIFFERENCE: []}
            for (norm, size), ways in _rows(results).items():
                if norm == batchnorm and DENSE not in ways and way not in (SPECTRAL, reference):
                    outcomes[verdict(_differences(ways, way, reference))].append(_size_name(size))
            if found := "; ".join(f"{outcome} at {', '.join(sizes)}" for outcome, sizes in outcomes.items() if sizes):
                yield f"- {'With' if batchnorm else 'Without'} BatchNorm, `{way}` against `{reference}`: {found}."


def _rows(results: Sequence[Cell]) -> dict[tuple[Any, ...], dict[str, list[Cell]]]:
    """Cells by way, for each BatchNorm and size."""
    rows = grouped(results, "batchnorm", "size")
    return {row: {name: group for (name,), group in grouped(cells, "way").items()} for row, cells in rows.items()}


def _size_name(size: float) -> str:
    return "dense" if size == NO_RANK else f"rank {size:g}" if size >= 1 else f"{size:g} of full"


def _at_chance(cells: Sequence[Cell]) -> str:
    count = sum(accuracy < AT_CHANCE for accuracy in _accuracies(cells))
    return f", {count} at chance" if count else ""


def _accuracies(cells: Sequence[Cell]) -> list[float]:
    return [cell["accuracy"] for cell in cells]


def _differences(ways: dict[str, list[Cell]], way: str, reference: str) -> list[float]:
    return [b - a for a, b in zip(_accuracies(ways[reference]), _accuracies(ways[way]), strict=True)]


def setting(arguments: argparse.Namespace) -> str:
    """How the networks of the second table were trained."""
    return (
        f"CIFAR-10 at {IMAGE_SIZE} x {IMAGE_SIZE}, {arguments.images:,} training images; three convolutions of "
        f"{', '.join(map(str, WIDTHS))} channels and two hidden linear layers of 256, ReLU, the classifier dense; "
        f"{arguments.steps} steps of {BATCH_SIZE} images, SGD with momentum 0.9, cosine to zero, Frobenius decay 1e-4; "
        f"rates chosen by the mean of {len(CHOOSING_SEEDS)} seeds on 2,000 validation images, {RATES}; "
        f"{arguments.seeds} further seeds. Test accuracy in percent, mean ± standard error, and the rate; at chance: "
        f"runs below {AT_CHANCE:.0%}, which did not learn."
    )


def chart(results: Sequence[Cell]) -> str:
    """Paired differences by rank, with and without BatchNorm."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for (batchnorm, size), methods in _rows(results).items():
        if DENSE in methods:
            continue
        mean, error = mean_and_error(_differences(methods, SCALED, SPECTRAL))
        name = "with BatchNorm" if batchnorm else "without BatchNorm"
        groups.setdefault(_size_name(size), {})[name] = (100 * mean, 100 * error)
    return bar_chart("scaled minus spectral, paired by seed", groups, y_label="test accuracy, percentage points")


def layer_shapes(network: str) -> Counter[Shape]:
    """Weights of a torchvision network as (outputs, inputs * kernel), but depthwise convolutions and the classifier."""
    module, _ = build_torchvision(network)
    *weights, _ = [weight.flatten(1).shape for weight in module.parameters() if weight.dim() in (2, 4)]
    return Counter((rows, columns) for rows, columns in weights if columns != DEPTHWISE)


def spectral_by_sketch(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors of a randomised SVD with four power iterations."""
    left, values, right = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape), niter=4)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, right[:, :rank] * roots


def cost_row(network: str, fraction: float) -> list[str]:
    """CPU seconds of each way over all layers that get smaller, the better of two calls, and the missing energy."""
    activation = "relu" if network == "resnet50" else "gelu"
    ways: dict[str, Callable[[torch.Tensor, int], Any]] = {
        "full SVD": lambda weight, _: torch.linalg.svd(weight, full_matrices=False),
        **{
            method: partial(factorize, method=method, activation=activation)
            for method in ("spectral", "function", "function_optimized")
        },
        "randomised SVD": spectral_by_sketch,
    }
    totals, missing, layers = dict.fromkeys(ways, 0.0), 0.0, 0
    for (rows, columns), count in layer_shapes(network).items():
        rank = max(round(fraction * min(rows, columns)), 1)
        if rank * (rows + columns) >= rows * columns:
            continue
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * math.sqrt(2 / columns)
        for name, way in ways.items():
            seconds = []
            for _ in range(2):
                start = time.process_time()
                way(weight, rank)
                seconds.append(time.process_time() - start)
            totals[name] += count * min(seconds)
        u, v = spectral_by_sketch(weight, rank)
        best = torch.linalg.svdvals(weight)[:rank].square().sum()
        missing, layers = max(missing, float(1 - (u @ v.T).square().sum() / best)), layers + count
    times = [f"{seconds:.2f}" for seconds in totals.values()]
    return [network, f"{fraction:g}", str(layers), activation, *times, f"{missing:.1%}"]


def print_costs() -> None:
    """Prints the table of costs."""
    ways = ["full SVD", "spectral", "function", "function_optimized", "randomised SVD", "energy it misses"]
    rows = [
        cost_row(network, size) for network in ("resnet50", "vit_b_16", "convnext_tiny") for size in (1 / 16, 1 / 4)
    ]
    print("\n".join(markdown_table(["network", "rank / full", "layers", "activation", *ways], rows)))


def main(words: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet, prints the page and writes it with its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it only the first table is made")
    parser.add_argument("--other-data", type=Path, help="images for the table from predicted weights; none by default")
    parser.add_argument("--checkpoint", type=Path, help="the hypernetwork of that table; the shipped one by default")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--cells", type=Path, default=Path(".cache/low_rank.jsonl"), help="finished trainings")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of results.md")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--steps", type=int, default=400, help=f"steps of {BATCH_SIZE} images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--costs", action="store_true", help="print what factoring costs, and nothing else")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    if arguments.costs:
        print_costs()
        return
    results = run_rows(arguments, he_rows(arguments)) if arguments.data else []
    blocks = {"low rank: layer errors": layer_errors()}
    if results:
        blocks |= {"low rank: protocol": [setting(arguments)], "low rank: accuracy": accuracy_table(results)}
        blocks["low rank: verdicts"] = list(verdicts(results))
    if arguments.other_data:
        arguments.checkpoint = arguments.checkpoint or min(BUNDLED_CHECKPOINTS.glob("*.safetensors"))
        predicted = run_rows(arguments, predicted_rows(arguments))
        blocks["low rank: predicted"] = predicted_table(predicted, arguments)
    fill_page(arguments.output, blocks, {"low_rank_results": chart(results)} if results else {})


if __name__ == "__main__":
    main()
