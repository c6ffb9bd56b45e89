"""What factoring the layers of a network costs: ``python -m benchmarks.low_rank_cost``.

The baseline is spectral initialisation through ``torch.linalg.svd``; the paper (arXiv:2202.00834) claims that matching
the function need not cost more. Times are CPU seconds of one thread for He-normal weights of every layer but the
classifier that gets smaller by it; each distinct shape is measured once and counted as often as it occurs. The
randomised SVD is listed with the energy that it misses, because on spectra as flat as these it is not accurate.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable

import torch

from ghn_service.postprocess.low_rank.factorize import factorize

Shape = tuple[int, int]


def resnet50() -> Counter[Shape]:
    """Weights of ResNet-50 as (outputs, inputs * kernel)."""
    shapes, channels = [(64, 147)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels), (width, width * 9), (4 * width, width)]
            shapes += [(4 * width, channels)] if block == 0 else []
            channels = 4 * width
    return Counter(shapes)


def vit_base() -> Counter[Shape]:
    """Weights of ViT-B/16: patches, packed projections, output projections, feed-forward layers."""
    return Counter({(768, 768): 13, (2304, 768): 12, (3072, 768): 12, (768, 3072): 12})


def convnext_tiny() -> Counter[Shape]:
    """Weights of ConvNeXt-T without its depthwise convolutions."""
    shapes: Counter[Shape] = Counter({(96, 48): 1})
    widths = (96, 192, 384, 768)
    for width, blocks in zip(widths, (3, 3, 9, 3), strict=True):
        shapes[(4 * width, width)] += blocks
        shapes[(width, 4 * width)] += blocks
    for narrow, wide in itertools.pairwise(widths):
        shapes[(wide, 4 * narrow)] += 1
    return shapes


NETWORKS = {"resnet50": (resnet50, "relu"), "vit_b_16": (vit_base, "gelu"), "convnext_tiny": (convnext_tiny, "gelu")}


def spectral_by_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline: a full SVD, truncated and balanced."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, right[:rank].T * roots


def spectral_by_sketch(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Randomised SVD with four power iterations."""
    left, values, right = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape), niter=4)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, right[:, :rank] * roots


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call, the better of two."""
    best = math.inf
    for _ in range(2):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def missing_energy(weight: torch.Tensor, rank: int) -> float:
    """Share of the energy of the best rank-r matrix that the randomised one lacks."""
    u, v = spectral_by_sketch(weight, rank)
    best = torch.linalg.svdvals(weight)[:rank].square().sum()
    return float(1 - (u @ v.T).square().sum() / best)


def measure(network: str, fraction: float) -> None:
    """Prints one row of the table."""
    shapes, activation = NETWORKS[network]
    totals, missing, layers = dict.fromkeys(("svd", "spectral", "function", "optimized", "sketch"), 0.0), 0.0, 0
    for (rows, columns), count in shapes().items():
        rank = max(round(fraction * min(rows, columns)), 1)
        if rank * (rows + columns) >= rows * columns:
            continue
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * math.sqrt(2 / columns)
        runs: dict[str, Callable[[], object]] = {
            "svd": lambda w=weight, r=rank: spectral_by_svd(w, r),  # type: ignore[misc]
            "spectral": lambda w=weight, r=rank: factorize(w, r, method="spectral"),  # type: ignore[misc]
            "function": lambda w=weight, r=rank: factorize(w, r, method="function", activation=activation),  # type: ignore[misc]
            "optimized": lambda w=weight, r=rank: factorize(  # type: ignore[misc]
                w, r, method="function_optimized", activation=activation
            ),
            "sketch": lambda w=weight, r=rank: spectral_by_sketch(w, r),  # type: ignore[misc]
        }
        for name, run in runs.items():
            totals[name] += count * cpu_seconds(run)
        missing, layers = max(missing, missing_energy(weight, rank)), layers + count
    times = " | ".join(f"{totals[name]:.2f}" for name in totals)
    print(f"| {network} | {fraction:g} | {layers} | {activation} | {times} | {missing:.1%} |", flush=True)


def main() -> None:
    """Prints the table for the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="default: all of them")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1 / 16, 1 / 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| network | rank / full | layers | activation | full SVD | spectral | function | function_optimized ", end=""
    )
    print("| randomised SVD | energy it misses |")
    print("|---" * 10 + "|")
    for network in arguments.networks:
        for fraction in arguments.fractions:
            measure(network, fraction)


if __name__ == "__main__":
    main()
