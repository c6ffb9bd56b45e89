"""Which channels of a trained network matter, from its weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Layer, Tensor


def rank_channels(
    layers: Iterable[Layer], tensors: Mapping[str, torch.Tensor], groups: set[Dim]
) -> dict[Dim, torch.Tensor]:
    """How much each channel of some groups matters.

    A channel behind a norm with scale gamma, shift beta and ReLU has E relu(N(beta, gamma^2))^2 = (beta^2 + gamma^2)
    Phi(beta / gamma) + beta gamma phi(beta / gamma); without a norm, the squared norm of its producers' rows stands for
    it. That is summed over all producers, and its root multiplied by the norm of all consumers' columns.

    Returns:
        (M,) float64 for each group of M channels.
    """
    produced: dict[Dim, torch.Tensor] = {}
    normed: dict[Dim, torch.Tensor] = {}
    read: dict[Dim, torch.Tensor] = {}
    seen: set[int] = set()
    for layer in layers:
        for role, tensor in layer.tensors.items():
            if id(tensor) in seen or role in ("mean", "var"):
                continue
            seen.add(id(tensor))
            for axis, dim in enumerate(tensor.axes):
                energy = None if groups.isdisjoint(dim.leaves()) else _energy(tensor, tensors, layer, axis)
                found = read if axis in tensor.contracted else normed if layer.kind == "norm" else produced
                for leaf, values in _per_leaf(dim, energy) if energy is not None else ():
                    if leaf in groups:
                        found[leaf] = found[leaf] + values if leaf in found else values
    ones = torch.ones(1, dtype=torch.float64)
    return {
        leaf: (normed.get(leaf, produced.get(leaf, ones)).sqrt() * read.get(leaf, ones).sqrt()).expand(leaf.size)
        for leaf in groups
    }


def _energy(tensor: Tensor, tensors: Mapping[str, torch.Tensor], layer: Layer, axis: int) -> torch.Tensor | None:
    """(N,): what each entry of an axis adds to the squared size of its channel."""
    if layer.kind == "norm":
        weight, bias = layer.tensors.get("weight"), layer.tensors.get("bias")
        if tensor is not weight or bias is None:
            return None
        gamma = tensors[weight.name].double().abs().clamp_min(1e-12)
        beta = tensors[bias.name].double()
        ratio = beta / gamma
        cdf = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
        pdf = torch.exp(-0.5 * ratio * ratio) / math.sqrt(2 * math.pi)
        return (beta * beta + gamma * gamma) * cdf + beta * gamma * pdf
    value = tensors[tensor.name]
    others = [i for i in range(value.ndim) if i != axis]
    norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float32) if others else value.float().abs()
    return norms.double().square()


def _per_leaf(dim: Dim, values: torch.Tensor) -> Iterator[tuple[Dim, torch.Tensor]]:
    """The sums of an axis's values over everything but one group, for each group of the axis."""
    factors = dim.factors()
    grid = values.reshape([factor.size for factor in factors] or [1])
    for position, factor in enumerate(factors):
        sums = grid.sum(dim=[i for i in range(grid.ndim) if i != position]) if grid.ndim > 1 else grid
        if factor.kind == "leaf":
            yield factor, sums
            continue
        start = 0
        for part in factor.parts:
            yield from _per_leaf(part, sums[start : start + part.size])
            start += part.size
