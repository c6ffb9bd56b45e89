"""What an ONNX model may be before anything reads it: sizes, nesting, function expansion, versions.

Everything here runs on bytes of strangers. It walks the protobuf message once, allocates nothing in proportion to a
number that the message merely claims, opens no file, and raises typed errors. The structure of the dataflow itself
(order, dangling names, cycles) is checked by ``file.load_file``.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError

from ghn_service.errors import InvalidArchitectureError, UnsupportedArchitectureError
from ghn_service.graph.raw_graph import GraphLimits, exceeded

FIELD = "architecture.onnx_model"
ONNX_DOMAINS = ("", "ai.onnx")
FunctionKey = tuple[str, str, str]
GRAPH_TYPES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

_UNSAFE_NAMES = frozenset({"__metadata__"})
_LARGEST_COUNT = 2**63 - 1
_COUNT_CEILING = 10**12


def invalid(message: str) -> InvalidArchitectureError:
    """An error about the uploaded model."""
    return InvalidArchitectureError(message, field=FIELD)


def unsupported(message: str) -> UnsupportedArchitectureError:
    """An error about a part of the uploaded model that has no meaning here."""
    return UnsupportedArchitectureError(message, field=FIELD)


def parse_model(data: bytes, limits: GraphLimits) -> onnx.ModelProto:
    """The model message, checked for size, versions, nesting and expansion.

    Raises:
        InvalidArchitectureError: The bytes are no ONNX model, or a function calls itself.
        UnsupportedArchitectureError: The IR or operator set is newer than the installed onnx package.
        LimitExceededError: The model is over a limit.
    """
    if not data:
        raise invalid("expected a serialised onnx.ModelProto, got no bytes")
    if len(data) > limits.max_bytes:
        raise exceeded("bytes", len(data), limits.max_bytes)
    try:
        model = onnx.ModelProto.FromString(bytes(data))
    except DecodeError as error:
        raise invalid(
            "expected a serialised onnx.ModelProto; the bytes are damaged, cut short, nested too deeply, or no model"
        ) from error
    _check_versions(model)
    _check_counts(model.graph, limits)
    check_expansion(model, limits)
    return model


def checked_shape(name: str, dims: tuple[int, ...], limits: GraphLimits) -> int:
    """The number of elements of a tensor of shape ``dims``; 0 for an empty one.

    Raises:
        InvalidArchitectureError: A size is negative or the product overflows 64 bits.
        LimitExceededError: The product is over ``max_parameters``.
    """
    count = 1
    for size in dims:
        if size < 0:
            raise invalid(f"tensor {name!r} has shape {dims}; a size must not be negative")
        count *= size
        if count > _LARGEST_COUNT:
            raise invalid(f"tensor {name!r} has shape {dims}; its number of elements overflows 64 bits")
    if count > limits.max_parameters:
        raise exceeded(f"elements in tensor {name!r}", count, limits.max_parameters)
    return count


def is_text(value: object) -> bool:
    """Whether a protobuf string is one: text that is not UTF-8 is handed out as bytes."""
    return isinstance(value, str)


def check_name(name: str, limits: GraphLimits) -> None:
    """Refuses tensor names that cannot be keys of a reply.

    Raises:
        InvalidArchitectureError: The name is reserved, too long, or holds a NUL.
    """
    if not is_text(name):
        raise invalid(f"the tensor name {name!r} is not valid UTF-8; rename it")
    if name in _UNSAFE_NAMES:
        raise invalid(f"a tensor is called {name!r}, which is reserved in safetensors files; rename it")
    if len(name) > limits.max_name_bytes or len(name.encode("utf-8", "replace")) > limits.max_name_bytes:
        raise invalid(f"a tensor name starting {name[:40]!r} has over {limits.max_name_bytes} bytes; shorten it")
    if "\0" in name:
        raise invalid(f"the tensor name {name!r} holds a NUL character; rename it")


def function_key(function: onnx.FunctionProto) -> FunctionKey:
    """Identity of a model-local function."""
    return function.domain, function.name, function.overload


def called_key(node: onnx.NodeProto) -> FunctionKey:
    """Identity of the function that ``node`` would call."""
    return node.domain, node.op_type, node.overload


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def check_expansion(model: onnx.ModelProto, limits: GraphLimits) -> None:
    """Counts the nodes of the model with every local function expanded, without expanding any.

    The count of a function is the sum over its nodes, so one pass over the call graph in dependency order suffices,
    however many expansions there are.

    Raises:
        InvalidArchitectureError: A function is defined twice or calls itself, or subgraphs nest too deeply.
        LimitExceededError: There are more than ``max_nodes``.
    """
    functions = {function_key(function): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise invalid("a model-local function is defined more than once")
    own: dict[FunctionKey, int] = {}
    calls: dict[FunctionKey, list[FunctionKey]] = {}
    for key, function in functions.items():
        own[key], calls[key] = _count_nodes(function.node, functions, limits)
    totals: dict[FunctionKey, int] = {}
    for key in _callees_first(calls):
        totals[key] = min(_COUNT_CEILING, own[key] + sum(totals[callee] for callee in calls[key]))
    count, called = _count_nodes(model.graph.node, functions, limits)
    total = count + sum(totals[callee] for callee in called)
    if total > limits.max_nodes:
        raise exceeded("nodes", total if total < _COUNT_CEILING else "over 10^12", limits.max_nodes)


def _callees_first(calls: dict[FunctionKey, list[FunctionKey]]) -> list[FunctionKey]:
    waiting = {key: len(set(callees)) for key, callees in calls.items()}
    callers: dict[FunctionKey, list[FunctionKey]] = {key: [] for key in calls}
    for key, callees in calls.items():
        for callee in set(callees):
            callers[callee].append(key)
    ready = [key for key, count in waiting.items() if count == 0]
    for key in ready:
        for caller in callers[key]:
            waiting[caller] -= 1
            if waiting[caller] == 0:
                ready.append(caller)
    if len(ready) < len(calls):
        name = next(key for key in calls if key not in set(ready))[1]
        raise invalid(f"the model-local function {name!r} calls itself, directly or through others")
    return ready


def _count_nodes(
    nodes: object, functions: dict[FunctionKey, onnx.FunctionProto], limits: GraphLimits
) -> tuple[int, list[FunctionKey]]:
    count = 0
    called: list[FunctionKey] = []
    waiting = [(nodes, 0)]
    while waiting:
        body, depth = waiting.pop()
        if depth > limits.max_subgraph_depth:
            raise invalid(f"subgraphs nest over {limits.max_subgraph_depth} deep")
        for node in body:  # type: ignore[attr-defined]
            count += 1
            if functions and called_key(node) in functions:
                called.append(called_key(node))
            for attribute in node.attribute:
                if attribute.type in GRAPH_TYPES:
                    waiting.extend((graph.node, depth + 1) for graph in subgraphs(node))
                    break
        if count > limits.max_nodes:
            raise exceeded("or more nodes", count, limits.max_nodes)
    return count, called


def _check_versions(model: onnx.ModelProto) -> None:
    if model.ir_version < 1:
        raise invalid("the model has no ir_version, so it is not a complete onnx.ModelProto")
    if model.ir_version > onnx.IR_VERSION:
        raise unsupported(
            f"the model has ir_version {model.ir_version}; this server reads up to {onnx.IR_VERSION}:"
            " export it with an older one"
        )
    if not model.graph.node:
        raise invalid("the model's graph has no nodes")
    newest = onnx.defs.onnx_opset_version()
    versions = [entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS]
    if not versions or min(versions) < 1:
        raise invalid("the model imports no version of the standard operator set")
    if max(versions) > newest:
        raise unsupported(
            f"the model uses operator set {max(versions)}; this server reads up to {newest}: export with an older one"
        )


def _check_counts(graph: onnx.GraphProto, limits: GraphLimits) -> None:
    if len(graph.node) > limits.max_nodes:
        raise exceeded("nodes", len(graph.node), limits.max_nodes)
    tensors = len(graph.initializer) + len(graph.input)
    if tensors > 2 * limits.max_tensors or len(graph.initializer) > limits.max_tensors:
        raise exceeded("tensors", tensors, limits.max_tensors)
    if not graph.output:
        raise invalid("the model's graph has no outputs")
    if graph.sparse_initializer:
        raise unsupported("the model has sparse initializers; export it with dense ones")
