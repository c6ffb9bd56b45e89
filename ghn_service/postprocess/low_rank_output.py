"""Replaces the dense weights of a network by factors, wherever factors are smaller.

A linear weight W (m, d) becomes ``<name>.factor_in`` (r, d), applied first, and ``<name>.factor_out`` (m, r); a
convolution (m, c, k...) becomes a k x k convolution to r channels, (r, c, k...), and a 1 x 1 convolution, (m, r, 1...).
Both are in torch's layout, and ``factor_out.flatten(1) @ factor_in.flatten(1)`` stands in for the flattened weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.kernels import activation_kernel
from ghn_service.postprocess.layers import WeightedLayer, to_torch_layout, weighted_layers
from ghn_service.postprocess.low_rank import factorize, relative_function_error
from ghn_service.postprocess.low_rank_plan import FactorRecord, LayerPlan, LowRank, LowRankRecord, plan_layer
from ghn_service.postprocess.rank_allocation import (
    DENSE,
    PARAMETER_BUDGET,
    RANK,
    RankChoice,
    RankRule,
    allocate_ranks,
    choose_rank,
)
from ghn_service.postprocess.spectrum import Spectrum, candidate_ranks, weight_spectrum


def apply_low_rank(
    parameters: ParameterSet, graph: ArchitectureGraph, request: LowRank
) -> tuple[ParameterSet, LowRankRecord]:
    """Factors every weighted layer that gets smaller by it.

    Raises:
        InvalidOptionError: The rank is above the full rank of every layer, or the budget cannot be met.
    """
    layers = list(weighted_layers(graph))
    plans = {layer.name: plan_layer(layer, request.method) for layer in layers}
    ranks = choose_ranks(parameters, graph, request)
    replaced: dict[str, dict[str, torch.Tensor]] = {}
    records = []
    for layer in layers:
        factors, record = _factor_layer(parameters[layer.name], layer, plans[layer.name], ranks[layer.name])
        records.append(record)
        if factors:
            replaced[layer.name] = factors
    return _with_factors(parameters, replaced), LowRankRecord(request.method, request.rule, tuple(records))


def choose_ranks(parameters: ParameterSet, graph: ArchitectureGraph, request: LowRank) -> dict[str, int]:
    """The rank of every weighted layer, by name of its weight; ``DENSE`` where it keeps the weight.

    Raises:
        InvalidOptionError: As ``apply_low_rank``.
    """
    rule = request.rule
    layers = list(weighted_layers(graph))
    plans = {layer.name: plan_layer(layer, request.method) for layer in layers}
    ranks = dict.fromkeys((layer.name for layer in layers), DENSE)
    free = [layer for layer in layers if not plans[layer.name].dense_reason]
    full = max((min(_matrix_shape(layer)) for layer in free), default=0)
    if rule.kind == RANK and free and rule.value > full:
        raise InvalidOptionError(
            f"expected a rank of at most {full}, the largest full rank in this network, got {rule.value:g}",
            field=f"low_rank.{RANK}",
        )
    if rule.is_budget:
        return ranks | _allocate(parameters, layers, free, plans, rule)
    for layer in free:
        plan = plans[layer.name]
        rows, columns = _matrix_shape(layer)

        def spectrum(layer: WeightedLayer = layer) -> Spectrum:
            return weight_spectrum(_matrix(parameters[layer.name], layer))

        rank = choose_rank(
            min(rows, columns),
            rule,
            spectrum,
            kernel=activation_kernel(plan.activation),
            method=plan.method,
            normalized=layer.attributes.normalized,
        )
        ranks[layer.name] = rank if rank * (rows + columns) < rows * columns else DENSE
    return ranks


def _allocate(
    parameters: ParameterSet,
    layers: list[WeightedLayer],
    free: list[WeightedLayer],
    plans: Mapping[str, LayerPlan],
    rule: RankRule,
) -> dict[str, int]:
    is_parameters = rule.kind == PARAMETER_BUDGET
    if not is_parameters and any(layer.attributes.positions < 1 for layer in layers):
        raise InvalidOptionError(
            "the number of positions of some layers is not known; use a parameter budget instead",
            field=f"low_rank.{rule.kind}",
        )
    unit = {layer.name: 1 if is_parameters else layer.attributes.positions for layer in layers}
    free_cost = sum(layer.spec.num_elements * unit[layer.name] for layer in free)
    if is_parameters:
        whole = sum(spec.num_elements for spec in parameters.specs.values())
    else:
        whole = sum(layer.spec.num_elements * unit[layer.name] for layer in layers)
    choices = [_choice(parameters[layer.name], layer, plans[layer.name], unit[layer.name]) for layer in free]
    ranks = allocate_ranks(choices, int(rule.value) - (whole - free_cost), field=f"low_rank.{rule.kind}")
    return {layer.name: rank for layer, rank in zip(free, ranks, strict=True)}


def _choice(tensor: torch.Tensor, layer: WeightedLayer, plan: LayerPlan, unit: int) -> RankChoice:
    rows, columns = _matrix_shape(layer)
    spectrum = weight_spectrum(_matrix(tensor, layer))
    kernel = activation_kernel(plan.activation)
    normalized = layer.attributes.normalized
    errors = {
        rank: spectrum.function_error(rank, kernel=kernel, method=plan.method, normalized=normalized)
        for rank in candidate_ranks(spectrum.full_rank)
        if rank * (rows + columns) < rows * columns
    }
    return RankChoice((rows + columns) * unit, rows * columns * unit, errors)


def _factor_layer(
    tensor: torch.Tensor, layer: WeightedLayer, plan: LayerPlan, rank: int
) -> tuple[dict[str, torch.Tensor], FactorRecord]:
    attributes = layer.attributes
    rows, columns = _matrix_shape(layer)
    before = layer.spec.num_elements
    after, error, factors = before, 0.0, {}
    note = plan.dense_reason or ("factors would not be smaller" if rank == DENSE else plan.note)
    if rank != DENSE:
        matrix = _matrix(tensor, layer)
        u, v = factorize(matrix, rank, method=plan.method, activation=plan.activation)
        error = relative_function_error(matrix, u, v, activation=plan.activation, normalized=attributes.normalized)
        after = rank * (rows + columns)
        kernel_shape = layer.spec.torch_shape[1:]
        factors = {
            f"{layer.name}.factor_in": v.T.reshape(rank, *kernel_shape).to(tensor.dtype).contiguous(),
            f"{layer.name}.factor_out": u.reshape(rows, rank, *(1,) * (len(kernel_shape) - 1)).to(tensor.dtype),
        }
    record = FactorRecord(
        parameter=layer.name,
        number=layer.number,
        rank=rank,
        method=plan.method,
        activation=plan.activation,
        normalized=attributes.normalized,
        note=note,
        function_error=error,
        parameters=before,
        factored_parameters=after,
        multiply_adds=before * attributes.positions,
        factored_multiply_adds=after * attributes.positions,
        shape=layer.spec.torch_shape,
        permutation=layer.spec.permutation,
        factors=tuple(factors),
    )
    return factors, record


def _with_factors(parameters: ParameterSet, replaced: Mapping[str, Mapping[str, torch.Tensor]]) -> ParameterSet:
    specs: dict[str, ParameterSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    origins: dict[str, str] = {}
    for name, spec, tensor in _entries(parameters, replaced):
        specs[spec.name], tensors[spec.name], origins[spec.name] = spec, tensor, parameters.origins[name]
    return ParameterSet(specs, tensors, origins, parameters.warnings)


def _entries(
    parameters: ParameterSet, replaced: Mapping[str, Mapping[str, torch.Tensor]]
) -> Iterator[tuple[str, ParameterSpec, torch.Tensor]]:
    """(name of the original tensor, spec, tensor) of everything in the reply, factors in the place of their weight."""
    for name, spec in parameters.specs.items():
        if name not in replaced:
            yield name, spec, parameters[name]
            continue
        for factor_name, factor in replaced[name].items():
            suffix = factor_name.removeprefix(name)
            factor_spec = dataclasses.replace(
                spec,
                name=factor_name,
                shape=tuple(factor.shape),
                permutation=(),
                torch_name=spec.torch_name + suffix if spec.torch_name else "",
            )
            yield name, factor_spec, factor


def _matrix(tensor: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
    """The weight as (m, d), in at least float32."""
    matrix = to_torch_layout(tensor, layer.spec).flatten(1)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _matrix_shape(layer: WeightedLayer) -> tuple[int, int]:
    rows = layer.spec.torch_shape[0]
    return rows, layer.spec.num_elements // rows
