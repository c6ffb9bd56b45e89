"""How different the rows of a weight are from each other: rank, copies, directions, and size against He.

A block of 64 channels that is repeated gives a 512-channel layer of rank 64, whose copies training keeps identical.
The report of a prediction (JSON, ``ghn-prediction-report/1``) holds these measures before and after post-processing.

Reference: the diagnostics of Knyazev 2022 (arXiv:2207.10049); He et al. 2015 (arXiv:1502.01852) for the scale; Roy and
Vetterli 2007 for the effective rank.

Shapes: matrices are (B, R, C) as in ``weighted_layers.py``; a depthwise weight counts as one matrix of filters.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.weighted_layers import (
    CHANGED,
    StepRecord,
    WeightedLayer,
    as_matrices,
    to_torch_layout,
    weighted_layers,
)

DUPLICATE_COSINE = 1.0 - 1e-7
NEAR_DUPLICATE_COSINE = 0.99
TILING_TOLERANCE = 1e-6
MAX_ROWS, CURVE_POINTS = 1024, 64

REPORT_FORMAT = "ghn-prediction-report/1"
TROUBLED = 0.1
LARGE_NORM, SMALL_NORM = 4.0, 0.25
# The report travels in one message of at most 4 MiB: curves get coarser with the layers, and only the worst are listed.
MAX_LAYERS, MAX_POINTS, TOTAL_POINTS = 1500, 48, 24_000
MAX_NODES = 4000


@dataclass(frozen=True, slots=True)
class TensorDiversity:
    """Measures of one weight.

    Attributes:
        rank: Numerical rank, summed over the matrices of the weight.
        full_rank: The rank that the shape allows.
        effective_rank: exp of the entropy of the squared singular values; copies with a little noise have a full
            numerical rank, but a low effective one.
        duplicate_rows: Share of rows that point exactly where an earlier row of their matrix points.
        near_duplicate_rows: Share of rows with an earlier row of |cosine| above 0.99.
        mean_abs_cosine: Mean absolute cosine between different rows.
        random_abs_cosine: What that is for independent Gaussian rows: sqrt(2 / (pi C)).
        spectral_norm: Largest singular value.
        spectral_norm_to_he: The same over its value for a He-normal weight of this shape.
        tiled_share: Share of values that repeat an earlier block exactly along the channel axes.
        rms: Root mean square of the values.
        singular_values: Descending, normalised by the largest, at most 64 points evenly spread; the root mean square
            over the matrices.
        rows_measured: Rows per matrix that were measured; fewer than the weight has if there are more than 1,024.
    """

    rank: int
    full_rank: int
    effective_rank: float
    duplicate_rows: float
    near_duplicate_rows: float
    mean_abs_cosine: float
    random_abs_cosine: float
    spectral_norm: float
    spectral_norm_to_he: float
    tiled_share: float
    rms: float
    singular_values: tuple[float, ...]
    rows_measured: int

    @property
    def copies(self) -> float:
        """Share of missing rank, repeated rows or tiled values, whichever is largest."""
        return max(1.0 - self.rank / max(self.full_rank, 1), self.near_duplicate_rows, self.tiled_share, 0.0)

    @property
    def trouble(self) -> float:
        """From 0 (as diverse as a random weight) to 1 (all copies): the worst of the measures."""
        excess = self.mean_abs_cosine - self.random_abs_cosine
        return min(max(self.copies, excess), 1.0)


def measure_diversity(tensor: torch.Tensor, layer: WeightedLayer) -> TensorDiversity:
    """Measures one weight, given in the file's layout."""
    matrices = as_matrices(tensor, layer, 1 if layer.is_depthwise else 0)
    if matrices.shape[1] > MAX_ROWS:
        chosen = torch.randperm(matrices.shape[1], generator=torch.Generator().manual_seed(0))[:MAX_ROWS].sort().values
        matrices = matrices[:, chosen.to(matrices.device)]
    matrices = matrices.double()
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mT
    # The square root of rounding in float64 (1e-8 of the largest) is far below the tolerance of the numerical rank.
    energies = torch.linalg.eigvalsh(gram if rows <= columns else matrices.mT @ matrices).flip(-1).clamp_min(0.0)
    values = energies.sqrt()  # singular values (B, min(R, C)), descending
    tolerance = max(rows, columns) * torch.finfo(torch.float32).eps * values[:, :1]
    shares = energies / energies.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    is_zero = lengths == 0
    inverse = torch.where(is_zero, 0.0, 1.0 / lengths.masked_fill(is_zero, 1.0))
    both_zero = is_zero.unsqueeze(-1) & is_zero.unsqueeze(-2)  # rows of zeros count as copies of each other
    cosines = torch.where(both_zero, 1.0, gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))  # (B, R, R)
    earlier = cosines.tril(-1)
    spectral_norm = float(values.max())
    mean = values.square().mean(dim=0).sqrt()
    points = torch.linspace(0, len(mean) - 1, min(CURVE_POINTS, len(mean))).round().long().to(mean.device)
    return TensorDiversity(
        rank=int((values > tolerance).sum()),
        full_rank=values.numel(),
        effective_rank=float(torch.where(energies.sum(dim=-1) > 0, entropy.exp(), 0.0).sum()),
        duplicate_rows=float((earlier > DUPLICATE_COSINE).any(dim=-1).double().mean()),
        near_duplicate_rows=float((earlier.abs() > NEAR_DUPLICATE_COSINE).any(dim=-1).double().mean()),
        mean_abs_cosine=float(earlier.abs().sum() / max(matrices.shape[0] * rows * (rows - 1) / 2, 1)),
        random_abs_cosine=math.sqrt(2 / (math.pi * columns)),
        spectral_norm=spectral_norm,
        # Of a He-normal (R, C), sqrt(2 / C) (sqrt R + sqrt C) is to be expected.
        spectral_norm_to_he=spectral_norm / (math.sqrt(2 / columns) * (math.sqrt(rows) + math.sqrt(columns))),
        tiled_share=tiled_share(to_torch_layout(tensor, layer.spec)),
        rms=float(tensor.double().square().mean().sqrt()),
        singular_values=tuple(round(value / (float(mean[0]) or 1.0), 6) for value in mean[points].tolist()),
        rows_measured=rows,
    )


def tiled_share(weight: torch.Tensor) -> float:
    """Share of the values of a weight (O, I, ...) that repeat an earlier block along the first two axes."""
    return 1.0 - _period(weight) * _period(weight.transpose(0, 1)) / (weight.shape[0] * weight.shape[1])


def _period(weight: torch.Tensor) -> int:
    """The smallest p < N with ``weight[i + p] == weight[i]`` for all i along the first axis (N, ...), else N."""
    size = weight.shape[0]
    tolerance = TILING_TOLERANCE * float(weight.abs().max())
    like_first = (weight - weight[:1]).abs().flatten(1).amax(dim=1) <= tolerance
    for period in torch.nonzero(like_first[1:]).flatten().tolist():
        shift = int(period) + 1
        if float((weight[shift:] - weight[:-shift]).abs().max()) <= tolerance:
            return shift
    return size


def measure_network(
    parameters: ParameterSet, graph: ArchitectureGraph, *, on_layer: Callable[[], None] = lambda: None
) -> dict[str, TensorDiversity]:
    """Measures every weighted layer of a network that is among the parameters.

    ``on_layer`` is called before each layer, and may raise.
    """
    measured = {}
    for layer in weighted_layers(graph):
        if layer.name in parameters:
            on_layer()
            measured[layer.name] = measure_diversity(parameters[layer.name], layer)
    return measured


def build_report(
    graph: ArchitectureGraph,
    before: Mapping[str, TensorDiversity],
    after: Mapping[str, TensorDiversity],
    *,
    origins: Mapping[str, str],
    records: Sequence[StepRecord],
) -> dict[str, Any]:
    """The report as values that ``json`` writes; ``before`` and ``after`` are measures by name of the weight."""
    listed = [layer for layer in weighted_layers(graph) if layer.name in before]
    actions: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record in records:
        for item in record.layers:
            actions[item.parameter].append({"step": record.name, "outcome": item.outcome, "reason": item.reason})
    points = max(min(MAX_POINTS, TOTAL_POINTS // max(len(listed), 1)), 8)
    layers: list[dict[str, Any]] = [
        {
            "parameter": layer.name,
            "number": layer.number,
            "shape": list(layer.spec.torch_shape),
            "num_values": layer.spec.num_elements,
            "groups": layer.attributes.groups,
            "packed": layer.attributes.packed,
            "activation": layer.attributes.activation,
            "normalized": layer.attributes.normalized,
            "is_head": layer.is_head,
            "origin": origins[layer.name],
            "notes": _layer_notes(after[layer.name]),
            "actions": actions[layer.name],
            "before": _encode_measures(before[layer.name], points),
            "after": _encode_measures(after[layer.name], points),
        }
        for layer in listed
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
        "summary": {"before": _summarize(before, layers), "after": _summarize(after, layers)},
        "findings": _findings(layers, records),
        "steps": [{"name": record.name, "options": dict(record.options)} for record in records],
        "layers": worst_first[:MAX_LAYERS],
        "layers_left_out": max(len(layers) - MAX_LAYERS, 0),
    }


def encode_picture(
    graph: ArchitectureGraph, origins: Mapping[str, str], copied: Mapping[str, int]
) -> dict[str, Any] | None:
    """The graph as values that ``json`` writes, for the report's picture; None where it would be too large.

    A node is its type, and for each of its tensors name, shape, origin, and the share of its values that are copies.
    """
    if graph.num_nodes > MAX_NODES:
        return None

    def encode_tensor(spec: ParameterSpec) -> list[Any]:
        share = copied.get(spec.name, 0) / spec.num_elements
        return [spec.name, list(spec.torch_shape), origins[spec.name], float(f"{share:.3g}")]

    return {
        "nodes": [[node.op_type, *map(encode_tensor, node.parameters)] for node in graph.nodes],
        "edges": [list(edge) for edge in graph.edges],
        "others": [encode_tensor(spec) for spec in graph.other_parameters[:MAX_NODES]],
    }


def _summarize(measures: Mapping[str, TensorDiversity], layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Measures of the whole network: sums over layers, and means weighted by the values of each."""
    sizes = {str(entry["parameter"]): int(entry["num_values"]) for entry in layers}
    total = sum(sizes.values()) or 1
    sums = ("rank", "full_rank", "effective_rank")
    means = ("duplicate_rows", "near_duplicate_rows", "mean_abs_cosine", "tiled_share", "trouble")
    return {
        **{name: sum(getattr(item, name) for item in measures.values()) for name in sums},
        **{name: sum(getattr(item, name) * sizes[key] for key, item in measures.items()) / total for name in means},
        "troubled_layers": sum(item.trouble > TROUBLED for item in measures.values()),
        "largest_spectral_norm_to_he": max((item.spectral_norm_to_he for item in measures.values()), default=0.0),
        "smallest_spectral_norm_to_he": min((item.spectral_norm_to_he for item in measures.values()), default=0.0),
    }


def _layer_notes(measured: TensorDiversity) -> list[str]:
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


def _encode_measures(measured: TensorDiversity, points: int) -> dict[str, Any]:
    """Values that ``json`` writes, floats with the seven digits that float32 holds, the curve at so many points."""
    values = {**dataclasses.asdict(measured), "trouble": measured.trouble}
    encoded = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in values.items()}
    curve = measured.singular_values
    if len(curve) > points:
        curve = tuple(curve[round(index * (len(curve) - 1) / (points - 1))] for index in range(points))
    return encoded | {"singular_values": [float(f"{value:.4g}") for value in curve]}
