"""Low-rank initialisation: exact layer errors, and accuracy of small networks trained in factored form.

``python -m benchmarks.reproduce_low_rank --data FOLDER`` (``make reproduce-low-rank``) prints two tables for docs.

1. Relative function error of He-normal layers (no data; the table of arXiv:2202.00834's setting as derived in
   ``docs/low_rank.md``).
2. Test accuracy of a convolutional network trained from factors on small CIFAR-10 images, with and without BatchNorm.
   Spectral and function factors of one seed come from the same dense weights and see the same batches, so their
   difference is paired. The learning rate is chosen per row and method from one grid on validation images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ghn_client.finetune.factored import frobenius_decay
from ghn_client.low_rank import FACTOR_IN, FACTOR_OUT, factorize_module
from ghn_service.postprocess.low_rank import factorize, relative_function_error
from ghn_service.training.augmentation import Augmentation, Batches
from ghn_service.training.data import ImageSet, Normalization, measure_normalization, require_images, split_validation
from ghn_service.training.data_layouts import ImageFormat

SHAPES = ((64, 64, 1), (64, 512, 4), (256, 256, 4), (256, 256, 32), (576, 256, 4), (576, 256, 32))
METHODS = ("spectral", "function")
WIDTHS = (32, 64, 128)
IMAGE_SIZE = 16


def layer_errors() -> Iterator[str]:
    """Rows of the first table, from three draws each."""
    yield "| inputs x width | rank | spectral | function | function, optimised |"
    yield "|---|---|---|---|---|"
    for inputs, width, rank in SHAPES:
        errors = dict.fromkeys((*METHODS, "function_optimized"), 0.0)
        for seed in range(3):
            weight = torch.randn(width, inputs, generator=torch.Generator().manual_seed(seed)) * math.sqrt(2 / inputs)
            for method in errors:
                u, v = factorize(weight, rank, method=method, activation="relu")
                errors[method] += relative_function_error(weight, u, v, activation="relu") / 3
        yield f"| {inputs} x {width} | {rank} | " + " | ".join(f"{error:.4f}" for error in errors.values()) + " |"


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


def factored_network(network: nn.Sequential, *, rank: int, fraction: float, method: str) -> nn.Module:
    """The network with factors of the given method in every layer that gets smaller by it, but the classifier."""
    state = {}
    *hidden, _ = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, module in hidden:
        weight = module.weight.detach()
        matrix = weight.flatten(1)
        chosen = min(rank, *matrix.shape) if rank else max(round(fraction * min(matrix.shape)), 1)
        if chosen * sum(matrix.shape) >= matrix.numel():
            continue
        u, v = factorize(matrix, chosen, method=method, activation="relu")
        state[f"{name}.weight{FACTOR_IN}"] = v.T.reshape(chosen, *weight.shape[1:])
        state[f"{name}.weight{FACTOR_OUT}"] = u.reshape(weight.shape[0], chosen, *(1,) * (weight.dim() - 2))
    return factorize_module(network, state)


def train(
    network: nn.Module, images: ImageSet, normalization: Normalization, *, steps: int, rate: float, seed: int
) -> None:
    """SGD with momentum, cosine to zero, and Frobenius decay of the factors."""
    batches = Batches(images, normalization, Augmentation(pad=2), 64)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        pixels, labels, _ = batches.draw(generator=generator)
        loss = functional.cross_entropy(network(pixels), labels) + 1e-4 * frobenius_decay(network)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet, normalization: Normalization) -> float:
    """Share of images classified right."""
    network.eval()
    right = 0
    for start in range(0, len(images), 500):
        pixels = normalization.apply(images.images[start : start + 500])
        right += int((network(pixels).argmax(1) == images.labels[start : start + 500]).sum())
    return right / len(images)


def compare(arguments: argparse.Namespace) -> Iterator[str]:
    """Rows of the second table."""
    image_format = ImageFormat(size=IMAGE_SIZE)
    everything = require_images(arguments.data, "train", image_format=image_format, cache=arguments.cache)
    rest, validation = split_validation(everything, 2000)
    images = rest.subset(torch.arange(min(arguments.images, len(rest))))
    test = require_images(arguments.data, "test", image_format=image_format, cache=arguments.cache)
    normalization = measure_normalization(images)
    yield "| BatchNorm | rank | spectral | function | difference, paired | learning rates |"
    yield "|---|---|---|---|---|---|"
    sizes = [(rank, 0.0) for rank in arguments.ranks] + [(0, fraction) for fraction in arguments.fractions]
    for normalize in (False, True):
        for rank, fraction in sizes:
            scores: dict[str, list[float]] = {}
            rates = {}
            for method in METHODS:

                def run(rate: float, seed: int, scored: ImageSet, method: str = method) -> float:
                    torch.manual_seed(seed)
                    dense = build_network(normalize=normalize)  # noqa: B023
                    network = factored_network(dense, rank=rank, fraction=fraction, method=method)  # noqa: B023
                    train(network, images, normalization, steps=arguments.steps, rate=rate, seed=seed)
                    return accuracy(network, scored, normalization)

                rates[method] = max(arguments.rates, key=lambda rate: run(rate, 1000, validation))
                scores[method] = [run(rates[method], seed, test) for seed in range(arguments.seeds)]
            yield _row("yes" if normalize else "no", f"{rank}" if rank else f"{fraction:g} of full", scores, rates)


def _row(norm: str, rank: str, scores: dict[str, list[float]], rates: dict[str, float]) -> str:
    differences = [b - a for a, b in zip(scores["spectral"], scores["function"], strict=True)]
    cells = [
        _mean_and_error(scores["spectral"]),
        _mean_and_error(scores["function"]),
        _mean_and_error(differences, "+"),
    ]
    return f"| {norm} | {rank} | {' | '.join(cells)} | {rates['spectral']:g}, {rates['function']:g} |"


def _mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error, in percent."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):{sign}.2f} ± {100 * error:.2f}"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it only the first table is made")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--steps", type=int, default=400, help="steps of 64 images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.125, 0.25])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    for line in layer_errors():
        print(line, flush=True)
    if arguments.data:
        print()
        for line in compare(arguments):
            print(line, flush=True)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
