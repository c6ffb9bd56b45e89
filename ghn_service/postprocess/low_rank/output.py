"""Replaces the dense weights of a network by factors, wherever factors are smaller, and says what became of each layer.

A linear weight W (m, d) becomes ``<name>.factor_in`` (r, d), applied first, and ``<name>.factor_out`` (m, r); a
convolution (m, c, k...) becomes a k x k convolution to r channels, (r, c, k...), and a 1 x 1 convolution, (m, r, 1...).
Both are in torch's layout, and ``factor_out.flatten(1) @ factor_in.flatten(1)`` stands in for the flattened weight.

Factors are fitted to the activation that follows the layer in the graph. Where none follows, spectral factors are
optimal; a normalisation in between cancels the length of rows, and with it all that other methods do.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.low_rank.factorize import (
    SCALED,
    SPECTRAL,
    Decomposition,
    decompose,
    factors_of,
    relative_function_error,
)
from ghn_service.postprocess.low_rank.kernels import activation_kernel, find_kernel
from ghn_service.postprocess.low_rank.ranks import (
    DENSE,
    PARAMETER_BUDGET,
    RANK,
    LowRank,
    RankErrors,
    RankOption,
    allocate_ranks,
    candidate_ranks,
    choose_rank,
)
from ghn_service.postprocess.weighted_layers import WeightedLayer, to_torch_layout, weighted_layers

CURVE_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)


@dataclass(frozen=True, slots=True)
class RankCost:
    """A layer at one rank: relative error of its function, values, and multiply-adds per example (0 if unknown)."""

    rank: int
    function_error: float
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, slots=True)
class FactorRecord:
    """What became of one weighted layer.

    Attributes:
        parameter: Name of the weight.
        number: Position of the layer in the network, from 1.
        method: How the factors were computed.
        activation: The activation that they were fitted to; "" for none.
        normalized: Whether a normalisation sits between the layer and the activation.
        note: What the user should know about this layer; a sentence or "".
        dense: The layer before.
        chosen: The layer after; its rank is 0 where it stays dense.
        shape: Shape of the weight in torch's layout.
        permutation: The axis of the file that each of torch's axes is; empty if the file has torch's layout.
        factors: Names of the two factors, the one that is applied first first; empty where dense.
        curve: The layer at other ranks, if that was asked for.
    """

    parameter: str
    number: int
    method: str
    activation: str
    normalized: bool
    note: str
    dense: RankCost
    chosen: RankCost
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    factors: tuple[str, ...]
    curve: tuple[RankCost, ...] = ()


@dataclass(frozen=True, slots=True)
class LowRankRecord:
    """What became of a network: one record for each weighted layer."""

    request: LowRank
    layers: tuple[FactorRecord, ...]


def encode_low_rank_record(record: LowRankRecord) -> dict[str, Any]:
    """The record as values that ``json`` writes: enough to use the factors without the request."""
    layers = [
        {
            "parameter": layer.parameter,
            "number": layer.number,
            "rank": layer.chosen.rank,
            "method": layer.method,
            "activation": layer.activation,
            "normalized": layer.normalized,
            "note": layer.note,
            "function_error": layer.chosen.function_error,
            "parameters": layer.dense.parameters,
            "factored_parameters": layer.chosen.parameters,
            "multiply_adds": layer.dense.multiply_adds,
            "factored_multiply_adds": layer.chosen.multiply_adds,
            "shape": list(layer.shape),
            "permutation": list(layer.permutation),
            "factors": list(layer.factors),
        }
        for layer in record.layers
    ]
    rule = {"kind": record.request.rule, "value": record.request.value}
    return {"method": record.request.method, "rule": rule, "layers": layers}


def apply_low_rank(
    parameters: ParameterSet, graph: ArchitectureGraph, request: LowRank, *, on_layer: Callable[[], None] = lambda: None
) -> tuple[ParameterSet, LowRankRecord]:
    """Factors every weighted layer that gets smaller by it; each weight is decomposed once.

    ``on_layer`` is called before each layer, and may raise.

    Raises:
        InvalidOptionError: The rank is above the full rank of every layer, or the budget cannot be met.
    """
    candidates = deque(_Candidate.of(layer, parameters[layer.name], request) for layer in weighted_layers(graph))
    full = max((candidate.full_rank for candidate in candidates if candidate.is_free), default=0)
    if request.rule == RANK and full and request.value > full:
        raise InvalidOptionError(
            f"expected a rank of at most {full}, the largest full rank in this network, got {request.value:g}",
            field=request.field,
        )
    budgeted = _share_out(candidates, parameters, request, on_layer) if request.is_budget else {}
    replaced: dict[str, dict[str, torch.Tensor]] = {}
    records = []
    while candidates:
        on_layer()
        candidate = candidates.popleft()  # and its decomposition goes with it
        rank = budgeted.get(candidate.layer.name, DENSE) if request.is_budget else candidate.choose(request)
        factors, record = candidate.factor(rank, with_curve=request.with_curves)
        records.append(record)
        if factors:
            replaced[candidate.layer.name] = factors
    return _with_factors(parameters, replaced), LowRankRecord(request, tuple(records))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A layer that may be factored: the method that makes sense for it, and why it is another one or none."""

    layer: WeightedLayer
    tensor: torch.Tensor
    method: str
    activation: str
    note: str = ""
    is_free: bool = True

    @classmethod
    def of(cls, layer: WeightedLayer, tensor: torch.Tensor, request: LowRank) -> _Candidate:
        attributes, method = layer.attributes, request.method
        if layer.is_head or attributes.groups > 1:
            what = "the classifier" if layer.is_head else "a grouped convolution"
            return cls(layer, tensor, SPECTRAL, "", f"{what} stays dense", is_free=False)
        name = attributes.activation
        known = name if find_kernel(name) else ""
        if method == SPECTRAL:
            return cls(layer, tensor, SPECTRAL, known)
        if attributes.normalized and not request.force and (known or method == SCALED):
            note = "a normalisation cancels the length of rows: the gain over spectral factors is nil"
            return cls(layer, tensor, SPECTRAL, known, note)
        if method == SCALED:
            return cls(layer, tensor, SCALED, known)
        if not name or attributes.packed > 1:
            return cls(layer, tensor, SPECTRAL, "", "no activation follows directly: spectral factors are optimal")
        if not known:
            return cls(layer, tensor, SPECTRAL, "", f"no kernel for activation {name!r}: spectral factors")
        return cls(layer, tensor, method, name)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the weight as a matrix."""
        rows = self.layer.spec.torch_shape[0]
        return rows, self.layer.spec.num_elements // rows

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @cached_property
    def decomposition(self) -> Decomposition:
        return decompose(to_torch_layout(self.tensor, self.layer.spec).flatten(1))

    def is_smaller(self, rank: int) -> bool:
        """Whether factors of this rank have fewer values than the weight."""
        return rank * sum(self.shape) < self.layer.spec.num_elements

    def errors(self) -> RankErrors:
        kernel, normalized = activation_kernel(self.activation), self.layer.attributes.normalized
        return RankErrors.of(self.decomposition, kernel, self.method, normalized=normalized)

    def cost(self, rank: int, error: float) -> RankCost:
        size = rank * sum(self.shape) if rank != DENSE else self.layer.spec.num_elements
        return RankCost(rank, error, size, size * self.layer.attributes.positions)

    def costs(self, ranks: Iterable[int]) -> list[RankCost]:
        """The layer at those of the ranks that make it smaller."""
        smaller = [rank for rank in ranks if self.is_smaller(rank)]
        errors = self.errors() if smaller else None
        return [self.cost(rank, errors.function_error(rank)) for rank in smaller] if errors else []

    def choose(self, request: LowRank) -> int:
        """The rank that a rule gives, or ``DENSE``; a weight that no rank could make smaller is not decomposed."""
        if not self.is_free or not self.is_smaller(1):
            return DENSE
        rank = choose_rank(self.full_rank, request, self.errors)
        return rank if self.is_smaller(rank) else DENSE

    def factor(self, rank: int, *, with_curve: bool) -> tuple[dict[str, torch.Tensor], FactorRecord]:
        """The factors by name, none for ``DENSE``, and what to tell about the layer."""
        layer, normalized = self.layer, self.layer.attributes.normalized
        error, factors, note = 0.0, {}, self.note
        if rank != DENSE:
            decomposition = self.decomposition
            u, v = factors_of(decomposition, rank, method=self.method, kernel=activation_kernel(self.activation))
            error = relative_function_error(
                decomposition.matrix, u, v, activation=self.activation, normalized=normalized
            )
            kernel_shape = layer.spec.torch_shape[1:]
            factor_in, factor_out = v.T.reshape(rank, *kernel_shape), u.reshape(-1, rank, *(1,) * len(kernel_shape[1:]))
            factors = {
                f"{layer.name}.factor_in": factor_in.to(self.tensor.dtype).contiguous(),
                f"{layer.name}.factor_out": factor_out.to(self.tensor.dtype),
            }
        elif self.is_free:
            note = "factors would not be smaller"
        curve: list[RankCost] = []
        if with_curve and self.is_free:
            curve = self.costs(sorted({max(round(share * self.full_rank), 1) for share in CURVE_FRACTIONS}))
        record = FactorRecord(
            parameter=layer.name,
            number=layer.number,
            method=self.method,
            activation=self.activation,
            normalized=normalized,
            note=note,
            dense=self.cost(DENSE, 0.0),
            chosen=self.cost(rank, error),
            shape=layer.spec.torch_shape,
            permutation=layer.spec.permutation,
            factors=tuple(factors),
            curve=tuple(curve),
        )
        return factors, record


def _share_out(
    candidates: Iterable[_Candidate], parameters: ParameterSet, request: LowRank, on_layer: Callable[[], None]
) -> dict[str, int]:
    """The rank of every layer that may be factored, by name of its weight, within the budget of the request."""
    is_parameters = request.rule == PARAMETER_BUDGET
    if not is_parameters and any(candidate.layer.attributes.positions < 1 for candidate in candidates):
        raise InvalidOptionError(
            "the number of positions of some layers is not known; use a parameter budget instead", field=request.field
        )
    price = operator.attrgetter("parameters" if is_parameters else "multiply_adds")
    free = [candidate for candidate in candidates if candidate.is_free]
    options = []
    for candidate in free:
        on_layer()
        costs = [*candidate.costs(candidate_ranks(candidate.full_rank)), candidate.cost(DENSE, 0.0)]
        options.append([RankOption(price(cost), cost.function_error, cost.rank) for cost in costs])
    if is_parameters:
        whole = sum(spec.num_elements for spec in parameters.specs.values())
    else:
        whole = sum(price(candidate.cost(DENSE, 0.0)) for candidate in candidates)
    fixed = whole - sum(layer[-1].cost for layer in options)
    ranks = allocate_ranks(options, int(request.value) - fixed, field=request.field)
    return {candidate.layer.name: rank for candidate, rank in zip(free, ranks, strict=True)}


def _with_factors(parameters: ParameterSet, replaced: Mapping[str, Mapping[str, torch.Tensor]]) -> ParameterSet:
    """The parameters with factors in the place of their weight."""
    specs: dict[str, ParameterSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    origins: dict[str, str] = {}
    for name, spec in parameters.specs.items():
        for new_name, tensor in replaced.get(name, {name: parameters[name]}).items():
            tensors[new_name], origins[new_name], specs[new_name] = tensor, parameters.origins[name], spec
            if name in replaced:
                torch_name = spec.torch_name + new_name.removeprefix(name) if spec.torch_name else ""
                specs[new_name] = dataclasses.replace(
                    spec, name=new_name, shape=tuple(tensor.shape), permutation=(), torch_name=torch_name
                )
    return ParameterSet(specs, tensors, origins, parameters.warnings)
