"""Fewer channels than the source has: which of them stay, and what these do for those that go; from weights alone.

Behind a norm the channels of a convolution are about N(beta, gamma^2), and two of them are as correlated as their rows
of its weight are aligned, for white inputs; sums of layers add up, and a rectifier is applied through its Hermite
expansion. So the covariance C of what a layer reads is known, and with it the part of a channel d that is linear in the
kept ones K: C_KK^-1 C_Kd, which is added to their columns. Neuron merging (Kim et al. 2020, arXiv:2010.13160) does so
for pairs of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from ghn_service.postprocess.low_rank.kernels import gauss_hermite
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Layer, Network, Tensor

MAX_CHANNELS = 1024
_RECTIFIERS = frozenset({"Relu", "Clip"})
_PASSED = _RECTIFIERS | {"Add", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean",
                         "Flatten", "Reshape", "Squeeze"}  # fmt: skip
_MAX_VALUES, _MAX_NORMS = 512, 2
_NODES, _DEGREES = 32, 7
_RIDGE = 1e-3

Moments = tuple[torch.Tensor, torch.Tensor]
"""Means (M,) and covariance (M, M) of channels, float64."""


# ---- importance ----------------------------------------------------------------------------------------------------


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
    norms = torch.linalg.vector_norm(value.float(), dim=others) if others else value.float().abs()
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


# ---- compensation --------------------------------------------------------------------------------------------------


def compensate(
    network: Network, tensors: Mapping[str, torch.Tensor], reader: Layer, kept: torch.Tensor, size: int
) -> torch.Tensor | None:
    """(N, M), float64: in column d the weights with which each of N ``kept`` channels stands in for channel d of M.

    Args:
        network: The source.
        tensors: Its weights.
        reader: The layer that reads the channels.
        kept: (N,) their numbers.
        size: M.

    Returns:
        None where the weights do not tell how the channels go together.
    """
    moments = _moments(network, tensors, reader.node.inputs[0], size) if size <= MAX_CHANNELS else None
    if moments is None:
        return None
    covariance = moments[1]
    inner = covariance[kept][:, kept]
    inner.diagonal().add_(_RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
    result = torch.linalg.solve_ex(inner, covariance[kept]).result
    result[:, kept] = torch.eye(len(kept), dtype=result.dtype)
    return result if bool(torch.isfinite(result).all()) else None


def _moments(
    network: Network, tensors: Mapping[str, torch.Tensor], name: str, size: int, norms: int = 0
) -> Moments | None:
    """Moments of a value's channels, over all layers that are added up in it; inner rectifiers count as passed."""
    mean, covariance = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    is_rectified = is_sum = False
    waiting, seen = [name], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        layer, node = network.makers.get(name), network.file.producers.get(name)
        if layer is not None:
            found = _layer_moments(network, tensors, layer, size, norms)
            if found is None:
                return None
            mean += found[0]
            covariance += found[1]
        elif node is not None and node.op_type in _PASSED and len(seen) < _MAX_VALUES:
            is_sum |= node.op_type == "Add"
            is_rectified |= node.op_type in _RECTIFIERS and not is_sum
            waiting += network.data_inputs(node)
        else:
            return None
    return _rectified(mean, covariance) if is_rectified else (mean, covariance)


def _layer_moments(
    network: Network, tensors: Mapping[str, torch.Tensor], layer: Layer, size: int, norms: int
) -> Moments | None:
    """Moments of what one layer writes, for white inputs; of a norm, through what it normalises."""
    weight, bias = (
        tensors[layer.tensors[role].name].to("cpu", torch.float64) if role in layer.tensors else None
        for role in ("weight", "bias")
    )
    mean = torch.zeros(size, dtype=torch.float64) if bias is None else bias.flatten()
    if mean.shape != (size,) or layer.kind not in ("norm", "conv", "linear"):
        return None
    if layer.kind == "norm":
        read = _moments(network, tensors, layer.node.inputs[0], size, norms + 1) if norms < _MAX_NORMS else None
        correlation = torch.eye(size, dtype=torch.float64) if read is None else _correlation(read[1])[0]
        gamma = torch.ones(size, dtype=torch.float64) if weight is None else weight.flatten()
        return mean, correlation * gamma[:, None] * gamma[None, :]
    if weight is None or weight.ndim < 2:
        return None
    rows = weight.movedim(0 if layer.kind == "conv" else layer.columns_and_rows[1], 0).flatten(1)
    if len(rows) != size:
        return None
    return mean, rows @ rows.T if layer.groups == 1 else torch.diag(rows.square().sum(1))


def _correlation(covariance: torch.Tensor) -> Moments:
    """Correlations (M, M) and standard deviations (M,)."""
    deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
    return (covariance / deviation[:, None] / deviation[None, :]).clamp(-1.0, 1.0), deviation


def _rectified(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """Moments behind a ReLU of what is normally distributed in front of it."""
    correlation, deviation = _correlation(covariance)
    points, transform = gauss_hermite(_NODES)
    coefficients = (mean[:, None] + deviation[:, None] * points).relu() @ transform
    behind = torch.zeros_like(covariance)
    for degree in range(1, _DEGREES):
        behind += coefficients[:, degree, None] * coefficients[None, :, degree] * correlation**degree
    return coefficients[:, 0], behind
