"""Units of a decoder that have stopped: how many there are, and a start that brings them back.

A ReLU whose input is negative for every tensor of every network gives nothing and has no gradient. Where most units of
the tiled decoder are like that, layers that differ get the same weights. A run that begins from such a checkpoint can
draw these units' inputs anew; their outputs are set to zero, so that predictions stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ghn_service.hypernetwork.blocks import VECTOR_ROLES
from ghn_service.hypernetwork.features import GraphFeatures, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.hypernetwork.tiled_decoder import TiledDecoder

ACTIVE_SHARE = 0.005
"""Share of the tensors above which a unit counts as active at a position of the kernel."""


@torch.no_grad()
def matrix_embeddings(hypernetwork: GraphHyperNetwork, networks: Iterable[GraphFeatures]) -> Tensor:
    """Embeddings of all nodes that have matrices, (T, C).

    Args:
        hypernetwork: Whose encoder is asked.
        networks: Features of some networks.
    """
    rows = []
    for features in networks:
        batch = collate([features]).to(hypernetwork.device)
        nodes = sorted({target.node for target in features.targets if target.role not in VECTOR_ROLES})
        rows.append(hypernetwork.encode(batch)[nodes])
    return torch.cat(rows)


@torch.no_grad()
def active_shares(decoder: TiledDecoder, embeddings: Tensor) -> Tensor:
    """Share of tensors for which each unit of the second layer is positive, by kernel position, (Mh, Mw, 8C).

    Args:
        decoder: The decoder.
        embeddings: Of nodes that have matrices, (T, C).
    """
    return (_second_inputs(decoder, embeddings) > 0).float().mean(0)


def stopped_units(decoder: TiledDecoder, embeddings: Tensor) -> Tensor:
    """Which units of the second layer are active nowhere, (8C,).

    Args:
        decoder: The decoder.
        embeddings: Of nodes that have matrices, (T, C).
    """
    return (active_shares(decoder, embeddings) <= ACTIVE_SHARE).flatten(0, 1).all(0)


@torch.no_grad()
def revive(decoder: TiledDecoder, embeddings: Tensor, generator: torch.Generator) -> int:
    """Draws the inputs of stopped units of the second layer anew, and clears what they put out.

    New inputs have about unit variance over the given tensors.

    Args:
        decoder: Changed in place.
        embeddings: Of nodes that have matrices, (T, C).
        generator: Source of the new inputs.

    Returns:
        How many units were drawn anew.
    """
    stopped = stopped_units(decoder, embeddings)
    count = int(stopped.sum())
    if not count:
        return 0
    weight = torch.randn((count, decoder.hidden.in_features), generator=generator)
    first = _first_outputs(decoder, embeddings)
    weight /= first.square().sum(-1).mean().sqrt().clamp(min=1e-6).cpu()
    decoder.hidden.weight[stopped] = weight.to(decoder.hidden.weight)
    decoder.hidden.bias[stopped] = 0.0
    decoder.output.weight[:, stopped] = 0.0
    return count


def _first_outputs(decoder: TiledDecoder, embeddings: Tensor) -> Tensor:
    """Outputs of the first layer at every kernel position, (T, Mh, Mw, 4C)."""
    grid = functional.linear(embeddings, decoder.grid.weight, decoder.grid.bias)
    return decoder.activation(torch.unflatten(grid, 1, (-1, *decoder.max_shape[2:])).permute(0, 2, 3, 1))


def _second_inputs(decoder: TiledDecoder, embeddings: Tensor) -> Tensor:
    """Inputs of the second activation at every kernel position, (T, Mh, Mw, 8C)."""
    outputs: Tensor = decoder.hidden(_first_outputs(decoder, embeddings))
    return outputs
