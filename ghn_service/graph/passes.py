"""What turns the raw graph into nodes and edges: tied weights, dead ends, gates, pools, contraction, the head.

Each pass does one thing to a ``RawGraph`` and is described by its first sentence; ``simplify`` runs them in order.
Legend: a raw node is *kept* if it becomes a node of the architecture graph; the others are contracted, which joins
each of their predecessors to each of their successors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.raw_graph import GraphLimits, RawGraph, RawNode, exceeded

_MEETINGS = ("sum", "concat")


@dataclass(slots=True)
class Skeleton:
    """Kept raw nodes in topological order with their kept predecessors.

    Attributes:
        order: Indices of raw nodes; the input is first, the head last.
        predecessors: Per raw node, the kept nodes that data comes from.
        head: Indices of the classifier's weight and, where it has one, its bias.
    """

    order: list[int]
    predecessors: dict[int, set[int]]
    head: list[int] = field(default_factory=list)


def simplify(graph: RawGraph, limits: GraphLimits) -> Skeleton:
    """Runs all passes.

    Raises:
        LimitExceededError: The result has too many nodes or edges.
    """
    merge_tied(graph)
    live = find_live(graph)
    successors = _successors(graph, live)
    dropped = drop_final_softmax(graph, live, successors)
    dropped |= mark_squeezes(graph, live, successors)
    classify_average_pools(graph, live, successors)
    skeleton = contract(graph, live, dropped, limits)
    outputs = _kept_outputs(graph, skeleton, dropped)
    move_final_pool(graph, skeleton, outputs)
    place_head(graph, skeleton, outputs)
    return skeleton


def merge_tied(graph: RawGraph) -> None:
    """Unites raw nodes that stand for the same weight, without making a cycle.

    The node stands at the first use (the lowest level). What reads a later use reads this node instead. What a later
    use reads is read by this node too where it comes before it; otherwise data passes the later use.
    """
    replaced = _later_uses(graph)
    if not replaced:
        return
    passing: dict[int, set[int]] = {}

    def resolved(items: Iterable[int]) -> set[int]:
        result: set[int] = set()
        for item in items:
            result.add(replaced.get(item, item))
            result |= passing.get(item, set())
        graph.spend(len(result))
        return result

    order = sorted(range(len(graph.nodes)), key=lambda index: _place(graph, index))
    for index in order:
        node = graph.nodes[index]
        found = resolved(node.predecessors)
        node.gate, node.feature = frozenset(resolved(node.gate)), frozenset(resolved(node.feature))
        target = replaced.get(index, index)
        if target == index:
            node.predecessors |= found
            node.predecessors -= replaced.keys()
        else:
            earlier = {item for item in found if _place(graph, item) < _place(graph, target)}
            graph.nodes[target].predecessors |= earlier
            passing[index] = found - earlier - {target}
    graph.outputs = [frozenset(resolved(flow)) for flow in graph.outputs]


def _place(graph: RawGraph, index: int) -> tuple[int, int]:
    return graph.nodes[index].level, graph.nodes[index].rank


def _later_uses(graph: RawGraph) -> dict[int, int]:
    """First use by later use, for raw nodes that stand for the same weight."""
    groups: dict[tuple[int, str], list[int]] = {}
    for index, node in enumerate(graph.nodes):
        if node.weight is not None:
            groups.setdefault(node.weight.key, []).append(index)
    replaced: dict[int, int] = {}
    for members in groups.values():
        if len(members) > 1:
            first = min(members, key=lambda index: _place(graph, index))
            replaced.update((index, first) for index in members if index != first)
    return replaced


def find_live(graph: RawGraph) -> set[int]:
    """The raw nodes that an output depends on."""
    live = set().union(*graph.outputs) | {0}
    waiting = list(live)
    while waiting:
        for index in graph.nodes[waiting.pop()].predecessors:
            if index not in live:
                live.add(index)
                waiting.append(index)
    return live


def drop_final_softmax(graph: RawGraph, live: set[int], successors: dict[int, list[int]]) -> set[int]:
    """A softmax that weighs nothing and that nothing reads is the end of a classifier, not attention."""
    return {
        index
        for index in live
        if graph.nodes[index].op_type == "msa" and not graph.nodes[index].is_attention and not successors.get(index)
    }


def mark_squeezes(graph: RawGraph, live: set[int], successors: dict[int, list[int]]) -> set[int]:
    """Global pools that only feed the gate of a squeeze-and-excitation block have no node.

    From each gate, the pass walks back over nodes all of whose successors lie on the gate's branch, up to the pool.
    """
    squeezes: set[int] = set()
    for gate in (index for index in live if graph.nodes[index].op_type == "cse"):
        raw = graph.nodes[gate]
        branch = {gate}
        waiting = sorted(raw.gate - raw.feature)
        while waiting:
            index = waiting.pop()
            if index in branch or index == 0 or not branch.issuperset(successors.get(index, ())):
                continue
            branch.add(index)
            if graph.nodes[index].op_type == "glob_avg":
                squeezes.add(index)
            else:
                waiting.extend(graph.nodes[index].predecessors)
    return squeezes


def classify_average_pools(graph: RawGraph, live: set[int], successors: dict[int, list[int]]) -> None:
    """Average pools that came from adaptive pooling are ``glob_avg``.

    The exporter's module class tells, where the file has it. Otherwise a 1x1 window tells, or windows that tile the
    input (or cover it) right before a fully connected layer or the output.
    """
    for index in live:
        node = graph.nodes[index]
        if node.op_type != "avg_pool":
            continue
        adaptive = node.from_adaptive
        if adaptive is None:
            readers = [graph.nodes[item] for item in successors.get(index, ())]
            ends_features = all(reader.is_linear for reader in readers)
            adaptive = node.window == (1, 1) or (node.covers_input and ends_features)
        if adaptive:
            node.op_type, node.window = "glob_avg", None


def contract(graph: RawGraph, live: set[int], dropped: set[int], limits: GraphLimits) -> Skeleton:
    """Removes the nodes that do not stay; sums and concatenations stay if two or more nodes still meet in them.

    Raises:
        LimitExceededError: The result has too many nodes or edges.
    """
    order = sorted(live, key=lambda index: (graph.nodes[index].level, graph.nodes[index].rank, index))
    kept: list[int] = []
    stays: set[int] = set()
    predecessors: dict[int, set[int]] = {}
    num_edges = 0
    for index in order:
        found: set[int] = set()
        for item in graph.nodes[index].predecessors:
            if item in stays:
                found.add(item)
            else:
                found |= predecessors[item]
        graph.spend(len(found))
        predecessors[index] = found
        if index in dropped or (graph.nodes[index].op_type in _MEETINGS and len(found) < 2):
            continue
        stays.add(index)
        kept.append(index)
        num_edges += len(found)
        if len(kept) > limits.max_graph_nodes:
            raise exceeded("graph nodes", f"over {len(kept) - 1}", limits.max_graph_nodes)
        if num_edges > limits.max_edges:
            raise exceeded("edges", f"over {num_edges - 1}", limits.max_edges)
    for index in kept:
        if not predecessors[index] and index and graph.nodes[index].op_type != "pos_enc":
            predecessors[index] = {0}
    return Skeleton(kept, predecessors)


def move_final_pool(graph: RawGraph, skeleton: Skeleton, outputs: list[set[int]]) -> None:
    """A global pool that ends the network moves in front of the 1x1 convolution that is its classifier.

    ``... -> weight -> bias -> pool`` becomes ``... -> pool -> weight -> bias``.
    """
    if not outputs or len(outputs[0]) != 1:
        return
    pool = next(iter(outputs[0]))
    if graph.nodes[pool].op_type != "glob_avg":
        return
    layer = _layer_before(graph, skeleton, pool)
    if not layer or not _is_pointwise(graph.nodes[layer[0]]):
        return
    first, last = layer[0], layer[-1]
    if any(
        last in found for index, found in skeleton.predecessors.items() if index != pool and index in skeleton.order
    ):
        return
    skeleton.predecessors[pool] = skeleton.predecessors[first]
    skeleton.predecessors[first] = {pool}
    skeleton.order.remove(pool)
    skeleton.order.insert(skeleton.order.index(first), pool)
    outputs[0] = {last}


def place_head(graph: RawGraph, skeleton: Skeleton, outputs: list[set[int]]) -> None:
    """Finds the classifier and puts its weight and bias last.

    The classifier is the fully connected layer, or 1x1 convolution, whose result is the network's first output; nothing
    else may read it.
    """
    if not outputs or len(outputs[0]) != 1:
        return
    head = _layer_ending(graph, skeleton, next(iter(outputs[0])))
    if not head or not (graph.nodes[head[0]].is_linear or _is_pointwise(graph.nodes[head[0]])):
        return
    members = set(head)
    for index in skeleton.order:
        if index not in members and members & skeleton.predecessors[index]:
            return
    skeleton.head = head
    skeleton.order = [index for index in skeleton.order if index not in members] + head


def _layer_before(graph: RawGraph, skeleton: Skeleton, index: int) -> list[int]:
    found = skeleton.predecessors[index]
    return _layer_ending(graph, skeleton, next(iter(found))) if len(found) == 1 else []


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


def _kept_outputs(graph: RawGraph, skeleton: Skeleton, dropped: set[int]) -> list[set[int]]:
    kept = set(skeleton.order)
    outputs = []
    for flow in graph.outputs:
        found: set[int] = set()
        for index in flow:
            found |= {index} if index in kept else skeleton.predecessors[index]
        outputs.append(found)
    return outputs


def _successors(graph: RawGraph, live: set[int]) -> dict[int, list[int]]:
    successors: dict[int, list[int]] = {}
    for index in sorted(live):
        for item in graph.nodes[index].predecessors:
            successors.setdefault(item, []).append(index)
    return successors


def restrict_vocabulary(graph: ArchitectureGraph, op_types: Collection[str]) -> ArchitectureGraph:
    """Contracts every node whose type is not in ``op_types``.

    Its predecessors are joined to its successors, and its tensors are initialised by their fallback rules. The graph
    comes back unchanged if there is no such node.

    Args:
        graph: The architecture.
        op_types: Names of the types to keep; ``input`` is among them.
    """
    unknown = [index for index, node in enumerate(graph.nodes) if node.op_type not in op_types]
    if not unknown:
        return graph
    predecessors: list[set[int]] = [set() for _ in graph.nodes]
    successors: list[set[int]] = [set() for _ in graph.nodes]
    for source, target in graph.edges:
        predecessors[target].add(source)
        successors[source].add(target)
    for index in unknown:
        for source in predecessors[index]:
            successors[source] = (successors[source] - {index}) | successors[index]
        for target in successors[index]:
            predecessors[target] = (predecessors[target] - {index}) | predecessors[index]
    removed = set(unknown)
    place = {old: new for new, old in enumerate(index for index in range(graph.num_nodes) if index not in removed)}
    edges = sorted((place[source], place[target]) for source in place for target in successors[source])
    lost = tuple(spec for index in unknown for spec in graph.nodes[index].parameters)
    names = sorted({graph.nodes[index].op_type for index in unknown})
    warning = f"{len(unknown)} nodes of types this checkpoint does not know ({', '.join(names)}) were contracted."
    return dataclasses.replace(
        graph,
        nodes=tuple(graph.nodes[index] for index in place),
        edges=tuple(edges),
        other_parameters=(*graph.other_parameters, *lost),
        warnings=(*graph.warnings, warning),
    )
