"""Post-processing of predicted weights: what a step is, the table of steps, and how a list of them is applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.options import parse_options, unknown_name
from ghn_service.postprocess.remedies import Auto, DiversityNoise, Orthogonal
from ghn_service.postprocess.weighted_layers import (
    CHANGED,
    KEPT,
    LayerRecord,
    StepRecord,
    weighted_layers,
)

MAX_STEPS = 16


PostProcessor = DiversityNoise | Orthogonal | Auto
"""A step: a frozen dataclass of options with ``name``, ``layer`` (the first that it changes) and ``change``."""

POSTPROCESSORS: dict[str, type[PostProcessor]] = {kind.name: kind for kind in (DiversityNoise, Orthogonal, Auto)}


@dataclass(frozen=True, slots=True)
class Step:
    """A step as a request carries it: a name and options as text."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_steps(steps: Sequence[Step]) -> tuple[PostProcessor, ...]:
    """Looks up every step and validates its options.

    Raises:
        InvalidOptionError: There are too many steps, or one has an unknown name or a bad option; ``field`` says which,
            such as ``"steps[1].options.beta"``.
    """
    if len(steps) > MAX_STEPS:
        raise InvalidOptionError(f"expected at most {MAX_STEPS} steps, got {len(steps)}", field="steps")
    parsed = []
    for index, step in enumerate(steps):
        if step.name not in POSTPROCESSORS:
            raise unknown_name("step", step.name, POSTPROCESSORS, field=f"steps[{index}].name")
        parsed.append(parse_options(POSTPROCESSORS[step.name], step.options, field=f"steps[{index}].options"))
    return tuple(parsed)


def apply_steps(
    parameters: ParameterSet, graph: ArchitectureGraph, steps: Sequence[Step], *, seed: int
) -> tuple[ParameterSet, tuple[StepRecord, ...]]:
    """Applies steps in order, on the device of the parameters.

    Every step draws from a generator of its own, seeded with the request's seed and the step's place in the list.

    Raises:
        InvalidOptionError: As ``parse_steps``.
    """
    device = next((tensor.device for tensor in parameters.values()), torch.device("cpu"))
    records = []
    for index, step in enumerate(parse_steps(steps)):
        # A 63-bit seed: splitmix64 of the request's seed and the step's index.
        state = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        generator = torch.Generator(device).manual_seed((state ^ (state >> 31)) >> 1)
        parameters, record = apply_step(step, parameters, graph, generator=generator)
        records.append(record)
    return parameters, tuple(records)


def apply_step(
    step: PostProcessor, parameters: ParameterSet, graph: ArchitectureGraph, *, generator: torch.Generator
) -> tuple[ParameterSet, StepRecord]:
    """Applies a step to every weighted layer but the classifier, and records what became of each."""
    tensors = dict(parameters)
    records = []
    for layer in weighted_layers(graph):
        tensor: torch.Tensor | None = None
        values: Mapping[str, float] = {}
        if layer.is_head:
            reason = "the classifier is never changed"
        elif layer.number < step.layer:
            reason = f"before layer {step.layer}"
        else:
            tensor, reason, values = step.change(parameters[layer.name], layer, generator)
        records.append(LayerRecord(layer.name, layer.number, KEPT if tensor is None else CHANGED, reason, values))
        if tensor is not None:
            tensors[layer.name] = tensor
    changed = ParameterSet(parameters.specs, tensors, parameters.origins, parameters.warnings)
    return changed, StepRecord(step.name, dataclasses.asdict(step), tuple(records))
