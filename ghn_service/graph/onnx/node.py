"""One ONNX node, and all nodes of a model in one list with its functions expanded.

Values keep their names; inside an expanded function they get a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from ghn_service.graph.onnx.limits import (
    GRAPH_TYPES,
    ONNX_DOMAINS,
    FunctionKey,
    called_key,
    function_key,
    invalid,
    is_text,
    subgraphs,
)

_MAX_PREFIX = 200


@dataclass(slots=True)
class OnnxNode:
    """One node: its operator, the names of its values, and access to its attributes."""

    op_type: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    name: str
    proto: onnx.NodeProto
    bindings: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The node's name, or that of its first output where it has none."""
        return self.name or next((name for name in self.outputs if name), self.op_type)

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        """The attribute ``name``, resolved through the function call that this node came from."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                if attribute.ref_attr_name:
                    return self.bindings.get(attribute.ref_attr_name)
                return attribute
        return None

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.attribute(name)
        return default if attribute is None else attribute.i

    def real(self, name: str, default: float) -> float:
        """A floating-point attribute, or ``default`` if the operator has none of this name."""
        found = self.attribute(name)
        return default if found is None else found.f

    def integers(self, name: str) -> tuple[int, ...]:
        """A list-of-integers attribute; empty if it is absent."""
        attribute = self.attribute(name)
        return () if attribute is None else tuple(attribute.ints)

    def text(self, name: str) -> str:
        """A string attribute; "" if it is absent."""
        attribute = self.attribute(name)
        return "" if attribute is None else attribute.s.decode("utf-8", "replace")

    def metadata(self) -> dict[str, str]:
        """The metadata that the exporter wrote on the node."""
        return {entry.key: entry.value for entry in self.proto.metadata_props if is_text(entry.value)}


@dataclass(slots=True)
class _Frame:
    """A body that is being expanded: its nodes still to come, and how its names read outside."""

    nodes: Iterator[onnx.NodeProto]
    names: Mapping[str, str]
    prefix: str
    bindings: Mapping[str, onnx.AttributeProto]


def flat_nodes(model: onnx.ModelProto) -> Iterator[OnnxNode]:
    """The nodes of the main graph in order, each call of a local function replaced by the function's nodes."""
    functions: dict[FunctionKey, onnx.FunctionProto] = {function_key(item): item for item in model.functions}
    stack = [_Frame(iter(model.graph.node), {}, "", {})]
    expansions = 0
    while stack:
        frame = stack[-1]
        proto = next(frame.nodes, None)
        if proto is None:
            stack.pop()
            continue
        node = _read_node(proto, frame)
        function = functions.get(called_key(proto)) if functions else None
        if function is None:
            yield node
        else:
            expansions += 1
            prefix = f"{node.label}#{expansions}/"
            stack.append(_enter(function, node, prefix if len(prefix) < _MAX_PREFIX else f"#{expansions}/"))


def _read_node(proto: onnx.NodeProto, frame: _Frame) -> OnnxNode:
    inputs, outputs, name = list(proto.input), list(proto.output), proto.name
    if not (is_text(name) and is_text(proto.op_type) and is_text(proto.domain)):
        raise invalid(f"the name or operator of node {name!r} ({proto.op_type!r}) is not valid UTF-8")
    for attribute in proto.attribute:
        if attribute.type in GRAPH_TYPES:
            inputs.extend(name for graph in subgraphs(proto) for name in _captured(graph))
            break
    if frame.prefix:
        inputs = [frame.names.get(item, frame.prefix + item) if item else "" for item in inputs]
        outputs = [frame.names.get(item, frame.prefix + item) if item else "" for item in outputs]
        name = frame.prefix + name
    domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
    return OnnxNode(proto.op_type, domain, inputs, outputs, name, proto, frame.bindings)


def _enter(function: onnx.FunctionProto, call: OnnxNode, prefix: str) -> _Frame:
    if len(call.inputs) > len(function.input) or len(call.outputs) > len(function.output):
        raise invalid(f"node {call.label!r} passes more values than the function {function.name!r} has")
    names = dict(zip(function.input, call.inputs + [""] * len(function.input), strict=False))
    names.update((inner, outer) for inner, outer in zip(function.output, call.outputs, strict=False) if outer)
    bindings = {item.name: item for item in function.attribute_proto}
    for attribute in call.proto.attribute:
        resolved = call.attribute(attribute.name)
        if resolved is not None:
            bindings[attribute.name] = resolved
    return _Frame(iter(function.node), names, prefix, bindings)


def _captured(graph: onnx.GraphProto) -> list[str]:
    """Names that a subgraph reads from outside."""
    defined = {tensor.name for tensor in graph.initializer} | {info.name for info in graph.input}
    found: dict[str, None] = {}
    for node in graph.node:
        names = list(node.input)
        for inner in subgraphs(node):
            names.extend(_captured(inner))
        found.update((name, None) for name in names if name and name not in defined)
        defined.update(node.output)
    found.update((info.name, None) for info in graph.output if info.name and info.name not in defined)
    return list(found)
