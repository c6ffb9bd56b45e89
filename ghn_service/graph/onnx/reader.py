"""ONNX bytes to an ``ArchitectureGraph``: the whole reading on one screen.

``load_file`` checks and flattens the model, the handlers of ``operators`` trace data through it into a raw graph,
``passes.simplify`` decides which nodes stay, ``parameters`` settles what each tensor is called and which node or
rule it belongs to, and this module puts the result together. See docs/graph.md.
"""

from __future__ import annotations

from ghn_service.errors import GhnServiceError
from ghn_service.graph.architecture import ArchitectureGraph, LayerAttributes, Node
from ghn_service.graph.onnx.context import ReadContext
from ghn_service.graph.onnx.file import load_file
from ghn_service.graph.onnx.limits import FIELD, invalid
from ghn_service.graph.onnx.operators import read_node
from ghn_service.graph.onnx.parameters import SettledTensors, settle_tensors
from ghn_service.graph.onnx.warnings import reading_warnings
from ghn_service.graph.passes import Skeleton, simplify
from ghn_service.graph.raw_graph import GraphLimits, RawGraph, RawNode

DEFAULT_LIMITS = GraphLimits()
_NORMS = ("bn", "ln")


def read_onnx(data: bytes, *, limits: GraphLimits = DEFAULT_LIMITS) -> ArchitectureGraph:
    """The architecture of an ONNX model.

    Weight values are ignored, wherever they are: in initializers, in external files (which are never opened), or
    nowhere, where initializers were emptied or turned into graph inputs.

    Args:
        data: A serialised ``onnx.ModelProto``.
        limits: The largest model that is read.

    Returns:
        The graph; every trainable float tensor of the file is in exactly one place of it.

    Raises:
        InvalidArchitectureError: The bytes are no well-formed ONNX model, or it has no trainable parameter.
        UnsupportedArchitectureError: The model is quantised, too new, or has layers inside control flow.
        LimitExceededError: The model is over a limit.
    """
    try:
        return _read(data, limits)
    except GhnServiceError as error:
        error.field = error.field or FIELD
        raise
    except UnicodeDecodeError as error:
        raise invalid("the model holds text that is not UTF-8") from error


def _read(data: bytes, limits: GraphLimits) -> ArchitectureGraph:
    context = ReadContext(load_file(data, limits), limits)
    for node in context.file.nodes:
        read_node(context, node)
    context.graph.outputs = [context.values[name].flow for name in context.file.outputs]
    skeleton = simplify(context.graph, limits)
    tensors = settle_tensors(context, skeleton)
    position = {index: place for place, index in enumerate(skeleton.order)}
    edges = sorted(
        (position[source], position[target]) for target in skeleton.order for source in skeleton.predecessors[target]
    )
    readers = _readers(skeleton)
    nodes = [_node(context.graph, index, skeleton, tensors, readers) for index in skeleton.order]
    graph = ArchitectureGraph(
        nodes=tuple(nodes),
        edges=tuple(edges),
        other_parameters=tuple(tensors.others),
        buffers=tuple(tensors.buffers),
        warnings=reading_warnings(context, tensors),
        unknown_operators=tuple(sorted(context.unknown_operators)),
    )
    if next(graph.parameters(), None) is None:
        raise invalid("the model has no trainable parameter, so there is nothing to predict")
    return graph


def _node(
    graph: RawGraph, index: int, skeleton: Skeleton, tensors: SettledTensors, readers: dict[int, list[int]]
) -> Node:
    raw = graph.nodes[index]
    return Node(
        op_type=raw.op_type,
        name=raw.name,
        weight=tensors.specs[id(raw.weight)] if raw.weight is not None else None,
        norm_bias=tensors.specs[id(raw.norm_bias)] if raw.norm_bias is not None else None,
        kernel_shape=raw.window if raw.op_type in ("max_pool", "avg_pool") else None,
        is_head=index in skeleton.head,
        layer=_layer(graph, index, raw, readers),
    )


def _layer(graph: RawGraph, index: int, raw: RawNode, readers: dict[int, list[int]]) -> LayerAttributes | None:
    if not raw.attributes:
        return None
    values = raw.attributes
    activation, normalized = _what_follows(graph, index, readers)
    return LayerAttributes(
        groups=_integer(values.get("groups", 1)),
        stride=_tuple(values.get("stride", ())),
        dilations=_tuple(values.get("dilations", ())),
        padding=_tuple(values.get("padding", ())),
        activation=activation,
        normalized=normalized,
        packed=_packed(graph, index, readers),
        positions=_integer(values.get("positions", 0)),
    )


def _what_follows(graph: RawGraph, index: int, readers: dict[int, list[int]]) -> tuple[str, bool]:
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


def _packed(graph: RawGraph, index: int, readers: dict[int, list[int]]) -> int:
    """3 for a linear layer that alone feeds an attention with queries, keys and values."""
    end = graph.nodes[index].bias if graph.nodes[index].bias >= 0 else index
    use = graph.nodes[index].weight
    for reader in readers.get(end, ()):
        is_only_source = graph.nodes[reader].op_type == "msa" and graph.nodes[reader].predecessors == {end}
        if is_only_source and use is not None and graph.nodes[index].is_linear:
            out_axis = use.permutation[0] if use.permutation else 0
            return 3 if use.source.shape[out_axis] % 3 == 0 else 1
    return 1


def _readers(skeleton: Skeleton) -> dict[int, list[int]]:
    readers: dict[int, list[int]] = {}
    for index in skeleton.order:
        for item in skeleton.predecessors[index]:
            readers.setdefault(item, []).append(index)
    return readers


def _integer(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else 0


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else ()
