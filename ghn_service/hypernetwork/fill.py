"""From decoded blocks to the tensors of a prediction: predicted ones are tiled, the others drawn by their rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ghn_service.errors import PredictionError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.hypernetwork.decoders import drawn_generator
from ghn_service.hypernetwork.features import Target
from ghn_service.hypernetwork.tiling import write_tiled
from ghn_service.parameters import ParameterSet

MAX_ELEMENTS_HELD = 4 * 2**20
"""Values of decoded blocks that are in memory beside the tensors they fill, as far as single tensors allow."""

SMALL_STD = 0.02

FallbackRule = Callable[[Tensor, torch.Generator], object]


def _kaiming_normal(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 2 / fan-in) (arXiv:1502.01852); without a fan-in (fewer than two axes) ``truncated_normal``."""
    if out.dim() < 2:
        _truncated_normal(out, generator)
    else:
        out.normal_(0.0, math.sqrt(2.0 / math.prod(out.shape[1:])), generator=generator)


def _truncated_normal(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 0.02) within two standard deviations, as vision transformers initialise tokens."""
    torch.nn.init.trunc_normal_(out, std=SMALL_STD, a=-2 * SMALL_STD, b=2 * SMALL_STD, generator=generator)


def _classifier(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 1 / fan-in): as many classes as there are, no ReLU follows."""
    out.normal_(0.0, 1.0 / math.sqrt(math.prod(out.shape[1:])), generator=generator)


def _recurrent_uniform(out: Tensor, generator: torch.Generator) -> None:
    """Uniform within the inverse square root of the last axis, which is the hidden size for recurrent weights."""
    bound = 1.0 / math.sqrt(out.shape[-1]) if out.dim() else 1.0
    out.uniform_(-bound, bound, generator=generator)


# What initialises tensors that no hypernetwork predicts, by ``ParameterSpec.fallback``; their origin in a reply is
# ``fallback:<rule>``.
FALLBACKS: dict[str, FallbackRule] = {
    "zeros": lambda out, generator: out.zero_(),  # relative position tables, biases
    "ones": lambda out, generator: out.fill_(1.0),  # normalisations without a node type of their own
    "layer_scale": lambda out, generator: out.fill_(1e-6),  # ConvNeXt (arXiv:2201.03545)
    "prelu": lambda out, generator: out.fill_(0.25),  # first slope of a PReLU (arXiv:1502.01852)
    "kaiming_normal": _kaiming_normal,
    "truncated_normal": _truncated_normal,
    "embedding_normal": lambda out, generator: out.normal_(0.0, SMALL_STD, generator=generator),  # lookup tables
    "recurrent_uniform": _recurrent_uniform,
    "classifier": _classifier,  # weight of a classifier that is not to be predicted
    "classifier_bias": lambda out, generator: out.zero_(),
}


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
        if not blocks.sum(dtype=torch.float32).isfinite():  # one pass, without a copy
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
            FALLBACKS[spec.fallback](values, drawn_generator(seed, draw))
            parameters[spec.name].copy_(_to_file_layout(values, spec))


def _to_file_layout(tensor: Tensor, spec: ParameterSpec) -> Tensor:
    """From torch's axes to those of the file."""
    if not spec.permutation:
        return tensor
    return tensor.permute([spec.permutation.index(axis) for axis in range(tensor.dim())])
