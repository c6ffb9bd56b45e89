"""Post-processing of predicted weights: what a step is, the table of steps, and how a list of them is applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.auto import Auto
from ghn_service.postprocess.noise import DiversityNoise
from ghn_service.postprocess.options import parse_options, unknown_name
from ghn_service.postprocess.orthogonal import Orthogonal
from ghn_service.postprocess.weighted_layers import StepRecord

MAX_STEPS = 16


class PostProcessor(Protocol):
    """A step: a frozen dataclass of options that maps parameters to parameters."""

    def apply(
        self, parameters: ParameterSet, graph: ArchitectureGraph, *, generator: torch.Generator
    ) -> tuple[ParameterSet, StepRecord]:
        """Returns new parameters, and what was done to each layer.

        Args:
            parameters: Predicted weights, in the file's layout.
            graph: The architecture that they belong to.
            generator: Source of everything that is drawn.
        """
        ...


POSTPROCESSORS: dict[str, type[PostProcessor]] = {
    "noise": DiversityNoise,
    "orthogonal": Orthogonal,
    "auto": Auto,
}


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
        generator = torch.Generator(device).manual_seed(_step_seed(seed, index))
        parameters, record = step.apply(parameters, graph, generator=generator)
        records.append(record)
    return parameters, tuple(records)


def _step_seed(seed: int, index: int) -> int:
    """A 63-bit seed: splitmix64 of the request's seed and the step's index."""
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return (state ^ (state >> 31)) >> 1


def encode_record(record: StepRecord) -> dict[str, Any]:
    """The record as values that ``json`` writes."""
    return {
        "name": record.name,
        "options": dict(record.options),
        "layers": [{**dataclasses.asdict(layer), "values": dict(layer.values)} for layer in record.layers],
    }
