"""From the raw graph to the architecture graph: tied weights, dead ends, gates, pools, contraction, the head.

Each pass does one thing to a ``RawGraph`` and is described by its first sentence; ``simplify`` runs them in order and
``build_graph`` makes the result. Legend: a raw node is *live* if an output depends on it, and *kept* if it becomes a
node of the architecture graph; the others are contracted, which joins each of their predecessors to each of their
successors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ghn_service.graph.architecture import (
    ArchitectureGraph,
    AttentionRole,
    BufferSpec,
    LayerAttributes,
    Node,
    ParameterSpec,
)
from ghn_service.graph.raw_graph import GraphLimits, RawGraph, RawNode, exceeded

_MEETINGS = ("sum", "concat")
_NORMS = ("bn", "ln")

Readers = Mapping[int, list[int]]
"""For each live raw node, the live raw nodes that read it."""


@dataclass(slots=True)
class Skeleton:
    """Kept raw nodes in topological order with their kept predecessors.

    Attributes:
        order: Indices of raw nodes; the input is first, the head last.
        predecessors: Per raw node, the kept nodes that data comes from.
        outputs: Per output of the network, the kept nodes that it comes from.
        head: Indices of the classifier's weight and, where it has one, its bias.
    """

    order: list[int]
    predecessors: dict[int, set[int]]
    outputs: list[set[int]]
    head: list[int] = field(default_factory=list)


def simplify(graph: RawGraph, limits: GraphLimits) -> Skeleton:
    """Runs all passes.

    Raises:
        LimitExceededError: The result has too many nodes or edges.
    """
    _merge_tied(graph)
    readers = _find_live(graph)
    _classify_average_pools(graph, readers)
    skeleton = contract(graph, readers, _find_dropped(graph, readers), limits)
    if skeleton.outputs and len(skeleton.outputs[0]) == 1:
        _move_final_pool(graph, skeleton)
        _place_head(graph, skeleton)
    return skeleton


def _merge_tied(graph: RawGraph) -> None:
    """Unites raw nodes that stand for the same weight, without making a cycle.

    The node stands at the first use (the lowest level). What reads a later use reads this node instead. What a later
    use reads is read by this node too where it comes before it; otherwise data passes the later use.
    """
    uses: dict[tuple[int, str], list[int]] = {}
    for index, node in enumerate(graph.nodes):
        if node.weight is not None:
            uses.setdefault(node.weight.key, []).append(index)
    if sum(map(len, uses.values())) == len(uses):
        return
    places = [(node.level, node.rank) for node in graph.nodes]
    replaced: dict[int, int] = {}
    for members in uses.values():
        first = min(members, key=places.__getitem__)
        replaced.update((index, first) for index in members if index != first)
    passing: dict[int, set[int]] = {}

    def resolved(items: Iterable[int]) -> set[int]:
        result: set[int] = set()
        for item in items:
            result.add(replaced.get(item, item))
            result |= passing.get(item, set())
        graph.spend(len(result))
        return result

    for index in sorted(range(len(graph.nodes)), key=places.__getitem__):
        node = graph.nodes[index]
        found = resolved(node.predecessors)
        node.gate, node.feature = frozenset(resolved(node.gate)), frozenset(resolved(node.feature))
        target = replaced.get(index, index)
        if target == index:
            node.predecessors |= found
            node.predecessors -= replaced.keys()
        else:
            earlier = {item for item in found if places[item] < places[target]}
            graph.nodes[target].predecessors |= earlier
            passing[index] = found - earlier - {target}
    graph.outputs = [frozenset(resolved(flow)) for flow in graph.outputs]


def _find_live(graph: RawGraph) -> Readers:
    """The raw nodes that an output depends on, each with those of them that read it."""
    live = set().union(*graph.outputs) | {0}
    waiting = list(live)
    while waiting:
        fresh = graph.nodes[waiting.pop()].predecessors - live
        live |= fresh
        waiting.extend(fresh)
    readers: dict[int, list[int]] = {index: [] for index in sorted(live)}
    for index in readers:
        for item in graph.nodes[index].predecessors:
            readers[item].append(index)
    return readers


def _find_dropped(graph: RawGraph, readers: Readers) -> set[int]:
    """A softmax at the end of a classifier and the pools before gates have no node.

    The softmax weighs nothing, and nothing reads it. The pools only feed the gate of a squeeze-and-excitation block:
    from each gate, the pass walks back over nodes all of whose readers lie on the gate's branch, up to the pool.
    """
    dropped: set[int] = set()
    for place, following in readers.items():
        raw = graph.nodes[place]
        if raw.op_type == "msa" and not raw.is_attention and not following:
            dropped.add(place)
        if raw.op_type != "cse":
            continue
        branch = {place}
        waiting = sorted(raw.gate - raw.feature)
        graph.spend(len(raw.gate))
        while waiting:
            index = waiting.pop()
            if index in branch or index == 0:
                continue
            graph.spend(len(readers[index]))
            if not branch.issuperset(readers[index]):
                continue
            branch.add(index)
            if graph.nodes[index].op_type == "glob_avg":
                dropped.add(index)
            else:
                waiting.extend(graph.nodes[index].predecessors)
    return dropped


def _classify_average_pools(graph: RawGraph, readers: Readers) -> None:
    """Average pools that came from adaptive pooling are ``glob_avg``.

    The exporter's module class tells, where the file has it. Otherwise a 1x1 window tells, or windows that tile the
    input (or cover it) right before a fully connected layer or the output.
    """
    for index, following in readers.items():
        node = graph.nodes[index]
        if node.op_type != "avg_pool":
            continue
        adaptive = node.from_adaptive
        if adaptive is None:
            ends_features = all(graph.nodes[reader].is_linear for reader in following)
            adaptive = node.window == (1, 1) or (node.covers_input and ends_features)
        if adaptive:
            node.op_type, node.window = "glob_avg", None


def contract(graph: RawGraph, readers: Readers, dropped: set[int], limits: GraphLimits) -> Skeleton:
    """Removes the nodes that do not stay; sums and concatenations stay if two or more nodes still meet in them.

    Raises:
        LimitExceededError: The result has too many nodes or edges.
    """
    places = [(node.level, node.rank) for node in graph.nodes]
    order = list(readers) if graph.is_ordered else sorted(readers, key=places.__getitem__)
    kept: dict[int, None] = {}
    predecessors: dict[int, set[int]] = {}
    num_edges = 0

    def behind(items: Iterable[int]) -> set[int]:
        found: set[int] = set()
        for item in items:
            if item in kept:
                found.add(item)
            else:
                found |= predecessors[item]
        return found

    for index in order:
        raw = graph.nodes[index]
        found = predecessors[index] = behind(raw.predecessors)
        graph.spend(len(found))
        if index in dropped or (raw.op_type in _MEETINGS and len(found) < 2):
            continue
        kept[index] = None
        num_edges += len(found)
        if len(kept) > limits.max_graph_nodes:
            raise exceeded("graph nodes", f"over {len(kept) - 1}", limits.max_graph_nodes)
        if num_edges > limits.max_edges:
            raise exceeded("edges", f"over {num_edges - 1}", limits.max_edges)
    for index in kept:
        if not predecessors[index] and index and graph.nodes[index].op_type != "pos_enc":
            predecessors[index] = {0}
    return Skeleton(list(kept), predecessors, [behind(flow) for flow in graph.outputs])


def _move_final_pool(graph: RawGraph, skeleton: Skeleton) -> None:
    """A global pool that ends the network moves in front of the 1x1 convolution that is its classifier.

    ``... -> weight -> bias -> pool`` becomes ``... -> pool -> weight -> bias``.
    """
    (pool,) = skeleton.outputs[0]
    before = skeleton.predecessors[pool]
    if graph.nodes[pool].op_type != "glob_avg" or len(before) != 1:
        return
    layer = _layer_ending(graph, skeleton, next(iter(before)))
    if not layer or not _is_pointwise(graph.nodes[layer[0]]):
        return
    first, last = layer[0], layer[-1]
    if any(last in skeleton.predecessors[index] for index in skeleton.order if index != pool):
        return
    skeleton.predecessors[pool] = skeleton.predecessors[first]
    skeleton.predecessors[first] = {pool}
    skeleton.order.remove(pool)
    skeleton.order.insert(skeleton.order.index(first), pool)
    skeleton.outputs[0] = {last}


def _place_head(graph: RawGraph, skeleton: Skeleton) -> None:
    """Finds the classifier and puts its weight and bias last.

    The classifier is the fully connected layer, or 1x1 convolution, whose result is the network's first output; nothing
    else may read it.
    """
    (last,) = skeleton.outputs[0]
    head = _layer_ending(graph, skeleton, last)
    if not head or not (graph.nodes[head[0]].is_linear or _is_pointwise(graph.nodes[head[0]])):
        return
    others = [index for index in skeleton.order if index not in head]
    if not set().union(*[skeleton.predecessors[index] for index in others]).isdisjoint(head):
        return
    skeleton.head = head
    skeleton.order = others + head


def _layer_ending(graph: RawGraph, skeleton: Skeleton, index: int) -> list[int]:
    """Weight and bias of the layer whose last node is ``index``; empty if it is not the end of a layer."""
    node = graph.nodes[index]
    if node.op_type == "bias":
        weight = next(iter(skeleton.predecessors[index]), 0)
        return [weight, index] if graph.nodes[weight].bias == index else []
    return [index] if node.op_type == "conv" else []


def _is_pointwise(node: RawNode) -> bool:
    shape = node.weight.source.shape if node.weight is not None else ()
    return node.op_type == "conv" and (len(shape) == 2 or sum(size > 1 for size in shape) <= 2)


def build_graph(
    graph: RawGraph,
    skeleton: Skeleton,
    *,
    other_parameters: Iterable[ParameterSpec],
    buffers: Iterable[BufferSpec],
    warnings: Iterable[str] = (),
    unknown_operators: Iterable[str] = (),
) -> ArchitectureGraph:
    """The architecture graph of the kept nodes, whose tensors have got their specs."""
    place = {index: position for position, index in enumerate(skeleton.order)}
    readers: dict[int, list[int]] = {index: [] for index in skeleton.order}
    for index in skeleton.order:
        for item in skeleton.predecessors[index]:
            readers[item].append(index)
    roles = _attention_roles(graph, skeleton, place, readers)
    nodes = []
    for index in skeleton.order:
        raw = graph.nodes[index]
        nodes.append(
            Node(
                op_type=raw.op_type,
                name=raw.name,
                weight=raw.weight.spec if raw.weight is not None else None,
                norm_bias=raw.norm_bias.spec if raw.norm_bias is not None else None,
                kernel_shape=raw.window,
                is_head=index in skeleton.head,
                layer=_layer_attributes(graph, index, readers, roles) if raw.attributes else None,
            )
        )
    return ArchitectureGraph(
        nodes=tuple(nodes),
        edges=tuple(sorted((place[source], place[target]) for source in place for target in readers[source])),
        other_parameters=tuple(other_parameters),
        buffers=tuple(buffers),
        warnings=tuple(warnings),
        unknown_operators=tuple(unknown_operators),
    )


def _layer_attributes(
    graph: RawGraph, index: int, readers: Readers, roles: Mapping[int, AttentionRole]
) -> LayerAttributes:
    raw = graph.nodes[index]
    activation, normalized = _what_follows(graph, index, readers)
    role = roles.get(index)
    packed = 3 if role is not None and role.role == "query_key_value" else 1
    role = role if role is not None and role.heads > 0 else None  # a file may state any number
    return LayerAttributes(
        activation=activation, normalized=normalized, packed=packed, attention=role, **raw.attributes
    )


def _attention_roles(
    graph: RawGraph, skeleton: Skeleton, place: Mapping[int, int], readers: Readers
) -> dict[int, AttentionRole]:
    """What each linear layer next to an attention does in it; of those next to several, the last counts."""
    roles: dict[int, AttentionRole] = {}
    layer_of = {graph.nodes[index].bias: index for index in skeleton.order if graph.nodes[index].bias >= 0}
    attentions = (index for index in skeleton.order if graph.nodes[index].op_type == "msa")
    for number, index in enumerate(attentions, start=1):
        attention = graph.nodes[index]
        before = sorted(skeleton.predecessors[index], key=place.__getitem__)
        names = ["query", "key"]
        for end in before:
            layer = layer_of.get(end, end)
            weight = graph.nodes[layer].weight if graph.nodes[layer].is_linear else None
            if weight is None:
                continue
            out_axis = weight.permutation[0] if weight.permutation else 0
            if len(before) == 1:  # with queries, keys and values
                role = "query_key_value" if weight.source.shape[out_axis] % 3 == 0 else ""
            elif end in attention.values:
                role = "value"
            else:
                role = names.pop(0) if names else ""
            if role:
                roles[layer] = AttentionRole(number, attention.heads, role)
        for end in readers[index]:
            if graph.nodes[end].is_linear:
                roles[end] = AttentionRole(number, attention.heads, "output")
    return roles


def _what_follows(graph: RawGraph, index: int, readers: Readers) -> tuple[str, bool]:
    """The activation after a layer, looking through its bias, one norm and one sum, and whether a norm is between."""
    normalized = False
    sums = 0
    while True:
        raw = graph.nodes[index]
        normalized |= raw.op_type in _NORMS
        if raw.activation is not None:
            return raw.activation[1], normalized
        following = readers.get(index, [])
        passing = [item for item in following if graph.nodes[item].op_type in ("bias", "sum", *_NORMS)]
        if not passing or (len(following) > 1 and sums):
            return "", False
        index = min(passing, key=lambda item: (graph.nodes[item].level, graph.nodes[item].rank))
        kind = graph.nodes[index].op_type
        sums += kind == "sum"
        if sums > 1 or (kind in _NORMS and normalized):
            return "", False


def restrict_vocabulary(graph: ArchitectureGraph, op_types: Collection[str]) -> ArchitectureGraph:
    """Contracts every node whose type an older checkpoint does not know.

    Its predecessors are joined to its successors, and its tensors are initialised by their fallback rules. The graph
    comes back unchanged if there is no such node; ``input`` is among the ``op_types`` that are kept.
    """
    unknown = {index for index, node in enumerate(graph.nodes) if node.op_type not in op_types}
    if not unknown:
        return graph
    behind: list[set[int]] = [set() for _ in graph.nodes]  # known nodes that data comes from
    for source, target in graph.edges:
        behind[target] |= behind[source] if source in unknown else {source}
    place = {old: new for new, old in enumerate(index for index in range(graph.num_nodes) if index not in unknown)}
    edges = sorted((place[source], place[target]) for target in place for source in behind[target])
    lost = tuple(spec for index in sorted(unknown) for spec in graph.nodes[index].parameters)
    names = sorted({graph.nodes[index].op_type for index in unknown})
    warning = f"{len(unknown)} nodes of types this checkpoint does not know ({', '.join(names)}) were contracted."
    return dataclasses.replace(
        graph,
        nodes=tuple(graph.nodes[index] for index in place),
        edges=tuple(edges),
        other_parameters=(*graph.other_parameters, *lost),
        warnings=(*graph.warnings, warning),
    )


RESET_HEAD = ("classifier", "classifier_bias")
"""Fallback rules of a classifier's weight and bias that are not to be predicted."""


def reset_head(graph: ArchitectureGraph) -> ArchitectureGraph:
    """The graph with a classifier whose weights are drawn by a rule; unchanged where it ends in something else."""

    def reset(node: Node) -> Node:
        if not node.is_head or node.weight is None or math.prod(node.weight.torch_shape[2:]) > 1:
            return node
        rule = RESET_HEAD[node.op_type == "bias"]
        return dataclasses.replace(node, weight=dataclasses.replace(node.weight, fallback=rule))

    return dataclasses.replace(graph, nodes=tuple(map(reset, graph.nodes)))
