"""How many labels a small network can change, and how many neurons that takes.

The orders of growth - linear for two layers, square root for three, whatever the number of samples - are those of Sohn,
Kwon, An and Lee, "Memorization Capacity for Additive Fine-Tuning with Small ReLU Networks" (UAI 2024,
arXiv:2408.00359). The constants 3 and 4 * sqrt(2) below are derived by us from the constructions in
``interpolants.py`` and checked numerically; they are not the paper's.

    N  samples whose label changes      K  all samples, changed and kept      m  hidden neurons
"""

from __future__ import annotations

import math

from ghn_client.errors import InvalidOptionError

#: Where capacities come from, for reports.
SOURCE = "order: arXiv:2408.00359; constants derived by us from the constructions used here"


def check_counts(changed: int, samples: int) -> None:
    """Raises ``InvalidOptionError`` unless ``0 <= changed <= samples`` and there is a sample."""
    if samples < 1 or not 0 <= changed <= samples:
        raise InvalidOptionError(f"expected 0 <= changed <= samples and samples >= 1, got {changed=} and {samples=}")


def two_layer_neurons(changed: int, samples: int) -> int:
    """Neurons that always suffice with one hidden layer: ``min(3 N, K - 1)`` (constant derived by us)."""
    check_counts(changed, samples)
    return min(3 * changed, samples - 1)


def two_layer_capacity(neurons: int, samples: int) -> int:
    """Labels that can surely be changed by one hidden layer: ``m // 3``, or all K once ``m >= K - 1``."""
    check_counts(0, samples)
    return samples if neurons >= samples - 1 else min(neurons // 3, samples)


def three_layer_layout(changed: int) -> tuple[int, int]:
    """Groups G and points per group J with ``G J >= N`` and the fewest neurons, ``2 (G - 1) + 1 + 4 J``."""
    if changed < 1:
        return 0, 0
    start = max(1, round(math.sqrt(2 * changed)))
    candidates = range(max(1, start // 2), 2 * start + 2)
    groups = min(candidates, key=lambda count: (2 * count + 4 * math.ceil(changed / count), count))
    return groups, math.ceil(changed / groups)


def three_layer_neurons(changed: int) -> int:
    """Neurons of both hidden layers together for one output, about ``4 sqrt(2 N)`` (constant derived by us)."""
    groups, points = three_layer_layout(changed)
    return 2 * (groups - 1) + 1 + 4 * points if changed else 0


def hidden_widths(depth: int, *, changed: int, samples: int, outputs: int) -> tuple[int, ...]:
    """Widths of the hidden layers of a side network of 2 or 3 layers that can surely change ``changed`` labels.

    Two-layer networks share their neurons between the ``outputs``, three-layer networks do not.

    Raises:
        InvalidOptionError: The depth or the counts are impossible.
    """
    check_counts(changed, samples)
    if depth == 2:
        return (max(1, two_layer_neurons(changed, samples)),)
    if depth == 3:
        groups, points = three_layer_layout(max(1, changed))
        return 2 * (groups - 1) + 1, 4 * points * outputs
    raise InvalidOptionError(f"depth must be 2 or 3, got {depth}")
