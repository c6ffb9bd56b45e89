"""The graph while it is being read: every candidate node, before the passes decide which stay.

The reader of ONNX files (``onnx/``) and the tracer of torch modules (``ghn_architectures/tracing``) both build it.
A raw node is anything that might become a node of the architecture graph. ``level`` is the length of the longest path
of operations before it, which does not depend on the order of nodes in a file; every edge goes to a higher
``(level, rank)``, so sorting by it is a topological order that is the same for every valid order of the same file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ghn_service.errors import LimitExceededError
from ghn_service.graph.architecture import ParameterSpec

Flow = frozenset[int]
NOTHING: Flow = frozenset()
INPUT: Flow = frozenset({0})


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest architecture that is read.

    Attributes:
        max_bytes: Bytes of the serialised model.
        max_parsed_bytes: Bytes of memory for the parsed messages and lists, beyond four times those of the model.
        max_nodes: ONNX nodes, with functions expanded and the nodes of subgraphs counted; also the functions and their
            nodes before that. The values whose shape the file states may be twice as many.
        max_tensors: Initializers and graph inputs together.
        max_parameters: Scalars in one tensor, and in all weights together.
        max_graph_nodes: Nodes of the architecture graph. A transformer over the nodes takes memory with their square:
            this many take 2 GiB with 16 heads (``docs/server.md``).
        max_edges: Edges of the architecture graph. Eight times as many are set elements touched while it is built, and
            operands and attributes of nodes together with the tensors of subgraphs.
        max_subgraph_depth: Nesting of subgraphs (If, Loop, Scan).
        max_name_bytes: Bytes of one name; all names that expanding functions makes have this times ``max_nodes``.
    """

    max_bytes: int = 2**31 - 1
    max_parsed_bytes: int = 2**28
    max_nodes: int = 50_000
    max_tensors: int = 20_000
    max_parameters: int = 4_000_000_000
    max_graph_nodes: int = 4_000
    max_edges: int = 100_000
    max_subgraph_depth: int = 8
    max_name_bytes: int = 1024


MAX_RANK = 64
"""Axes of a tensor; a list of integers that says how a node works has two for each at most, as pads do."""

CHECK_EVERY = 4096
"""Units of work (nodes read, set elements touched) between two calls of ``check``: a few milliseconds."""


def never_ends() -> None:
    """The ``check`` of a reading that nobody cancels."""


def exceeded(what: str, value: int | str, limit: int) -> LimitExceededError:
    """An error about a number over its limit."""
    return LimitExceededError(f"the model has {value} {what}; this server reads at most {limit}")


@dataclass(slots=True, eq=False)
class Source:
    """A float tensor of the file that may turn out to be a weight.

    Attributes:
        name: Name of the value; for an exporter's alias of a merged initializer, the alias.
        initializer: Name of the initializer, graph input or weight-producing value behind it.
        shape: Stored shape.
        kind: ``PARAMETER`` or ``BUFFER`` where declared; ``CONSTANT`` for what an exporter folded or wrote as a
            literal, which is a weight only where it feeds a weight slot; "" where nothing is known.
        is_literal: Whether it comes from a Constant node rather than from an initializer or input.
        folded: The parameters that the exporter computed it from; None where it computed nothing.
        uses: Every place where it acts as a weight, in reading order.
    """

    name: str
    initializer: str
    shape: tuple[int, ...]
    kind: str = ""
    is_literal: bool = False
    folded: tuple[str, ...] | None = None
    uses: list[TensorUse] = field(default_factory=list)

    @property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than 1: biases, norm weights, layer scales."""
        return len(self.shape) - self.shape.count(1) <= 1

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(slots=True, eq=False)
class TensorUse:
    """One place where a source acts as a weight.

    Attributes:
        source: The tensor.
        role: ``node`` for a tensor that a graph node stands for, ``buffer``, or the name of a fallback rule.
        level: Level of the reading node.
        node: Label of the reading ONNX node; "" where the exporter dropped the operand.
        input_index: Which input of that node.
        torch_name: ``state_dict`` key of this use, where it can be told.
        token: What tells uses of one merged initializer apart; "" where nothing does.
        permutation: As in ``ParameterSpec``.
        is_scale: Whether this is a normalisation's weight rather than a bias.
        parameter_shape: Shape of the parameter that the exporter computed the tensor from, where that follows from
            the tensor's own shape and use.
        spec: The parameter as the architecture graph will have it, once that is settled; None for a buffer.
    """

    source: Source
    role: str
    level: int
    node: str = ""
    input_index: int = 0
    torch_name: str = ""
    token: str = ""
    permutation: tuple[int, ...] = ()
    is_scale: bool = False
    parameter_shape: tuple[int, ...] = ()
    spec: ParameterSpec | None = None

    @property
    def key(self) -> tuple[int, str]:
        """Uses with equal keys read the same weight."""
        return id(self.source), self.token if self.source.is_vector or self.role != "node" else ""


@dataclass(slots=True, eq=False)
class RawNode:
    """A candidate node; the fields are those of ``architecture.Node`` plus what the passes need.

    Attributes:
        op_type: Op type that it gets if it stays.
        level: See the module docstring.
        rank: Order among nodes of one level.
        name: Name of the operation or parameter, for people.
        predecessors: Indices of raw nodes that data comes from.
        weight: The tensor that it stands for.
        norm_bias: The bias beside a norm's weight.
        bias: Index of this layer's bias node, -1 without one.
        is_linear: Whether the weight is that of a fully connected layer.
        window: Pooling window.
        from_adaptive: Whether an average pool is known to be adaptive (True), known not to be (False) or neither.
        covers_input: Whether an average pool can be global or adaptive by its geometry.
        is_attention: Whether a softmax weighs values.
        heads: Heads of an attention; 0 where unknown.
        values: Predecessors of an attention that make its values.
        gate: Predecessors of a cse node on the gate's side.
        feature: Predecessors of a cse node on the other side.
        activation: Name of the activation that the output passes next, with its level.
        attributes: Keyword arguments of ``LayerAttributes``; empty for all but layers.
    """

    op_type: str
    level: int
    rank: int = 0
    name: str = ""
    predecessors: set[int] = field(default_factory=set)
    weight: TensorUse | None = None
    norm_bias: TensorUse | None = None
    bias: int = -1
    is_linear: bool = False
    window: tuple[int, int] | None = None
    from_adaptive: bool | None = None
    covers_input: bool = False
    is_attention: bool = False
    heads: int = 0
    values: Flow = NOTHING
    gate: Flow = NOTHING
    feature: Flow = NOTHING
    activation: tuple[int, str] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


class RawGraph:
    """Raw nodes by index; index 0 is the input. Counts the work that building them costs.

    Args:
        limits: The largest graph that is built.
        is_ordered: Whether nodes come in the order that they shall keep, as in a trace; otherwise levels decide.
        check: Called every few milliseconds of work; what it raises ends the work.
    """

    def __init__(
        self, limits: GraphLimits, *, is_ordered: bool = False, check: Callable[[], None] = never_ends
    ) -> None:
        self.nodes: list[RawNode] = [RawNode("input", 0, name="input")]
        self.outputs: list[Flow] = []
        self.is_ordered = is_ordered
        self._limits = limits
        self._check = check
        self._work = 0
        self._checked = 0

    def add(self, node: RawNode) -> int:
        """Appends a node and returns its index."""
        self.nodes.append(node)
        self.spend(len(node.predecessors))
        return len(self.nodes) - 1

    def union(self, flows: list[Flow]) -> Flow:
        """The union of flows, shared where they are equal."""
        distinct = set(flows) - {NOTHING}
        if len(distinct) <= 1:
            return distinct.pop() if distinct else NOTHING
        self.spend(sum(map(len, distinct)))
        return NOTHING.union(*distinct)

    def note_activation(self, flow: Flow, level: int, label: str) -> None:
        """Records that what comes from ``flow`` passes the activation ``label`` at ``level``; the first one counts."""
        self.spend(len(flow))
        for index in flow:
            node = self.nodes[index]
            if node.activation is None or (level, label) < node.activation:
                node.activation = (level, label)

    def spend(self, amount: int) -> None:
        """Counts set elements touched, and looks now and then whether the result is still wanted.

        Raises:
            LimitExceededError: There were more than eight times ``max_edges``: the graph is too densely connected.
        """
        self._work += amount
        if self._work > 8 * self._limits.max_edges:
            raise exceeded("connections", f"over {self._work // 8}", self._limits.max_edges)
        if self._work >= self._checked + CHECK_EVERY:
            self._checked = self._work
            self._check()
