"""How far the outputs of two networks are apart, which is the certificate of a transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def largest_relative_difference(expected: Any, actual: Any) -> float:
    """Max |a - b| / rms(a) over two outputs, the largest of all tensors if there are several.

    Args:
        expected: Output of the source (a): a tensor, or tensors in lists, tuples and mappings.
        actual: Output of the target (b), of the same shapes.

    Returns:
        The difference, computed in float64; 0.0 for equal outputs, infinity where anything is not finite in one alone.
        Entries that are the same infinity, or NaN, in both are equal.

    Raises:
        ValueError: The outputs are of different kinds or shapes.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping) and set(expected) != set(actual):
        raise ValueError(f"the outputs have the keys {sorted(expected)} and {sorted(actual)}; expected equal ones")
    pairs = list(zip(_tensors(expected), _tensors(actual), strict=True))
    if not pairs:
        raise ValueError("expected outputs with at least one floating-point tensor, got none")
    largest = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"the outputs have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected equal ones")
        if torch.equal(a, b):
            continue
        a, b = a.detach().double(), b.detach().double().to(a.device)
        differing = (a - b)[(a != b) & ~(a.isnan() & b.isnan())]
        if differing.numel():
            rms, most = a[a.isfinite()].square().mean().sqrt().item(), differing.abs().amax().item()
            largest = max(largest, most / rms if rms > 0 and most == most else float("inf"))
    return largest


def _tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output, in order."""
    leaves = tree_leaves({key: output[key] for key in sorted(output)} if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
