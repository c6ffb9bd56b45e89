"""How deep and wide a network is, and how alike its layers of one role are.

A hypernetwork that predicts one layer per type, not one per place, gives the blocks of a stage nearly the same weights;
those of trained networks are nearly orthogonal (mean cosine about 0.02).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from ghn_service.graph.architecture import ArchitectureGraph, longest_paths
from ghn_service.hypernetwork.places import BLOCK, RESOLUTION, find_places


def layers_and_width(graph: ArchitectureGraph) -> tuple[int, int]:
    """Number of weighted layers (norms and biases do not count), and output channels of the first."""
    shapes = [node.weight.torch_shape for node in graph.nodes if node.layer is not None and node.weight is not None]
    return len(shapes), shapes[0][0] if shapes else 0


def likeness(graph: ArchitectureGraph, tensors: Mapping[str, Tensor]) -> float:
    """Mean cosine between weights of one role in different blocks; NaN where no role occurs twice.

    Layers share a role if type, shape and resolution are equal, and as many such layers follow in their block:
    the first layer of a stage has a shape of its own.

    Args:
        graph: The architecture.
        tensors: Its weights by name.
    """
    generation = longest_paths(graph)
    places = find_places(graph, generation).tolist()
    seen: dict[tuple[object, ...], int] = defaultdict(int)
    roles: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for index in sorted(range(graph.num_nodes), key=lambda index: (-generation[index], index)):
        node = graph.nodes[index]
        if node.layer is None or node.weight is None or node.is_head or node.weight.name not in tensors:
            continue
        kind = (node.op_type, node.weight.torch_shape, places[index][RESOLUTION])
        rank = seen[(*kind, places[index][BLOCK])]
        seen[(*kind, places[index][BLOCK])] += 1
        weight = tensors[node.weight.name].detach().float().flatten()
        roles[(*kind, rank)].append(weight / weight.norm().clamp_min(1e-12))
    groups = [torch.stack(members) for members in roles.values() if len(members) > 1]
    cosines = [
        # The squared norm of a sum of n unit vectors is n plus twice the sum of all cosines.
        (float(units.sum(0).square().sum()) - len(units)) / (len(units) * (len(units) - 1))
        for units in groups
    ]
    return fmean(cosines) if cosines else math.nan
