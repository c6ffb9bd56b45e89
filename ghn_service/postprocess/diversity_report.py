"""The diversity report of a prediction: each weight measured before and after post-processing, and what it means.

The report is a JSON document (``ghn-diversity-report/1``); the client writes it as it is or as an HTML page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.distribution_shift import DistributionShift
from ghn_service.postprocess.diversity import TensorDiversity, measure_diversity
from ghn_service.postprocess.layers import WeightedLayer, weighted_layers
from ghn_service.postprocess.records import CHANGED, StepRecord

REPORT_FORMAT = "ghn-diversity-report/1"
TROUBLED = 0.1
LARGE_NORM, SMALL_NORM = 4.0, 0.25
# The report travels in one message of at most 4 MiB: curves get coarser with the layers, and only the worst are listed.
MAX_LAYERS, MAX_POINTS, TOTAL_POINTS = 1500, 48, 24_000

Measures = Mapping[str, TensorDiversity]


def measure_network(parameters: ParameterSet, graph: ArchitectureGraph) -> dict[str, TensorDiversity]:
    """Measures every weighted layer of a network that is among the parameters."""
    return {
        layer.name: measure_diversity(parameters[layer.name], layer)
        for layer in weighted_layers(graph)
        if layer.name in parameters
    }


def build_report(
    graph: ArchitectureGraph,
    before: Measures,
    after: Measures,
    *,
    origins: Mapping[str, str],
    records: Sequence[StepRecord],
    shift: DistributionShift,
) -> dict[str, Any]:
    """The report as values that ``json`` writes.

    Args:
        graph: The architecture.
        before: Measures of the prediction, by name of the weight.
        after: Measures after all steps; the same as ``before`` where there were none.
        origins: Origin of each tensor.
        records: What the steps did.
        shift: Distance of the architecture from those of training.
    """
    actions = _actions(records)
    layers = [
        _layer_entry(layer, before[layer.name], after[layer.name], origins[layer.name], actions.get(layer.name, []))
        for layer in weighted_layers(graph)
        if layer.name in before
    ]
    worst_first = sorted(layers, key=lambda entry: (-entry["after"]["trouble"], -entry["before"]["trouble"]))
    return {
        "format": REPORT_FORMAT,
        "network": {
            "num_nodes": graph.num_nodes,
            "num_parameters": graph.num_parameters,
            "num_layers": len(layers),
            "num_tensors": len(list(graph.parameters())),
        },
        "summary": {"before": summarize(before, layers), "after": summarize(after, layers)},
        "findings": _findings(layers, records),
        "distribution_shift": dataclasses.asdict(shift),
        "steps": [{"name": record.name, "options": dict(record.options)} for record in records],
        "layers": [_thinned(entry, len(layers)) for entry in worst_first[:MAX_LAYERS]],
        "layers_left_out": max(len(layers) - MAX_LAYERS, 0),
    }


def summarize(measures: Measures, layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Measures of the whole network: sums over layers, and means weighted by the values of each."""
    sizes = {str(entry["parameter"]): int(entry["num_values"]) for entry in layers}
    total = sum(sizes.values()) or 1

    def mean(measure: str) -> float:
        weighted = [float(getattr(item, measure)) * sizes[name] for name, item in measures.items()]
        return sum(weighted) / total

    return {
        "rank": sum(item.rank for item in measures.values()),
        "full_rank": sum(item.full_rank for item in measures.values()),
        "effective_rank": sum(item.effective_rank for item in measures.values()),
        "duplicate_rows": mean("duplicate_rows"),
        "near_duplicate_rows": mean("near_duplicate_rows"),
        "mean_abs_cosine": mean("mean_abs_cosine"),
        "tiled_share": mean("tiled_share"),
        "trouble": mean("trouble"),
        "troubled_layers": sum(item.trouble > TROUBLED for item in measures.values()),
        "largest_spectral_norm_to_he": max((item.spectral_norm_to_he for item in measures.values()), default=0.0),
        "smallest_spectral_norm_to_he": min((item.spectral_norm_to_he for item in measures.values()), default=0.0),
    }


def _layer_entry(
    layer: WeightedLayer,
    before: TensorDiversity,
    after: TensorDiversity,
    origin: str,
    actions: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    return {
        "parameter": layer.name,
        "number": layer.number,
        "shape": list(layer.spec.torch_shape),
        "num_values": layer.spec.num_elements,
        "groups": layer.attributes.groups,
        "packed": layer.attributes.packed,
        "activation": layer.attributes.activation,
        "normalized": layer.attributes.normalized,
        "is_head": layer.is_head,
        "origin": origin,
        "notes": layer_notes(after),
        "actions": list(actions),
        "before": _encode_measures(before),
        "after": _encode_measures(after),
    }


def _actions(records: Sequence[StepRecord]) -> dict[str, list[dict[str, str]]]:
    """What every step did, by name of the weight."""
    actions: dict[str, list[dict[str, str]]] = {}
    for record in records:
        for item in record.layers:
            entry = {"step": record.name, "outcome": item.outcome, "reason": item.reason}
            actions.setdefault(item.parameter, []).append(entry)
    return actions


def _thinned(entry: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The entry with curves of no more points than there is room for."""
    points = max(min(MAX_POINTS, TOTAL_POINTS // max(num_layers, 1)), 8)
    thinned = dict(entry)
    for when in ("before", "after"):
        curve = entry[when]["singular_values"]
        step = (len(curve) - 1) / max(points - 1, 1)
        kept = [curve[round(index * step)] for index in range(points)] if len(curve) > points else curve
        thinned[when] = {**entry[when], "singular_values": [float(f"{value:.4g}") for value in kept]}
    return thinned


def layer_notes(measured: TensorDiversity) -> list[str]:
    """What is wrong with a weight, in words; empty if nothing is."""
    notes = []
    if measured.rms == 0:
        return ["all values are zero"]
    if measured.tiled_share > 0:
        notes.append(f"tiled: {measured.tiled_share:.0%} of the values repeat a block")
    if measured.rank < measured.full_rank:
        notes.append(f"rank {measured.rank} of {measured.full_rank}")
    if measured.duplicate_rows > 0:
        notes.append(f"{measured.duplicate_rows:.0%} of the rows are exact copies in direction")
    elif measured.near_duplicate_rows > 0:
        notes.append(f"{measured.near_duplicate_rows:.0%} of the rows are nearly copies")
    if measured.mean_abs_cosine - measured.random_abs_cosine > TROUBLED:
        notes.append(f"rows are alike: mean |cos| {measured.mean_abs_cosine:.2f}")
    if not SMALL_NORM <= measured.spectral_norm_to_he <= LARGE_NORM:
        notes.append(f"spectral norm {measured.spectral_norm_to_he:.2g} times that of He initialisation")
    return notes


def _findings(layers: Sequence[Mapping[str, Any]], records: Sequence[StepRecord]) -> list[str]:
    """The report in a few sentences."""
    if not layers:
        return ["This network has no weighted layer."]
    troubled = {when: [e for e in layers if e[when]["trouble"] > TROUBLED] for when in ("before", "after")}
    findings = [f"{len(troubled['before'])} of {len(layers)} layers lack diversity as predicted."]
    tiled = [entry for entry in layers if entry["before"]["tiled_share"] > 0]
    if tiled:
        worst = min(tiled, key=lambda entry: entry["before"]["rank"] / max(entry["before"]["full_rank"], 1))
        rank, full = worst["before"]["rank"], worst["before"]["full_rank"]
        findings.append(f"{len(tiled)} layers are tiled; the worst, {worst['parameter']}, has rank {rank} of {full}.")
    if records:
        changed = {item.parameter for record in records for item in record.layers if item.outcome == CHANGED}
        findings.append(
            f"Post-processing changed {len(changed)} layers; {len(troubled['after'])} lack diversity afterwards."
        )
    elif troubled["before"]:
        findings.append("No post-processing was asked for; the step `auto` repairs what is found here.")
    return findings


def _encode_measures(measured: TensorDiversity) -> dict[str, Any]:
    values = {**dataclasses.asdict(measured), "trouble": measured.trouble}
    return {
        name: list(value) if isinstance(value, tuple) else _rounded(value) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _rounded(value: float) -> float:
    """Seven significant digits, which is all that float32 holds."""
    return float(f"{value:.7g}")
