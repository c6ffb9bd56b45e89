"""An ONNX model as a flat list of nodes over named values: parsed, checked, functions expanded.

Everything here runs on bytes of strangers. It walks the protobuf message once, allocates nothing in proportion to a
number that the message merely claims, opens no file, and raises typed errors. Values keep their names; inside an
expanded function they get a prefix. Tensor data is never touched, except that ``OnnxFile.integers`` reads up to 64
inline integers (axes and target shapes), and ``OnnxFile.content`` makes digests of inline constants. External data is
never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import numpy
import onnx
from google.protobuf.message import DecodeError

from ghn_service.errors import InvalidArchitectureError, UnsupportedArchitectureError
from ghn_service.graph.onnx.folded import FOLDED_KEY, folded_parameters, string_list
from ghn_service.graph.onnx.wire import MOST_BYTES_PER_BYTE, parsed_bytes
from ghn_service.graph.raw_graph import CHECK_EVERY, MAX_RANK, GraphLimits, exceeded, never_ends

PARAMETERS_KEY = "ghn.parameters"
BUFFERS_KEY = "ghn.buffers"
CONTENTS_KEY = "ghn.contents"
FLOAT = onnx.TensorProto.FLOAT
FLOAT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
)
_INTEGER_DTYPES: dict[int, str] = {onnx.TensorProto.INT64: "<i8", onnx.TensorProto.INT32: "<i4"}
_FLOAT_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "<f4",
    onnx.TensorProto.DOUBLE: "<f8",
    onnx.TensorProto.FLOAT16: "<f2",
}
_MAX_INTEGERS = 64
_MAX_TEXT = 1024
_MAX_PREFIX = 200
_MAX_NODE_BYTES = 2**16
_TRACED_KEY = "pkg.torch.onnx.original_node_name"
_KIND_KEY = "pkg.torch.export.graph_signature.InputSpec.kind"
_DOMAINS = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
_FunctionKey = tuple[str, str, str]
_GRAPH_TYPES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(slots=True)
class OnnxNode:
    """One node: its operator, the names of its values, and its attributes.

    Attributes:
        op_type: The operator; with its domain in front (``zz::Relu``) unless that is the standard's or ONNX Runtime's.
        domain: The operator's domain; "" for the standard's.
        attributes: Attributes by name, those of a function's node resolved through the call that it came from.
    """

    op_type: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    name: str
    proto: onnx.NodeProto
    attributes: dict[str, onnx.AttributeProto]

    @property
    def label(self) -> str:
        """The node's name, or that of its first output where it has none."""
        return self.name or next((name for name in self.outputs if name), self.op_type)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute, or ``default`` where it is absent."""
        return self.attributes[name].i if name in self.attributes else default

    def integers(self, name: str) -> tuple[int, ...]:
        """A list-of-integers attribute; empty if it is absent.

        Raises:
            LimitExceededError: It has more than two for each axis that a tensor may have.
        """
        values = self.attributes[name].ints if name in self.attributes else ()
        if len(values) > 2 * MAX_RANK:
            raise exceeded(f"integers in {name!r} of node {self.label!r}", len(values), 2 * MAX_RANK)
        return tuple(values)

    def text(self, name: str) -> str:
        """The first kilobyte of a string attribute; "" if it is absent."""
        return self.attributes[name].s[:_MAX_TEXT].decode("utf-8", "replace") if name in self.attributes else ""


@dataclass(slots=True)
class TensorHeader:
    """Type and shape of a tensor; ``shape`` is None where a size is symbolic or unknown."""

    name: str
    data_type: int
    shape: tuple[int, ...] | None


@dataclass(slots=True)
class OnnxFile:
    """A checked model, ready for reading.

    Attributes:
        nodes: All nodes, each after the nodes that it reads.
        inputs: Graph inputs that have no initializer, in order.
        outputs: Names of the graph outputs.
        initializers: Headers of the initializers.
        kinds: ``PARAMETER`` or ``BUFFER`` for values that the exporter or the client declared as such.
        traced_names: Parameter by its name in the program that torch's exporter traced.
        folded: Parameters that the exporter computed an initializer from; empty for what it computed from none.
        is_torch: Whether one of torch's exporters wrote the file.
        value_shapes: Protos with the shapes of intermediate values and outputs, where the file has them.
        tensors: Protos of the initializers.
        producers: The node that writes each value.
        contents: What buffers and constants hold whose values the client took out: one number, or a digest.
    """

    nodes: list[OnnxNode]
    inputs: list[TensorHeader]
    outputs: list[str]
    initializers: dict[str, TensorHeader]
    kinds: dict[str, str]
    traced_names: dict[str, str]
    folded: dict[str, tuple[str, ...]]
    is_torch: bool
    value_shapes: dict[str, onnx.ValueInfoProto]
    tensors: dict[str, onnx.TensorProto]
    producers: dict[str, OnnxNode]
    contents: dict[str, str]

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The integers that the value ``name`` holds, if it is a small inline constant."""
        tensor = self.tensors.get(name)
        if tensor is None:
            producer = self.producers.get(name)
            attributes = producer.attributes if producer is not None and producer.op_type == "Constant" else {}
            if "value_int" in attributes:
                return (attributes["value_int"].i,)
            if "value_ints" in attributes:
                return tuple(attributes["value_ints"].ints[:_MAX_INTEGERS])
            if "value" not in attributes:
                return None
            tensor = attributes["value"].t
        dtype = _INTEGER_DTYPES.get(tensor.data_type)
        if dtype is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        count = math.prod(tensor.dims)
        if not 0 <= count <= _MAX_INTEGERS:
            return None
        if tensor.raw_data:
            if len(tensor.raw_data) != count * numpy.dtype(dtype).itemsize:
                return None
            return tuple(numpy.frombuffer(tensor.raw_data, dtype=dtype).tolist())
        values = tensor.int64_data if tensor.data_type == onnx.TensorProto.INT64 else tensor.int32_data
        return tuple(values) if len(values) == count else None

    def content(self, name: str) -> str:
        """What a buffer or constant holds, to compare it with others: one number, or a digest; "" where unknown."""
        if name in self.contents:
            return self.contents[name]
        tensor = self.tensors.get(name)
        attributes = self.producers[name].attributes if tensor is None and name in self.producers else {}
        if "value" in attributes:
            tensor = attributes["value"].t
        if tensor is None:
            data = b"".join(item.SerializeToString() for item in attributes.values())
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            return ""
        elif tensor.raw_data:
            data = tensor.raw_data
        elif tensor.data_type == onnx.TensorProto.FLOAT:
            data = numpy.array(tensor.float_data, dtype="<f4").tobytes()
        else:
            data = repr([*tensor.int32_data, *tensor.int64_data, *tensor.double_data]).encode() if tensor.dims else b""
        is_node = name not in self.tensors  # of which an expanded function has many
        if not data or (is_node and len(data) > _MAX_NODE_BYTES):
            return ""
        if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and data == data[:4] * (len(data) // 4):
            return f"all {float(numpy.frombuffer(data[:4], '<f4')[0]):.9g}"
        return hashlib.sha256(data).hexdigest()[:32]

    def value_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the file states for a value, if it states a fixed one."""
        info = self.value_shapes.get(name)
        return None if info is None else _static_shape(info)


def constant_number(node: OnnxNode) -> float | None:
    """The single float that a Constant node holds, if it is inline."""
    attribute = node.attributes.get("value_float")
    if attribute is not None:
        return float(attribute.f)
    tensor = node.attributes["value"].t if "value" in node.attributes else None
    dtype = None if tensor is None else _FLOAT_DTYPES.get(tensor.data_type)
    if tensor is None or dtype is None or math.prod(tensor.dims) != 1:
        return None
    if len(tensor.raw_data) == numpy.dtype(dtype).itemsize:
        return float(numpy.frombuffer(tensor.raw_data, dtype=dtype)[0])
    values = tensor.float_data or tensor.double_data
    return float(values[0]) if len(values) == 1 else None


def load_file(data: bytes, limits: GraphLimits, check: Callable[[], None] = never_ends) -> OnnxFile:
    """Parses and checks a model; ``check`` is called every few milliseconds and may raise.

    Raises:
        InvalidArchitectureError: The bytes are no well-formed model, or a function calls itself.
        UnsupportedArchitectureError: The IR or operator set is newer than the installed onnx package.
        LimitExceededError: The model is over a limit.
    """
    model = _parse(data, limits, check)
    graph = model.graph
    _check_names((tensor.name for tensor in graph.initializer), limits)
    for tensor in graph.initializer:
        _check_rank(tensor.name, len(tensor.dims))
    for values in (graph.input, graph.value_info, graph.output):
        for index, info in enumerate(values):
            if index % CHECK_EVERY == 0:
                check()
            _check_names((info.name,), limits)
            _check_rank(info.name, len(info.type.tensor_type.shape.dim) if info.HasField("type") else 0)
    initializers: dict[str, TensorHeader] = {}
    for tensor in graph.initializer:
        if not tensor.name:
            raise InvalidArchitectureError("an initializer has no name")
        if tensor.name in initializers:
            raise InvalidArchitectureError(f"the initializer {tensor.name!r} is defined twice")
        initializers[tensor.name] = TensorHeader(tensor.name, tensor.data_type, tuple(tensor.dims))
    inputs: dict[str, TensorHeader] = {}
    for info in graph.input:
        if not info.name:
            raise InvalidArchitectureError("a graph input has no name")
        if info.name in inputs:
            raise InvalidArchitectureError(f"the graph input {info.name!r} is defined twice")
        inputs[info.name] = TensorHeader(info.name, info.type.tensor_type.elem_type, _static_shape(info))
    inputs = {name: header for name, header in inputs.items() if name not in initializers}
    kinds, traced_names, folded, contents = _read_declarations(model, {*initializers, *inputs})
    nodes = list(_flat_nodes(model, limits, check))
    outputs = [output.name for output in graph.output]
    return OnnxFile(
        nodes=nodes,
        inputs=list(inputs.values()),
        outputs=outputs,
        initializers=initializers,
        kinds=kinds,
        contents=contents,
        traced_names=traced_names,
        folded={name: origins for name, origins in folded.items() if name in initializers},
        is_torch=model.producer_name == "pytorch",
        value_shapes={info.name: info for info in (*graph.value_info, *graph.output)},
        tensors={tensor.name: tensor for tensor in graph.initializer},
        producers=_find_producers(nodes, {*initializers, *inputs, ""}, outputs),
    )


def _parse(data: bytes, limits: GraphLimits, check: Callable[[], None]) -> onnx.ModelProto:
    """The model message, checked for size, versions and counts."""
    if not data:
        raise InvalidArchitectureError("expected a serialised onnx.ModelProto, got no bytes")
    if len(data) > limits.max_bytes:
        raise exceeded("bytes", len(data), limits.max_bytes)
    if len(data) * MOST_BYTES_PER_BYTE > limits.max_parsed_bytes:
        num_bytes = parsed_bytes(data, limits.max_parsed_bytes, check)
        if num_bytes > limits.max_parsed_bytes:
            raise exceeded("bytes once it is parsed", f"over {limits.max_parsed_bytes}", limits.max_parsed_bytes)
    try:
        model = onnx.ModelProto.FromString(bytes(data))
    except DecodeError as error:
        raise InvalidArchitectureError(
            "expected a serialised onnx.ModelProto; the bytes are damaged, cut short, nested too deeply, or no model"
        ) from error
    graph = model.graph
    if model.ir_version < 1:
        raise InvalidArchitectureError("the model has no ir_version, so it is not a complete onnx.ModelProto")
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedArchitectureError(
            f"the model has ir_version {model.ir_version}; this server reads up to {onnx.IR_VERSION}:"
            " export it with an older one"
        )
    if not graph.node:
        raise InvalidArchitectureError("the model's graph has no nodes")
    newest = onnx.defs.onnx_opset_version()
    versions = [entry.version for entry in model.opset_import if entry.domain in _DOMAINS]
    if not versions or min(versions) < 1:
        raise InvalidArchitectureError("the model imports no version of the standard operator set")
    if max(versions) > newest:
        raise UnsupportedArchitectureError(
            f"the model uses operator set {max(versions)}; this server reads up to {newest}: export with an older one"
        )
    for what, count, limit in (
        ("nodes", len(graph.node), limits.max_nodes),
        ("functions", len(model.functions), limits.max_nodes),
        ("nodes in functions", sum(len(item.node) for item in model.functions), limits.max_nodes),
        ("values of stated shape", len(graph.value_info) + len(graph.output), 2 * limits.max_nodes),
    ):
        if count > limit:
            raise exceeded(what, count, limit)
    tensors = len(graph.initializer) + len(graph.input)
    if tensors > 2 * limits.max_tensors or len(graph.initializer) > limits.max_tensors:
        raise exceeded("tensors", tensors, limits.max_tensors)
    if not graph.output:
        raise InvalidArchitectureError("the model's graph has no outputs")
    if graph.sparse_initializer:
        raise UnsupportedArchitectureError("the model has sparse initializers; export it with dense ones")
    return model


def _check_names(names: Iterable[object], limits: GraphLimits) -> None:
    """Refuses names that are long, or not UTF-8, which protobuf hands out as bytes."""
    for name in names:
        if not isinstance(name, str):
            raise InvalidArchitectureError(f"the name {repr(name)[:40]} is not valid UTF-8; rename it")
        if len(name) > limits.max_name_bytes:
            raise InvalidArchitectureError(
                f"a name starting {name[:40]!r} has over {limits.max_name_bytes} bytes; shorten it"
            )


def _check_rank(name: str, rank: int) -> None:
    """Refuses tensors of more axes than any operator takes."""
    if rank > MAX_RANK:
        raise exceeded(f"axes of the tensor {name[:40]!r}", rank, MAX_RANK)


def _static_shape(info: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor_type = info.type.tensor_type
    if not tensor_type.HasField("shape"):
        return None
    sizes = []
    for dim in tensor_type.shape.dim:
        if not dim.HasField("dim_value"):
            return None
        sizes.append(dim.dim_value)
    return tuple(sizes)


def _read_declarations(
    model: onnx.ModelProto, tensors: set[str]
) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[str, ...]], dict[str, str]]:
    """What exporters and the client say of initializers and inputs: kinds, traced names, folded, contents."""
    kinds: dict[str, str] = {}
    traced_names: dict[str, str] = {}
    folded: dict[str, tuple[str, ...]] = {}
    contents: dict[str, str] = {}
    for info in (*model.graph.input, *model.graph.value_info):
        if info.name not in tensors or not info.metadata_props:
            continue
        for entry in info.metadata_props:
            if entry.key == _KIND_KEY and entry.value in ("PARAMETER", "BUFFER"):
                kinds[info.name] = entry.value
            elif entry.key == _TRACED_KEY and isinstance(entry.value, str):
                traced_names[entry.value] = info.name
            elif entry.key == FOLDED_KEY and isinstance(entry.value, str):
                folded[info.name] = folded_parameters(string_list(entry.value))
    for entry in model.metadata_props:
        if entry.key not in (PARAMETERS_KEY, BUFFERS_KEY, CONTENTS_KEY):
            continue
        try:
            names = json.loads(entry.value)
        except (ValueError, RecursionError):
            names = None
        if entry.key == CONTENTS_KEY:
            if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
                raise InvalidArchitectureError(f"the model's metadata {entry.key!r} must be a JSON object of texts")
            contents.update(names)
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InvalidArchitectureError(f"the model's metadata {entry.key!r} must be a JSON list of names")
        kinds.update(dict.fromkeys(names, "PARAMETER" if entry.key == PARAMETERS_KEY else "BUFFER"))
    return kinds, traced_names, folded, contents


class _Tally:
    """Counts what reading the nodes costs; refuses what is over a limit, and calls ``check`` now and then."""

    def __init__(self, limits: GraphLimits, check: Callable[[], None]) -> None:
        self.limits = limits
        self._check = check
        self._num_nodes = self._num_operands = self._num_characters = self._num_unchecked = 0

    def count(self, nodes: int, operands: int, characters: int = 0) -> None:
        """Adds nodes, what they read, write and declare, and the characters of names that were made for them."""
        self._num_nodes += nodes
        self._num_operands += operands
        self._num_characters += characters
        most = self.limits.max_nodes
        if self._num_nodes > most:
            raise exceeded("nodes", f"over {most}", most)
        if self._num_operands > 8 * self.limits.max_edges:
            raise exceeded("operands", f"over {8 * self.limits.max_edges}", 8 * self.limits.max_edges)
        if self._num_characters > most * self.limits.max_name_bytes:
            raise exceeded("characters in names of expanded functions", "too many", most * self.limits.max_name_bytes)
        self._num_unchecked += nodes + operands
        if self._num_unchecked >= CHECK_EVERY:
            self._num_unchecked = 0
            self._check()


@dataclass(slots=True)
class _Frame:
    """A body that is being expanded: its nodes still to come, and how its names read outside."""

    nodes: Iterator[onnx.NodeProto]
    names: Mapping[str, str]
    prefix: str
    bindings: Mapping[str, onnx.AttributeProto]


def _flat_nodes(model: onnx.ModelProto, limits: GraphLimits, check: Callable[[], None]) -> Iterator[OnnxNode]:
    """The nodes of the main graph in order, each call of a local function replaced by the function's nodes."""
    functions = {(item.domain, item.name, item.overload): item for item in model.functions}
    if len(functions) < len(model.functions):
        raise InvalidArchitectureError("a model-local function is defined more than once")
    if functions:
        _check_expansion(model, functions, limits)
    stack = [_Frame(iter(model.graph.node), {}, "", {})]
    tally = _Tally(limits, check)
    expansions = 0
    while stack:
        frame = stack[-1]
        proto = next(frame.nodes, None)
        if proto is None:
            stack.pop()
            continue
        node = _read_node(proto, frame, tally)
        function = functions.get(_callee(proto)) if functions else None
        if function is None:
            yield node
        else:
            expansions += 1
            tally.count(0, len(function.input) + len(function.output) + len(function.attribute_proto))
            prefix = f"{node.label}#{expansions}/"
            stack.append(_enter(function, node, prefix if len(prefix) < _MAX_PREFIX else f"#{expansions}/"))


def _callee(proto: onnx.NodeProto) -> _FunctionKey:
    return proto.domain, proto.op_type, proto.overload


def _check_expansion(
    model: onnx.ModelProto, functions: Mapping[_FunctionKey, onnx.FunctionProto], limits: GraphLimits
) -> None:
    """Refuses a file of a kilobyte that stands for millions of nodes, before any of them is made."""
    calls = {key: [_callee(node) for node in item.node] for key, item in functions.items()}
    sizes: dict[_FunctionKey, int] = {}
    try:
        for key in TopologicalSorter(
            {key: functions.keys() & callees for key, callees in calls.items()}
        ).static_order():
            size = sum(1 + sizes.get(callee, 0) for callee in calls[key])
            sizes[key] = min(size, limits.max_nodes + 1)
    except CycleError as error:
        raise InvalidArchitectureError("a model-local function calls itself, maybe indirectly") from error
    num_nodes = sum(1 + sizes.get(_callee(node), 0) for node in model.graph.node)
    if num_nodes > limits.max_nodes:
        raise exceeded("nodes", f"over {limits.max_nodes}", limits.max_nodes)


def _read_node(proto: onnx.NodeProto, frame: _Frame, tally: _Tally) -> OnnxNode:
    """A node, which reads what its subgraphs read."""
    tally.count(1, len(proto.input) + len(proto.output) + len(proto.attribute))
    inputs, outputs, name = list(proto.input), list(proto.output), proto.name
    op_type, domain = proto.op_type, proto.domain
    attributes: dict[str, onnx.AttributeProto] = {}
    for attribute in proto.attribute:
        if attribute.type in _GRAPH_TYPES:
            for graph in (attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                inputs.extend(_captured(graph, tally.limits.max_subgraph_depth, tally))
        if not attribute.ref_attr_name:
            attributes.setdefault(attribute.name, attribute)
        elif attribute.ref_attr_name in frame.bindings:
            attributes.setdefault(attribute.name, frame.bindings[attribute.ref_attr_name])
    _check_names((name, op_type, domain, *inputs, *outputs, *attributes), tally.limits)
    for key, attribute in attributes.items():
        _check_rank(key, len(attribute.t.dims))
    if frame.prefix:
        inputs = [frame.names.get(item, frame.prefix + item) if item else "" for item in inputs]
        outputs = [frame.names.get(item, frame.prefix + item) if item else "" for item in outputs]
        name = frame.prefix + name
        tally.count(0, 0, sum(map(len, (name, *inputs, *outputs))))
    domain = "" if domain in _DOMAINS else domain
    op_type = op_type if domain in ("", MICROSOFT) else f"{domain}::{op_type}"
    return OnnxNode(op_type, domain, inputs, outputs, name, proto, attributes)


def _enter(function: onnx.FunctionProto, call: OnnxNode, prefix: str) -> _Frame:
    if len(call.inputs) > len(function.input) or len(call.outputs) > len(function.output):
        raise InvalidArchitectureError(
            f"node {call.label!r} passes more values than the function {function.name!r} has"
        )
    if not all(isinstance(item, str) for item in (*function.input, *function.output)):
        raise InvalidArchitectureError(f"a value of the function {function.name!r} has a name that is not valid UTF-8")
    names = dict(zip(function.input, call.inputs + [""] * len(function.input), strict=False))
    names.update((inner, outer) for inner, outer in zip(function.output, call.outputs, strict=False) if outer)
    bindings = {item.name: item for item in function.attribute_proto} | call.attributes
    return _Frame(iter(function.node), names, prefix, bindings)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _captured(graph: onnx.GraphProto, depth: int, tally: _Tally) -> list[str]:
    """Names that a subgraph reads from outside; it may nest ``depth`` more graphs."""
    if depth < 1:
        raise InvalidArchitectureError("subgraphs nest too deeply")
    tally.count(len(graph.node), len(graph.initializer) + len(graph.input) + len(graph.output))
    defined = {tensor.name for tensor in graph.initializer} | {info.name for info in graph.input}
    found: dict[str, None] = {}
    for node in graph.node:
        tally.count(0, len(node.input) + len(node.output) + len(node.attribute))
        names = list(node.input)
        for inner in subgraphs(node):
            names.extend(_captured(inner, depth - 1, tally))
        found.update((name, None) for name in names if name and name not in defined)
        defined.update(node.output)
    found.update((info.name, None) for info in graph.output if info.name and info.name not in defined)
    return list(found)


def _find_producers(nodes: list[OnnxNode], defined: set[str], outputs: list[str]) -> dict[str, OnnxNode]:
    """The node that writes each value; every value is written once, before it is read."""
    producers: dict[str, OnnxNode] = {}
    for node in nodes:
        for name in node.inputs:
            if name not in defined:
                if any(name in other.outputs for other in nodes):
                    raise InvalidArchitectureError(
                        f"node {node.label!r} reads {name!r} before it is written: the nodes are in a cycle or not in"
                        " topological order"
                    )
                raise InvalidArchitectureError(f"node {node.label!r} reads {name!r}, which nothing writes")
        for name in node.outputs:
            if not name:
                continue
            if name in defined:
                raise InvalidArchitectureError(f"the value {name!r}, written by node {node.label!r}, is defined twice")
            defined.add(name)
            producers[name] = node
    for name in outputs:
        if not name or name not in defined:
            raise InvalidArchitectureError(f"the graph output {name!r} is written by no node")
    return producers
