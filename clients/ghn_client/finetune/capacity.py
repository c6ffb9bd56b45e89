"""How many labels a small network can change, and how many neurons that takes.

The orders of growth - linear for two layers, square root for three, whatever the number of samples - are those of Sohn,
Kwon, An and Lee, "Memorization Capacity for Additive Fine-Tuning with Small ReLU Networks" (UAI 2024,
arXiv:2408.00359). The constants 3 and 4 * sqrt(2) below are derived by us from the constructions in ``two_layer.py``
and ``three_layer.py`` and checked numerically; they are not the paper's.

    N  samples whose label changes      K  all samples, changed and kept      m  hidden neurons
"""

from __future__ import annotations

import math

from ghn_client.errors import InvalidOptionError

#: Where capacities come from, for reports.
SOURCE = "order: arXiv:2408.00359; constants derived by us from the constructions used here"


def check_counts(changed: int, samples: int) -> None:
    """Refuses impossible counts.

    Raises:
        InvalidOptionError: Not ``0 <= changed <= samples`` with at least one sample.
    """
    if samples < 1 or not 0 <= changed <= samples:
        raise InvalidOptionError(f"expected 0 <= changed <= samples and samples >= 1, got {changed=} and {samples=}")


def two_layer_neurons(changed: int, samples: int) -> int:
    """Neurons that always suffice with one hidden layer: ``min(3 N, K - 1)`` (constant derived by us)."""
    check_counts(changed, samples)
    return min(3 * changed, samples - 1)


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


def three_layer_bound(changed: int) -> float:
    """Upper bound on :func:`three_layer_neurons`: ``4 sqrt(2 N)`` plus what rounding G and J up can cost."""
    return 4.0 * math.sqrt(2.0 * changed) + 5.0


def two_layer_capacity(neurons: int, samples: int) -> int:
    """Labels that can surely be changed by one hidden layer: ``m // 3``, or all K once ``m >= K - 1``."""
    check_counts(0, samples)
    return samples if neurons >= samples - 1 else min(neurons // 3, samples)


def three_layer_capacity(neurons: int, samples: int) -> int:
    """Labels that can surely be changed by two hidden layers of ``neurons`` together, for one output."""
    check_counts(0, samples)
    low, high = 0, samples
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if three_layer_neurons(middle) <= neurons else (low, middle - 1)
    return low


def hidden_widths(depth: int, *, changed: int, samples: int, outputs: int) -> tuple[int, ...]:
    """Widths of the hidden layers of a side network that can surely change ``changed`` labels.

    Args:
        depth: 2 or 3 layers of weights.
        changed: Labels N to change.
        samples: Samples K in all.
        outputs: Outputs C; two-layer networks share their neurons between outputs, three-layer networks do not.

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


def express_width(fan_in: int, fan_out: int, *, slack: float = 1.25) -> int:
    """Frozen channels that express a dense layer exactly: ``slack * fan_in * fan_out``.

    One channel per weight is the theorem's width (arXiv:2302.07937); the slack of 1.25 keeps the system well
    conditioned and is measured by us.
    """
    return math.ceil(slack * fan_in * fan_out)
