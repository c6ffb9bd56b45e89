"""From ``ArchitectureGraph`` to tensors: what a hypernetwork sees of an architecture, and what it must decode.

``build_features`` is done once per architecture and can be cached; ``collate`` joins several into a ``GraphBatch``.
Legend: N nodes of one graph, T nodes of all graphs of a batch, B graphs, S nodes of the largest graph.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), sections 3.1 and 4.1 and appendix A (shape vocabulary).
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from ghn_service.errors import UnsupportedArchitectureError
from ghn_service.graph.architecture import (
    ArchitectureGraph,
    Node,
    ParameterSpec,
    longest_paths,
    shortest_distances,
)
from ghn_service.graph.passes import RESET_HEAD
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.places import find_places

UNKNOWN_POOL_WINDOW = (3, 3)
MAX_PREFIX_TOKENS = 5


class Role(enum.Enum):
    """Which decoder a tensor comes from, and how its values are scaled."""

    MATRIX = "matrix"
    POSITION = "position"
    CLASS_MATRIX = "class_matrix"
    VECTOR = "vector"
    BIAS = "bias"
    CLASS_BIAS = "class_bias"


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """One tensor to decode.

    Attributes:
        name: Key of the tensor.
        shape: Shape in torch's layout.
        role: Which decoder it comes from.
        node: Index of the node whose embedding it is decoded from, within its graph (for a decoder: within the batch).
        draw: Index of the tensor among all parameters of its graph; seeds what must be drawn for it.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    node: int
    draw: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Kernel (height, width) to decode; the grid of positions for a position embedding."""
        if self.role is Role.POSITION:
            side = math.isqrt(self.shape[1])
            return (side, side) if self.shape[1] - side * side <= MAX_PREFIX_TOKENS else (side + 1, side + 1)
        height, width = (*self.shape[2:], 1, 1)[:2]
        return height, width

    @property
    def channels(self) -> tuple[int, int]:
        """(out, in) channels to decode; (length, 1) for a vector."""
        if self.role is Role.POSITION:
            return 1, self.shape[2]
        if self.role in (Role.VECTOR, Role.BIAS, Role.CLASS_BIAS):
            return math.prod(self.shape), 1
        return self.shape[0], self.shape[1]


@dataclass(frozen=True, eq=False)
class GraphFeatures:
    """What a hypernetwork reads of one architecture.

    Attributes:
        type_row: Row of the type embedding per node, (N,) int64.
        shape_rows: Rows of the channel embedding (out, in) and of the spatial embedding (height, width), (N, 4) int64.
        generation: Length of the longest path from a node without predecessors, (N,) int64.
        places: Where each node is (``places.py``), (N, 7) float32; (N, 0) where the configuration has no places.
        edge_index: Direct edges, (2, E) int64.
        distances: Shortest path lengths; 0 where there is no path within the cutoff, (N, N) uint8.
        targets: The tensors to decode, in the order of ``ArchitectureGraph.parameters``.
    """

    type_row: Tensor
    shape_rows: Tensor
    generation: Tensor
    places: Tensor
    edge_index: Tensor
    distances: Tensor
    targets: tuple[Target, ...]

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return int(self.type_row.shape[0])


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Several architectures side by side.

    Attributes:
        data: Node tensors of all graphs joined (``type_row``, ``shape_rows``, ``generation``, ``places``,
            ``edge_index``, ``batch``, ``ptr``), as ``torch_geometric`` does it.
        distances: Shortest path lengths, padded with 0, (B, S, S) uint8.
        targets: The tensors to decode, per graph.
    """

    data: Batch
    distances: Tensor
    targets: Sequence[tuple[Target, ...]]

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same batch on another device."""
        return GraphBatch(self.data.to(device), self.distances.to(device), self.targets)


def build_features(graph: ArchitectureGraph, config: GHNConfig) -> GraphFeatures:
    """What a hypernetwork of this configuration reads of ``graph``.

    Raises:
        UnsupportedArchitectureError: A node's type is not in the vocabulary; contract such nodes before
            (``graph.passes.restrict_vocabulary``).
    """
    unknown = sorted({node.op_type for node in graph.nodes} - set(config.op_types))
    if unknown:
        raise UnsupportedArchitectureError(
            f"node types {', '.join(unknown)} are not in the hypernetwork's vocabulary ({', '.join(config.op_types)}); "
            "contract these nodes first"
        )
    vocabulary = shape_vocabulary(config.num_classes, config.max_shape[3])
    generation = longest_paths(graph)
    return GraphFeatures(
        type_row=torch.tensor([config.op_types.index(node.op_type) for node in graph.nodes]),
        shape_rows=torch.tensor([vocabulary.rows(node) for node in graph.nodes]),
        generation=torch.tensor(generation),
        places=find_places(graph, generation) if config.places else torch.empty(graph.num_nodes, 0),
        edge_index=torch.tensor(graph.edges, dtype=torch.int64).reshape(-1, 2).t().contiguous(),
        distances=torch.from_numpy(shortest_distances(graph, cutoff=config.distance_cutoff)),
        targets=tuple(find_targets(graph)),
    )


def is_tiled(target: Target, config: GHNConfig) -> bool:
    """Whether a tensor is larger than what is decoded for it, so that values are repeated."""
    return copied_values(target, config) > 0


def copied_values(target: Target, config: GHNConfig) -> int:
    """How many values of a tensor repeat others, since it is larger than what is decoded for it."""
    max_out, max_in = config.max_shape[:2]
    if target.role in (Role.CLASS_MATRIX, Role.CLASS_BIAS):
        max_out = config.num_classes
    elif target.role in (Role.VECTOR, Role.BIAS):
        max_out = max(config.max_shape[:2])
    out_channels, in_channels = target.channels
    repeated = out_channels * in_channels - min(out_channels, max_out) * min(in_channels, max_in)
    return math.prod(target.shape) // (out_channels * in_channels) * repeated


def collate(features: Sequence[GraphFeatures]) -> GraphBatch:
    """Joins architectures into one batch; the order is kept."""
    data = Batch.from_data_list(
        [
            Data(
                num_nodes=len(item.type_row),
                type_row=item.type_row,
                shape_rows=item.shape_rows,
                generation=item.generation,
                places=item.places,
                edge_index=item.edge_index,
            )
            for item in features
        ]
    )
    largest = int(data.ptr.diff().max())
    distances = torch.zeros(len(features), largest, largest, dtype=torch.uint8)
    for row, item in zip(distances, features, strict=True):
        row[: len(item.type_row), : len(item.type_row)] = item.distances
    return GraphBatch(data, distances, [item.targets for item in features])


@dataclass(frozen=True)
class ShapeVocabulary:
    """The sizes that have an embedding of their own; every other size takes the nearest one's.

    Attributes:
        channels: Known channel counts, ascending; the row after the last stands for "no shape". 4 to 7 count as 8 where
            they are not known themselves.
        spatial: Known kernel sizes, ascending; the row after the last stands for "no shape". 2 counts as 3.
        channel_bounds: The largest size that takes each row but the last: of two equally near ones, the smaller.
        spatial_bounds: The same for kernel sizes.
    """

    channels: tuple[int, ...]
    spatial: tuple[int, ...]
    channel_bounds: tuple[float, ...]
    spatial_bounds: tuple[float, ...]

    def rows(self, node: Node) -> tuple[int, int, int, int]:
        """Rows of the embeddings for (out channels, in channels, kernel height, kernel width) of a node."""
        if node.op_type in ("max_pool", "avg_pool"):
            shape: tuple[int, ...] = (1, 1, *(node.kernel_shape or UNKNOWN_POOL_WINDOW))
        elif node.weight is None:
            return len(self.channels), len(self.channels), len(self.spatial), len(self.spatial)
        else:
            shape = node.weight.torch_shape
            if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:  # a grid of positions
                shape = 1, shape[2], math.isqrt(shape[1]), math.isqrt(shape[1])
        shape = (*shape, 1, 1, 1, 1)[:4]
        channels = [8 if 4 <= size <= 7 and size not in self.channels else size for size in shape[:2]]
        spatial = [3 if size == 2 else size for size in shape[2:]]
        out_row, in_row = [bisect.bisect_left(self.channel_bounds, size) for size in channels]
        height_row, width_row = [bisect.bisect_left(self.spatial_bounds, size) for size in spatial]
        return out_row, in_row, height_row, width_row


@functools.lru_cache(maxsize=32)
def shape_vocabulary(num_classes: int, max_width: int) -> ShapeVocabulary:
    """The shape vocabulary of GHN-2 and GHN-3; ``max_width`` is the widest kernel that is decoded."""
    channels = {1, 3, num_classes, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32)}
    spatial = {*range(1, max(12, max_width), 2), 14, 16}
    known = tuple(sorted(channels)), tuple(sorted(spatial))
    return ShapeVocabulary(*known, *(tuple(sum(pair) / 2 for pair in itertools.pairwise(sizes)) for sizes in known))


def find_targets(graph: ArchitectureGraph) -> Iterator[Target]:
    """The tensors to decode, in the order of ``ArchitectureGraph.parameters``."""
    draw = 0
    for index, node in enumerate(graph.nodes):
        for spec in node.parameters:
            role = _role(node, spec)
            if role is not None:
                yield Target(spec.name, spec.torch_shape, role, index, draw)
            draw += 1


def _role(node: Node, spec: ParameterSpec) -> Role | None:
    """How ``spec`` is decoded from its node; None if no decoder gives tensors of its rank, or none shall."""
    shape = spec.torch_shape
    if node.is_head and spec.fallback in RESET_HEAD:
        return None
    if spec is node.norm_bias or node.op_type in ("bias", "bn", "ln"):
        if not shape or len(shape) - shape.count(1) > 1:
            return None
        if node.op_type == "bias":
            return Role.CLASS_BIAS if node.is_head else Role.BIAS
        return Role.BIAS if spec is node.norm_bias else Role.VECTOR
    if not 2 <= len(shape) <= 4:
        return None
    if node.op_type == "pos_enc" and len(shape) == 3 and shape[0] == 1:
        return Role.POSITION
    if node.is_head and math.prod(shape[2:]) == 1:
        return Role.CLASS_MATRIX
    return Role.MATRIX
