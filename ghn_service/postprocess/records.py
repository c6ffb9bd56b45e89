"""What a post-processing step did, layer by layer: plain values that go into the file's metadata and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHANGED = "changed"
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a step did to one layer.

    Attributes:
        parameter: Name of the weight.
        number: Position of the layer in the network, from 1.
        outcome: ``changed`` or ``kept``.
        reason: Why, in words.
        values: Numbers that belong to it, such as the standard deviation of the noise.
    """

    parameter: str
    number: int
    outcome: str
    reason: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did to a network.

    Attributes:
        name: Name of the step.
        options: Its options, those left at their default included.
        layers: One record for each weighted layer, in the order of the graph.
    """

    name: str
    options: Mapping[str, Any]
    layers: tuple[LayerRecord, ...]

    @property
    def num_changed(self) -> int:
        """How many layers the step changed."""
        return sum(layer.outcome == CHANGED for layer in self.layers)


def encode_record(record: StepRecord) -> dict[str, Any]:
    """The record as values that ``json`` writes."""
    return {
        "name": record.name,
        "options": dict(record.options),
        "layers": [{**dataclasses.asdict(layer), "values": dict(layer.values)} for layer in record.layers],
    }
