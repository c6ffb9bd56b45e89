"""The noun of the project: a network's architecture as a plain immutable graph.

Nodes are parameters and the operations that shape information flow (``op_types.py``); edges say where data goes.
Nothing here knows ONNX, torch or any hypernetwork. A graph is made by ``onnx.reader.read_onnx`` or by the generator
of random architectures, and is read by ``hypernetwork.features``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import numpy.typing

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.op_types import OP_TYPES

JSON_FORMAT = "ghn-architecture-graph/1"
MAX_DISTANCE = 50
"""Where the distances of trained hypernetworks are cut off."""
_UNREACHABLE = 255
_MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class ParameterUse:
    """Where one trainable tensor enters the model file: input ``input_index`` of the ONNX node ``node``."""

    node: str
    input_index: int


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One trainable tensor: its name, its shape as stored in the file, and how to read it in torch's layout.

    Attributes:
        name: Key of the tensor in a reply. It is the initializer's name, except where the exporter merged equal
            tensors of several layers into one initializer: then each use has a name of its own.
        shape: Shape as stored in the file.
        permutation: Torch axis ``i`` is stored axis ``permutation[i]``: ``(1, 0)`` for a weight stored (in, out).
            Empty means the stored layout is torch's own.
        initializer: Name of the initializer (or weight-producing value) in the file.
        torch_name: ``state_dict`` key where it can be told, else "".
        fallback: Name of the rule that initialises this tensor when the hypernetwork does not predict it.
        uses: The places of the file that read the tensor; given where ``name`` differs from ``initializer``, so that
            a filled file can give each use its own tensor.
    """

    name: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] = ()
    initializer: str = ""
    torch_name: str = ""
    fallback: str = "kaiming_normal"
    uses: tuple[ParameterUse, ...] = ()

    def __post_init__(self) -> None:
        if min(self.shape, default=1) < 1:
            raise InvalidArchitectureError(
                f"parameter {self.name!r} has shape {self.shape}; every size must be at least 1"
            )
        if self.permutation and sorted(self.permutation) != list(range(len(self.shape))):
            raise InvalidArchitectureError(
                f"parameter {self.name!r}: permutation {self.permutation} does not fit shape {self.shape}"
            )

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape in torch's layout, output channels first."""
        return tuple(self.shape[axis] for axis in self.permutation) if self.permutation else self.shape

    @property
    def num_elements(self) -> int:
        """Number of scalars in the tensor."""
        return math.prod(self.shape)


def leaky_relu_name(slope: float) -> str:
    """How ``LayerAttributes.activation`` calls a leaky ReLU with this slope below zero."""
    return f"leaky_relu:{slope:.6g}"


@dataclass(frozen=True, slots=True)
class AttentionRole:
    """What a linear layer does in an attention.

    Attributes:
        number: Which attention of the network, from 1 in the order of the graph.
        heads: Heads of it.
        role: ``query``, ``key``, ``value``, ``query_key_value`` (packed in this order) or ``output``. Queries and keys
            that are layers of their own are told apart by their order alone.
    """

    number: int
    heads: int
    role: str


@dataclass(frozen=True, slots=True)
class LayerAttributes:
    """What a weighted layer does, beyond its weight's shape; read by post-processing and planning.

    Attributes:
        groups: Groups of a convolution; equal to the channels where it is depthwise.
        stride: Stride per spatial axis; empty for a linear layer.
        dilations: Dilation per spatial axis; empty for a linear layer.
        padding: Padding as (begin per axis..., end per axis...); empty for a linear layer.
        activation: Name of the nonlinearity that the output passes next (``relu``, ``gelu``, ``silu``,
            ``leaky_relu:0.1`` with its slope, ``tanh``, ``sigmoid``, ``hardswish``, ...), or "" where none follows
            before the next layer.
        normalized: Whether a normalisation sits between the layer and its activation.
        packed: How many projections are stacked along the output axis (3 for a packed query-key-value weight).
        positions: Spatial positions or tokens at which the weight is applied per example; 0 where unknown.
        attention: The layer's part in an attention whose number of heads is known; else None.
    """

    groups: int = 1
    stride: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    activation: str = ""
    normalized: bool = False
    packed: int = 1
    positions: int = 0
    attention: AttentionRole | None = field(default=None, repr=False)  # no part of a graph's digest


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the graph.

    Attributes:
        op_type: Name of a row of ``OP_TYPES``.
        name: For people: name of the operation or parameter in the file. It has no influence on predictions.
        weight: The tensor this node stands for; None for an operation. A ``bias`` node keeps its bias here.
        norm_bias: The bias that is predicted together with ``weight``; normalisation nodes only.
        kernel_shape: Window (height, width) of a pooling node.
        is_head: Whether this is the weight or bias of the classifier.
        layer: Attributes of the layer whose weight this is; None for everything else.
    """

    op_type: str
    name: str = ""
    weight: ParameterSpec | None = None
    norm_bias: ParameterSpec | None = None
    kernel_shape: tuple[int, int] | None = None
    is_head: bool = False
    layer: LayerAttributes | None = None

    def __post_init__(self) -> None:
        holds_parameter = OP_TYPES.get(self.op_type)
        if holds_parameter is None:
            known = ", ".join(OP_TYPES)
            raise InvalidArchitectureError(f"node {self.name!r} has op type {self.op_type!r}; known are {known}")
        if holds_parameter != (self.weight is not None):
            expected = "a parameter" if holds_parameter else "no parameter"
            raise InvalidArchitectureError(f"node {self.name!r} of type {self.op_type!r} must have {expected}")

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The tensors predicted from this node."""
        if self.weight is None:
            return ()
        return (self.weight,) if self.norm_bias is None else (self.weight, self.norm_bias)


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A float tensor that is not a weight, such as a running mean: listed, never predicted."""

    name: str
    shape: tuple[int, ...]
    kind: str


class _Digested:
    """A place for a digest beside the fields of a frozen class."""

    __slots__ = ("_digest",)
    _digest: str


@dataclass(frozen=True, slots=True)
class ArchitectureGraph(_Digested):
    """An architecture: nodes, directed edges, and the tensors that no node stands for.

    Attributes:
        nodes: In topological order; node 0 is the input.
        edges: Pairs (source, target) of node indices, sorted, without repetitions.
        other_parameters: Trainable tensors outside the vocabulary (class tokens, recurrent weights, ...), which are
            initialised by their ``fallback`` rule.
        buffers: Float tensors that are not weights.
        warnings: What was not understood, or what the user should know; sentences.
        unknown_operators: Operators of the file that are not understood; data flows through them as if they were
            element-wise.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    other_parameters: tuple[ParameterSpec, ...] = ()
    buffers: tuple[BufferSpec, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    unknown_operators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[0].op_type != "input":
            raise InvalidArchitectureError("node 0 of an architecture graph must be its input")
        if list(self.edges) != sorted(set(self.edges)):
            raise InvalidArchitectureError("the edges of an architecture graph must be sorted and without repetitions")
        for source, target in self.edges:
            if not 0 <= source < target < len(self.nodes):
                raise InvalidArchitectureError(
                    f"edge ({source}, {target}) does not go forward within {len(self.nodes)} nodes"
                )
        names: set[str] = set()
        repeated: dict[str, None] = {}
        for spec in self.parameters():
            if spec.name in names:
                repeated[spec.name] = None
            names.add(spec.name)
        if repeated:
            raise InvalidArchitectureError(f"parameter names must be unique; repeated: {', '.join(list(repeated)[:5])}")

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.nodes)

    @property
    def num_parameters(self) -> int:
        """Number of trainable scalars, over all tensors."""
        return sum(spec.num_elements for spec in self.parameters())

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 without one."""
        return next((node.weight.torch_shape[0] for node in self.nodes if node.is_head and node.weight), 0)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Every trainable tensor: those of the nodes in order, then the others."""
        for node in self.nodes:
            yield from node.parameters
        yield from self.other_parameters

    def digest(self) -> str:
        """A sha256 that two graphs share exactly if they are the same architecture.

        It covers types, shapes, attributes and wiring, and depends neither on names nor on the order of nodes:
        colour refinement along both edge directions until stable, then the sorted colours are hashed. (Like every
        refinement it may give two non-isomorphic regular graphs one digest; architecture graphs with their single
        input are far from that. Two rounds make all networks of this project stable; a graph made to take hundreds
        gets ``_MAX_ROUNDS``.)
        """
        if not hasattr(self, "_digest"):
            object.__setattr__(self, "_digest", self._compute_digest())
        return self._digest

    def _compute_digest(self) -> str:
        predecessors: list[list[int]] = [[] for _ in self.nodes]
        successors: list[list[int]] = [[] for _ in self.nodes]
        for source, target in self.edges:
            successors[source].append(target)
            predecessors[target].append(source)
        colours = []
        for node in self.nodes:
            weight = node.weight.torch_shape if node.weight else None
            norm_bias = node.norm_bias.torch_shape if node.norm_bias else None
            label = (node.op_type, weight, norm_bias, node.kernel_shape, node.is_head, node.layer)
            colours.append(_hash(repr(label)))
        num_colours = 0
        for _ in range(_MAX_ROUNDS):
            if len(set(colours)) <= num_colours:
                break
            num_colours = len(set(colours))
            forward: list[str] = []
            for index, colour in enumerate(colours):
                forward.append(_hash(colour, *sorted([forward[source] for source in predecessors[index]])))
            backward = [""] * len(colours)
            for index in range(len(colours) - 1, -1, -1):
                backward[index] = _hash(forward[index], *sorted([backward[target] for target in successors[index]]))
            colours = backward
        others = sorted([repr((spec.torch_shape, spec.fallback)) for spec in self.other_parameters])
        return _hash(*sorted(colours), "others", *others)


DIGEST_VERSION = 2
"""Raised when graphs get other digests though their networks stay: 2 counts the rows of linear layers per example."""


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def shortest_distances(graph: ArchitectureGraph, *, cutoff: int = MAX_DISTANCE) -> numpy.typing.NDArray[numpy.uint8]:
    """The directed distance of every pair of nodes: the virtual edges of GHN-2 and GHN-3 (arXiv:2110.13100, sec. 4.2).

    Edges only go forward, so the distances from a node are one more than the smallest of its successors' distances,
    taken from the last node to the first: O(edges * N) bytes touched.

    Args:
        graph: The architecture.
        cutoff: Largest distance that counts, in edges, at most 253.

    Returns:
        (N, N) uint8: entry [i, j] is the number of edges on a shortest path from node i to node j, 1 for an edge;
        0 on the diagonal, for unreachable pairs and for pairs farther apart than ``cutoff``.
    """
    if not 1 <= cutoff < _UNREACHABLE - 1:
        raise ValueError(f"cutoff must be in [1, {_UNREACHABLE - 2}], got {cutoff}")
    num_nodes = graph.num_nodes
    successors: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in graph.edges:
        successors[source].append(target)
    distances = numpy.full((num_nodes, num_nodes), _UNREACHABLE, dtype=numpy.uint8)
    for index in range(num_nodes - 1, -1, -1):
        targets = successors[index]
        if not targets:
            continue
        # Columns before index + 1 cannot be reached.
        row = distances[targets[0], index + 1 :].copy()
        for target in targets[1:]:
            numpy.minimum(row, distances[target, index + 1 :], out=row)
        row[row >= cutoff] = _UNREACHABLE - 1
        row += 1
        row[numpy.asarray(targets) - (index + 1)] = 1
        distances[index, index + 1 :] = row
    distances[distances == _UNREACHABLE] = 0
    return distances


def encode_graph(graph: ArchitectureGraph) -> str:
    """The graph as JSON; ``decode_graph`` reads it back unchanged."""
    body = {"format": JSON_FORMAT, **dataclasses.asdict(graph)}
    return json.dumps(body, separators=(",", ":"))


def decode_graph(text: str) -> ArchitectureGraph:
    """The graph that ``encode_graph`` wrote.

    Raises:
        InvalidArchitectureError: The text is not such a JSON document.
    """
    try:
        body = json.loads(text)
        if body.get("format") != JSON_FORMAT:
            raise InvalidArchitectureError(f"expected a JSON document of format {JSON_FORMAT!r}")
        return ArchitectureGraph(
            nodes=tuple(_node_from_json(item) for item in body["nodes"]),
            edges=tuple((int(source), int(target)) for source, target in body["edges"]),
            other_parameters=tuple(_spec_from_json(item) for item in body["other_parameters"]),
            buffers=tuple(BufferSpec(item["name"], tuple(item["shape"]), item["kind"]) for item in body["buffers"]),
            warnings=tuple(body["warnings"]),
            unknown_operators=tuple(body.get("unknown_operators", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArchitectureError(f"not a JSON architecture graph: {error}") from error


def _spec_from_json(item: Mapping[str, Any]) -> ParameterSpec:
    values = dict(item)
    values["shape"] = tuple(values["shape"])
    values["permutation"] = tuple(values["permutation"])
    values["uses"] = tuple(ParameterUse(**use) for use in values["uses"])
    return ParameterSpec(**values)


def _node_from_json(item: Mapping[str, Any]) -> Node:
    values = dict(item)
    for key in ("weight", "norm_bias"):
        values[key] = _spec_from_json(values[key]) if values[key] else None
    values["kernel_shape"] = tuple(values["kernel_shape"]) if values["kernel_shape"] else None
    if values["layer"]:
        layer: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values["layer"].items()
        }
        if layer.get("attention"):
            layer["attention"] = AttentionRole(**layer["attention"])
        values["layer"] = LayerAttributes(**layer)
    return Node(**values)


def longest_paths(graph: ArchitectureGraph) -> list[int]:
    """Length of the longest path to each node; edges are sorted by source, and sources precede targets."""
    generation = [0] * graph.num_nodes
    for source, target in graph.edges:
        generation[target] = max(generation[target], generation[source] + 1)
    return generation
