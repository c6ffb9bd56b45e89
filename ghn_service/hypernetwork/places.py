"""Where a layer is: depth, resolution, block and occurrence of every node, from the graph alone.

A graph hypernetwork tells layers of equal type and shape apart by their neighbourhood only, and in a deep network most
neighbourhoods are alike; so without these features it predicts one layer per type, not one per place. They depend
neither on names nor on the order of nodes. Legend: N nodes of one graph, T nodes of all graphs of a batch.

* **Depth**: the node's generation (longest path from the input).
* **Resolution**: how often the side of the image was halved. Layers state the positions that they are applied to; other
  nodes inherit, and where a file states no sizes, strides are counted. Layers applied once (gates of
  squeeze-and-excitation, classifiers, perceptrons) keep the resolution of what they read.
* **Block**: merges (sums and concatenations) before the node on the longest path at its resolution. That is the block
  in a stage of a residual network, the layer in a block of a DenseNet, and half a block in a transformer, which has two
  sums in each. Plain networks have one block per resolution.
* **Occurrence**: how many generations before the node's hold a node of its type, shape and resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ghn_service.graph.architecture import ArchitectureGraph, Node

RESOLUTION, BLOCK, NUM_PLACES = 2, 3, 7
"""Two columns of ``find_places``, and how many it has."""
PLACE_CHANNELS = 46
"""Columns of ``encode_places``."""

_MERGES = ("sum", "concat")
_POOLS = ("max_pool", "avg_pool")
_COARSEST = 15


def find_places(graph: ArchitectureGraph, generation: Sequence[int]) -> Tensor:
    """The place of every node.

    Args:
        graph: The architecture.
        generation: Length of the longest path to each node.

    Returns:
        (N, 7) float32: generation as a share of the largest, the largest generation, resolution (halvings), block,
        number of blocks at this resolution, occurrence, number of occurrences.
    """
    predecessors: list[list[int]] = [[] for _ in graph.nodes]
    for source, target in graph.edges:
        predecessors[target].append(source)
    resolution = _resolutions(graph, predecessors)
    block = [0] * graph.num_nodes
    num_blocks: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        here = resolution[index]
        before = (block[item] + (graph.nodes[item].op_type in _MERGES) for item in predecessors[index])
        same = [resolution[item] == here for item in predecessors[index]]
        block[index] = max((count for count, is_same in zip(before, same, strict=True) if is_same), default=0)
        num_blocks[here] = max(num_blocks.get(here, 1), block[index] + (node.op_type in _MERGES))
    alike: dict[tuple[object, ...], set[int]] = {}
    keys = [_likeness(node, halvings) for node, halvings in zip(graph.nodes, resolution, strict=True)]
    for key, when in zip(keys, generation, strict=True):
        alike.setdefault(key, set()).add(when)
    order = {key: {when: rank for rank, when in enumerate(sorted(group))} for key, group in alike.items()}
    last = max(1, *generation)
    rows = [
        (when / last, last, here, block[index], num_blocks[here], order[key][when], len(order[key]))
        for index, (key, when, here) in enumerate(zip(keys, generation, resolution, strict=True))
    ]
    return torch.tensor(rows, dtype=torch.float32)


def encode_places(places: Tensor) -> Tensor:
    """Smooth features of places, for one linear layer.

    Args:
        places: What ``find_places`` gives, (T, 7).

    Returns:
        (T, 46): sines and cosines of pi {1, 2, 4} times each share, of the indices with periods 2 to 16, logarithms of
        the counts, and whether a block or an occurrence is the first or the last; scaled to a length of about 1, so
        that the layer learns no faster than the embeddings beside it.
    """
    depth, last, resolution, block, num_blocks, occurrence, num_occurrences = places.unbind(1)
    shares = torch.stack((depth, block / num_blocks, occurrence / num_occurrences), dim=1)  # (T, 3)
    indices = torch.stack((resolution, block, occurrence), dim=1)
    waves = math.pi * shares[:, :, None] * shares.new_tensor((1.0, 2.0, 4.0))  # (T, 3, 3)
    turns = 2 * math.pi * indices[:, :, None] / indices.new_tensor((4.0, 8.0, 16.0))
    angles = torch.cat((waves, turns), dim=1).flatten(1)  # (T, 18)
    parity = torch.cos(math.pi * indices)
    counts = torch.stack((last, num_blocks, num_occurrences), dim=1).log2() / 8
    ends = (block == 0, block >= num_blocks - 1, occurrence == 0, occurrence == num_occurrences - 1)
    flags = torch.stack(ends, dim=1).to(places.dtype)
    return torch.cat((angles.sin(), angles.cos(), parity, counts, flags), dim=1) / math.sqrt(PLACE_CHANNELS / 2)


def _likeness(node: Node, resolution: int) -> tuple[object, ...]:
    """What nodes share that count as occurrences of one another."""
    shape = node.weight.torch_shape if node.weight is not None else node.kernel_shape
    return node.op_type, shape, node.is_head, resolution


def _resolutions(graph: ArchitectureGraph, predecessors: Sequence[Sequence[int]]) -> list[int]:
    """Halvings of the image's side up to each node's output.

    Merged paths of different resolutions are those of slices, which the graph does not show: the coarsest is right. The
    stride of a pool is what the layers behind it say, else its window where that is even. For an odd one in a file
    without sizes 2 is guessed, which gives way to any other path that is merged with this one.
    """
    stated = [_stated_side(node) for node in graph.nodes]
    read = _sides_read(graph, predecessors, stated)
    whole = read[0]
    reached = [0.0] * graph.num_nodes
    is_guess = [False] * graph.num_nodes
    for index, node in enumerate(graph.nodes):
        sure = [reached[item] for item in predecessors[index] if not is_guess[item]]
        reached[index] = max(sure or [reached[item] for item in predecessors[index]], default=0.0)
        is_guess[index] = bool(predecessors[index]) and not sure
        side = stated[index]
        if side is None and (node.op_type in _POOLS or not predecessors[index]):
            side = read[index]
        if side is not None and whole is not None:
            reached[index] = max(whole - side, reached[index] if node.op_type in _POOLS else 0.0)
            is_guess[index] = False
        elif node.op_type in _POOLS:
            window = min(node.kernel_shape or (3, 3))
            if window % 2 == 0:
                reached[index] += math.log2(window)
            elif window > 1 and whole is None:
                reached[index] += 1.0
                is_guess[index] = True
        else:
            reached[index] += _halvings(node)
    return [min(int(value + 0.5), _COARSEST) for value in reached]


def _sides_read(
    graph: ArchitectureGraph, predecessors: Sequence[Sequence[int]], stated: Sequence[float | None]
) -> list[float | None]:
    """Log2 of the side of each node's output, as the layers that read it state it; None where none does."""
    read: list[float | None] = [None] * graph.num_nodes
    for index in range(graph.num_nodes - 1, -1, -1):
        node, side = graph.nodes[index], stated[index]
        if side is not None:
            wanted: float | None = side + _halvings(node)
        else:
            wanted = None if node.op_type in (*_POOLS, "glob_avg") or node.layer is not None else read[index]
        if wanted is not None:
            for item in predecessors[index]:
                read[item] = max(wanted, read[item] or 0.0)
    return read


def _stated_side(node: Node) -> float | None:
    """Log2 of the side of a square of the positions that a layer is applied to; None for one position or unknown."""
    positions = node.layer.positions if node.layer is not None else 0
    return 0.5 * math.log2(positions) if positions > 1 else None


def _halvings(node: Node) -> float:
    """Log2 of a layer's stride."""
    stride = node.layer.stride if node.layer is not None else ()
    return sum(math.log2(step) for step in stride) / len(stride) if stride else 0.0
