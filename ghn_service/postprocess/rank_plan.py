"""What low rank would cost and save in each layer of a network, before anything is factored.

Works on predicted weights, and on He-normal ones, whose error curves depend on shapes alone and tell the plan of a
network that is to be trained from scratch (the setting of arXiv:2202.00834).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet, fallback_origin
from ghn_service.postprocess.kernels import activation_kernel
from ghn_service.postprocess.layers import WeightedLayer, to_file_layout, to_torch_layout, weighted_layers
from ghn_service.postprocess.low_rank import FUNCTION, SPECTRAL
from ghn_service.postprocess.low_rank_output import choose_ranks
from ghn_service.postprocess.low_rank_plan import LowRank, plan_layer
from ghn_service.postprocess.spectrum import weight_spectrum

PLAN_FORMAT = "ghn-rank-plan/1"
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)


def he_normal_parameters(graph: ArchitectureGraph, *, generator: torch.Generator) -> ParameterSet:
    """He-normal values for every weight of at least two axes (fan-in), zeros for the rest."""
    tensors, specs = {}, {spec.name: spec for spec in graph.parameters()}
    for name, spec in specs.items():
        values = torch.zeros(spec.torch_shape)
        if values.dim() > 1:
            fan_in = math.prod(spec.torch_shape[1:])
            values = torch.randn(spec.torch_shape, generator=generator) * math.sqrt(2 / fan_in)
        tensors[name] = to_file_layout(values, spec)
    return ParameterSet(specs, tensors, dict.fromkeys(specs, fallback_origin("kaiming_normal")))


def plan_ranks(
    parameters: ParameterSet,
    graph: ArchitectureGraph,
    *,
    method: str = FUNCTION,
    fractions: Sequence[float] = FRACTIONS,
    request: LowRank | None = None,
) -> dict[str, Any]:
    """Error, parameters and multiply-adds of every layer at several ranks, as values that ``json`` writes.

    Args:
        parameters: The weights.
        graph: Their architecture.
        method: How factors would be computed.
        fractions: Ranks to look at, as shares of each layer's full rank.
        request: A rule whose choice of ranks is to be shown as well; None for none.

    Raises:
        InvalidOptionError: The rule cannot be met.
    """
    chosen = choose_ranks(parameters, graph, request) if request else {}
    layers = [
        _plan_entry(parameters[layer.name], layer, method, fractions, chosen.get(layer.name))
        for layer in weighted_layers(graph)
    ]
    return {
        "format": PLAN_FORMAT,
        "method": method,
        "fractions": list(fractions),
        "network": {
            "parameters": graph.num_parameters,
            "weighted_parameters": sum(entry["parameters"] for entry in layers),
            "multiply_adds": sum(entry["multiply_adds"] for entry in layers),
            "positions_known": all(entry["positions"] > 0 for entry in layers),
        },
        "chosen": _totals(graph, layers) if request else None,
        "layers": layers,
    }


def _plan_entry(
    tensor: torch.Tensor, layer: WeightedLayer, method: str, fractions: Sequence[float], chosen: int | None
) -> dict[str, Any]:
    plan, attributes = plan_layer(layer, method), layer.attributes
    rows = layer.spec.torch_shape[0]
    columns = layer.spec.num_elements // rows
    ranks = [] if plan.dense_reason else sorted({max(round(share * min(rows, columns)), 1) for share in fractions})
    points: list[dict[str, Any]] = []
    if ranks:
        spectrum = weight_spectrum(to_torch_layout(tensor, layer.spec).flatten(1).float())
        kernel, wanted = activation_kernel(plan.activation), {*ranks, *([chosen] if chosen else [])}
        for rank in sorted(wanted):
            errors = [
                spectrum.function_error(rank, kernel=kernel, method=name, normalized=attributes.normalized)
                for name in (plan.method, SPECTRAL)
            ]
            size = rank * (rows + columns)
            points.append(
                {
                    "rank": rank,
                    "function_error": errors[0],
                    "spectral_error": errors[1],
                    "parameters": size,
                    "multiply_adds": size * attributes.positions,
                    "is_smaller": size < rows * columns,
                }
            )
    return {
        "parameter": layer.name,
        "number": layer.number,
        "shape": list(layer.spec.torch_shape),
        "full_rank": min(rows, columns),
        "break_even_rank": (rows * columns - 1) // (rows + columns),
        "activation": attributes.activation,
        "normalized": attributes.normalized,
        "method": plan.method,
        "note": plan.dense_reason or plan.note,
        "stays_dense": bool(plan.dense_reason),
        "positions": attributes.positions,
        "parameters": layer.spec.num_elements,
        "multiply_adds": layer.spec.num_elements * attributes.positions,
        "chosen_rank": chosen,
        "points": points,
    }


def _totals(graph: ArchitectureGraph, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters and multiply-adds of the whole network with the chosen ranks."""
    after = {"parameters": 0, "multiply_adds": 0}
    for entry in layers:
        point = next((item for item in entry["points"] if item["rank"] == entry["chosen_rank"]), entry)
        for key in after:
            after[key] += point[key]
    rest = graph.num_parameters - sum(entry["parameters"] for entry in layers)
    factored = sum(bool(entry["chosen_rank"]) for entry in layers)
    return {"parameters": after["parameters"] + rest, "multiply_adds": after["multiply_adds"], "factored": factored}
