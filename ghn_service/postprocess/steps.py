"""Post-processing of predicted weights: what a step is, the table of steps, and how a list of them is applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import TILED, ParameterSet
from ghn_service.postprocess.diversity import measure_diversity
from ghn_service.postprocess.mimetic import Mimetic
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
MAX_COPIES = 0.05


PostProcessor = DiversityNoise | Orthogonal | Auto | Mimetic
"""A step: a frozen dataclass of options with ``name``, ``layer`` (the first that it changes) and ``change``."""

_KINDS: tuple[type[PostProcessor], ...] = (DiversityNoise, Orthogonal, Auto, Mimetic)
POSTPROCESSORS = {kind.name: kind for kind in _KINDS}


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
    parameters: ParameterSet,
    graph: ArchitectureGraph,
    steps: Sequence[Step],
    *,
    seed: int,
    kept: Collection[str] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[ParameterSet, tuple[StepRecord, ...]]:
    """Applies steps in order, on the device of the parameters.

    Every step draws from a generator of its own, seeded with the request's seed and the step's place in the list.

    Args:
        parameters: The weights.
        graph: Their architecture.
        steps: What to apply.
        seed: The request's.
        kept: Names of weights that stay as they are: those that come from a trained network.
        on_layer: Called before each layer that is measured or changed; what it raises ends the work.

    Raises:
        InvalidOptionError: As ``parse_steps``.
    """
    device = next((tensor.device for tensor in parameters.values()), torch.device("cpu"))
    records = []
    parsed = parse_steps(steps)
    looks = any(step.layer == 0 for step in parsed)
    in_need = _layers_in_need(parameters, graph, on_layer) if looks else frozenset()
    for index, step in enumerate(parsed):
        # A 63-bit seed: splitmix64 of the request's seed and the step's index.
        state = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        generator = torch.Generator(device).manual_seed((state ^ (state >> 31)) >> 1)
        parameters, record = apply_step(
            step, parameters, graph, generator=generator, in_need=in_need, kept=kept, on_layer=on_layer
        )
        records.append(record)
    return parameters, tuple(records)


def _layers_in_need(parameters: ParameterSet, graph: ArchitectureGraph, on_layer: Callable[[], None]) -> frozenset[int]:
    """Numbers of the layers that steps change unless told otherwise: from the first tiled one on, and those of copies.

    What is diverse already loses by being bent. The published recipes begin at a late layer, too.
    """
    layers = [layer for layer in weighted_layers(graph) if not layer.is_head]
    first = next((layer.number for layer in layers if parameters.origins[layer.name] == TILED), len(layers) + 2)
    found = set()
    for layer in layers:
        on_layer()
        if layer.number >= first or measure_diversity(parameters[layer.name], layer).copies > MAX_COPIES:
            found.add(layer.number)
    return frozenset(found)


def apply_step(
    step: PostProcessor,
    parameters: ParameterSet,
    graph: ArchitectureGraph,
    *,
    generator: torch.Generator,
    in_need: frozenset[int] = frozenset(),
    kept: Collection[str] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[ParameterSet, StepRecord]:
    """Applies a step to its layers, or to those ``in_need`` where it names none, and records what became of each.

    The classifier and the weights ``kept`` stay as they are. ``on_layer`` is called before each layer, and may raise.
    """
    tensors = dict(parameters)
    records = []
    for layer in weighted_layers(graph):
        on_layer()
        tensor: torch.Tensor | None = None
        values: Mapping[str, float] = {}
        if layer.is_head:
            reason = "the classifier is never changed"
        elif layer.name in kept or (step.layer == 0 and layer.number not in in_need):
            is_kept = layer.name in kept
            reason = "from a trained network" if is_kept else "no copies, full rank, and behind no tiled layer"
            # drawn in any case, so that what one layer gets does not depend on what was found in another
            torch.randn(layer.spec.torch_shape, generator=generator, device=generator.device)
        elif layer.number < step.layer:
            reason = f"before layer {step.layer}"
        else:
            tensor, reason, values = step.change(parameters[layer.name], layer, generator)
        records.append(LayerRecord(layer.name, layer.number, KEPT if tensor is None else CHANGED, reason, values))
        if tensor is not None:
            tensors[layer.name] = tensor
    changed = ParameterSet(parameters.specs, tensors, parameters.origins, parameters.warnings)
    return changed, StepRecord(step.name, dataclasses.asdict(step), tuple(records))
