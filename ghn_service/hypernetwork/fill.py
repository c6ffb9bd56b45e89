"""From decoded blocks to the tensors of a prediction: predicted ones are tiled, the others drawn by their rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ghn_service.errors import PredictionError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.hypernetwork.decoders import drawn_generator
from ghn_service.hypernetwork.fallbacks import fallback_rule
from ghn_service.hypernetwork.features import Target
from ghn_service.hypernetwork.tiling import write_tiled
from ghn_service.parameters import ParameterSet

MAX_ELEMENTS_HELD = 4 * 2**20
"""Values of decoded blocks that are in memory beside the tensors they fill, as far as single tensors allow."""


def fill_parameters(
    parameters: ParameterSet,
    groups: Iterable[tuple[Sequence[Target], Tensor]],
    graph: ArchitectureGraph,
    *,
    seed: int,
    on_group: Callable[[], None],
) -> None:
    """Fills every tensor: by its decoded block, or by the fallback rule of what the hypernetwork does not predict.

    Args:
        parameters: The tensors to fill.
        groups: Targets of one shape and their blocks, (P, *block).
        graph: The architecture; its order gives each drawn tensor a generator that no other choice changes.
        seed: Seed of what is drawn.
        on_group: Called before each group is written; may raise.

    Raises:
        PredictionError: A predicted value is not finite.
    """
    filled: set[str] = set()
    for targets, blocks in groups:
        on_group()
        out = parameters[targets[0].name]
        blocks = blocks.to(device=out.device, dtype=out.dtype)
        if not torch.isfinite(blocks).all():
            raise PredictionError(
                f"the values predicted for {targets[0].name!r} are not all finite; the checkpoint is damaged, or this "
                "architecture is far from all it was trained on"
            )
        for target, block in zip(targets, blocks, strict=True):
            write_tiled(_to_file_layout(block, parameters.specs[target.name]), parameters[target.name])
            filled.add(target.name)
    for draw, spec in enumerate(graph.parameters()):
        if spec.name in parameters and spec.name not in filled:
            values = torch.empty(spec.torch_shape)
            fallback_rule(spec.fallback)(values, drawn_generator(seed, draw))
            parameters[spec.name].copy_(_to_file_layout(values, spec))


def _to_file_layout(tensor: Tensor, spec: ParameterSpec) -> Tensor:
    """From torch's axes to those of the file."""
    if not spec.permutation:
        return tensor
    return tensor.permute([spec.permutation.index(axis) for axis in range(tensor.dim())])
