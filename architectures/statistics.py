"""How large and how costly the networks of a split are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from architectures.architecture import Architecture

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """Quantiles of one quantity over several networks, at ``QUANTILES``.

    Attributes:
        name: The quantity and its unit.
        mean: Mean.
        values: Quantiles.
    """

    name: str
    mean: float
    values: tuple[float, ...]


def summarise(name: str, values: Iterable[float]) -> Summary:
    """Mean and quantiles of ``values``."""
    ordered = sorted(values)
    picked = tuple(ordered[round(share * (len(ordered) - 1))] for share in QUANTILES)
    return Summary(name, sum(ordered) / len(ordered), picked)


def summarise_sizes(architectures: Sequence[Architecture]) -> list[Summary]:
    """Multiply-adds, parameters and nodes."""
    return [
        summarise("million multiply-adds", (item.multiply_adds / 1e6 for item in architectures)),
        summarise("thousand parameters", (item.num_parameters / 1e3 for item in architectures)),
        summarise("nodes", (float(item.num_nodes) for item in architectures)),
    ]


def measure_step_s(architecture: Architecture, *, batch_size: int, repetitions: int = 2) -> float:
    """CPU seconds of one forward and backward pass with channels_last images, the least of several.

    Args:
        architecture: The network.
        batch_size: Images B of the batch (B, C, H, W).
        repetitions: Passes measured, after one that is not.
    """
    module = architecture.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch_size, *architecture.interface.input_shape).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % architecture.interface.num_classes
    times = []
    for _ in range(repetitions + 1):
        start = time.process_time()
        torch.autograd.grad(F.cross_entropy(module(images), labels), list(module.parameters()))
        times.append(time.process_time() - start)
    return min(times[1:])
