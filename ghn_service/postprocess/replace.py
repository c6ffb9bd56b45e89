"""What every step does with a network: go over its weighted layers, change some, and record what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.layers import WeightedLayer, weighted_layers
from ghn_service.postprocess.records import CHANGED, LayerRecord, StepRecord

ChangeLayer = Callable[[torch.Tensor, WeightedLayer], tuple[torch.Tensor, LayerRecord]]


def change_layers(
    parameters: ParameterSet,
    graph: ArchitectureGraph,
    change: ChangeLayer,
    *,
    name: str,
    options: Mapping[str, Any],
) -> tuple[ParameterSet, StepRecord]:
    """Applies ``change`` to every weighted layer, in the order of the graph.

    Args:
        parameters: The weights.
        graph: Their architecture.
        change: Gives the new weight of a layer, in the file's layout, and what was done.
        name: Name of the step.
        options: Its options, for the record.
    """
    tensors = dict(parameters)
    records = []
    for layer in weighted_layers(graph):
        tensor, record = change(parameters[layer.name], layer)
        records.append(record)
        if record.outcome == CHANGED:
            tensors[layer.name] = tensor
    changed = ParameterSet(parameters.specs, tensors, parameters.origins, parameters.warnings)
    return changed, StepRecord(name, options, tuple(records))
