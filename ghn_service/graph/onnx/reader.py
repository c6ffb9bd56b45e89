"""ONNX bytes to an ``ArchitectureGraph``: the whole reading on one screen. See docs/hypernetworks.md."""

from __future__ import annotations

from collections.abc import Callable

from ghn_service.errors import GhnServiceError, InvalidArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.file import load_file
from ghn_service.graph.onnx.operators import ANY_NUMBER, INPUT_COUNTS, OPERATORS, read_unknown
from ghn_service.graph.onnx.parameters import reading_warnings, settle_tensors
from ghn_service.graph.onnx.values import ReadContext
from ghn_service.graph.passes import build_graph, simplify
from ghn_service.graph.raw_graph import CHECK_EVERY, GraphLimits, never_ends

FIELD = "architecture.onnx_model"
DEFAULT_LIMITS = GraphLimits()


def read_onnx(
    data: bytes, *, limits: GraphLimits = DEFAULT_LIMITS, check: Callable[[], None] = never_ends
) -> ArchitectureGraph:
    """The architecture of an ONNX model.

    Weight values are ignored, wherever they are: in initializers, in external files (which are never opened), or
    nowhere, where initializers were emptied or turned into graph inputs.

    Args:
        data: A serialised ``onnx.ModelProto``.
        limits: The largest model that is read.
        check: Called every few milliseconds; what it raises ends the reading.

    Returns:
        The graph; every trainable float tensor of the file is in exactly one place of it.

    Raises:
        InvalidArchitectureError: The bytes are no well-formed ONNX model, or it has no trainable parameter.
        UnsupportedArchitectureError: The model is quantised, too new, or has layers inside control flow.
        LimitExceededError: The model is over a limit.
    """
    try:
        file = load_file(data, limits, check)
        for node in file.nodes:
            fewest, most = INPUT_COUNTS.get((node.domain, node.op_type), (0, ANY_NUMBER))
            count = len(node.proto.input)  # without what subgraphs read
            if not fewest <= count <= most or not node.outputs:
                raise InvalidArchitectureError(
                    f"node {node.label!r} ({node.op_type}) has {count} inputs and {len(node.outputs)} outputs; expected"
                    f" {fewest} to {most} and at least 1"
                )
        context = ReadContext(file, limits, check)
        num_unchecked = CHECK_EVERY
        for node in file.nodes:
            num_unchecked += 1 + len(node.inputs)
            if num_unchecked > CHECK_EVERY:
                num_unchecked = 0
                check()
            context.read(node, OPERATORS.get((node.domain, node.op_type), read_unknown))
        context.graph.outputs = list(dict.fromkeys(context.values[name].flow for name in context.file.outputs))
        skeleton = simplify(context.graph, limits)
        others, buffers = settle_tensors(context, skeleton)
        graph = build_graph(
            context.graph,
            skeleton,
            other_parameters=others,
            buffers=buffers,
            warnings=reading_warnings(context),
            unknown_operators=sorted(context.unknown_operators),
        )
        if next(graph.parameters(), None) is None:
            raise InvalidArchitectureError("the model has no trainable parameter, so there is nothing to predict")
    except GhnServiceError as error:
        error.field = error.field or FIELD
        raise
    except UnicodeDecodeError as error:
        raise InvalidArchitectureError("the model holds text that is not UTF-8", field=FIELD) from error
    return graph
