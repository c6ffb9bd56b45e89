"""An ONNX model as a flat list of nodes over named values: functions expanded, order and names checked.

Values keep their names; inside an expanded function they get a prefix. Tensor data is never touched, except that
``OnnxFile.integers`` reads up to 64 inline integers (axes and target shapes). External data is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import onnx

from ghn_service.graph.onnx.folded import FOLDED_KEY, folded_parameters, string_list
from ghn_service.graph.onnx.limits import check_name, invalid, is_text, parse_model
from ghn_service.graph.onnx.node import OnnxNode, flat_nodes
from ghn_service.graph.raw_graph import GraphLimits

PARAMETERS_KEY = "ghn.parameters"
BUFFERS_KEY = "ghn.buffers"
FLOAT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
)
_INTEGER_DTYPES: dict[int, str] = {onnx.TensorProto.INT64: "<i8", onnx.TensorProto.INT32: "<i4"}
_MAX_INTEGERS = 64
_TRACED_KEY = "pkg.torch.onnx.original_node_name"
_KIND_KEY = "pkg.torch.export.graph_signature.InputSpec.kind"


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

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The integers that the value ``name`` holds, if it is a small inline constant."""
        tensor = self.tensors.get(name)
        if tensor is None:
            producer = self.producers.get(name)
            if producer is None or producer.op_type != "Constant":
                return None
            for attribute in producer.proto.attribute:
                if attribute.name == "value_int":
                    return (attribute.i,)
                if attribute.name == "value_ints":
                    return tuple(attribute.ints[:_MAX_INTEGERS])
                if attribute.name == "value":
                    tensor = attribute.t
        return None if tensor is None else _inline_integers(tensor)

    def value_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the file states for a value, if it states a fixed one."""
        info = self.value_shapes.get(name)
        return None if info is None else _static_shape(info)

    @property
    def num_examples(self) -> int:
        """First axis of the first data input that states one; 0 where none does."""
        stated = (header.shape for header in self.inputs if header.name not in self.kinds)
        return next((shape[0] for shape in stated if shape is not None and len(shape) >= 2), 0)


def load_file(data: bytes, limits: GraphLimits) -> OnnxFile:
    """Parses and checks a model.

    Raises:
        InvalidArchitectureError: The bytes are no well-formed model.
        UnsupportedArchitectureError: The model needs a newer reader.
        LimitExceededError: The model is over a limit.
    """
    model = parse_model(data, limits)
    graph = model.graph
    initializers: dict[str, TensorHeader] = {}
    for tensor in graph.initializer:
        if not tensor.name:
            raise invalid("an initializer has no name")
        if tensor.name in initializers:
            raise invalid(f"the initializer {tensor.name!r} is defined twice")
        check_name(tensor.name, limits)
        initializers[tensor.name] = TensorHeader(tensor.name, tensor.data_type, tuple(tensor.dims))
    inputs = _read_inputs(graph, initializers, limits)
    kinds, traced_names = _read_kinds(model, initializers, inputs)
    nodes = list(flat_nodes(model))
    outputs = [output.name for output in graph.output]
    producers = _check_names(nodes, [header.name for header in inputs], initializers, outputs, limits)
    return OnnxFile(
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        initializers=initializers,
        kinds=kinds,
        traced_names=traced_names,
        folded=_read_folded(graph, initializers),
        is_torch=model.producer_name == "pytorch",
        value_shapes={info.name: info for info in (*graph.value_info, *graph.output)},
        tensors={tensor.name: tensor for tensor in graph.initializer},
        producers=producers,
    )


def _read_inputs(
    graph: onnx.GraphProto, initializers: Mapping[str, TensorHeader], limits: GraphLimits
) -> list[TensorHeader]:
    inputs: list[TensorHeader] = []
    seen: set[str] = set()
    for info in graph.input:
        if not info.name:
            raise invalid("a graph input has no name")
        if info.name in seen:
            raise invalid(f"the graph input {info.name!r} is defined twice")
        seen.add(info.name)
        if info.name in initializers:
            continue
        check_name(info.name, limits)
        inputs.append(TensorHeader(info.name, info.type.tensor_type.elem_type, _static_shape(info)))
    return inputs


def _read_kinds(
    model: onnx.ModelProto, initializers: Mapping[str, TensorHeader], inputs: list[TensorHeader]
) -> tuple[dict[str, str], dict[str, str]]:
    kinds: dict[str, str] = {}
    traced_names: dict[str, str] = {}
    names = {header.name for header in inputs}
    for infos in (model.graph.input, model.graph.value_info):
        for info in infos:
            if info.metadata_props and (info.name in initializers or info.name in names):
                for entry in info.metadata_props:
                    if entry.key == _KIND_KEY and entry.value in ("PARAMETER", "BUFFER"):
                        kinds[info.name] = entry.value
                    elif entry.key == _TRACED_KEY and is_text(entry.value):
                        traced_names[entry.value] = info.name
    for entry in model.metadata_props:
        if entry.key in (PARAMETERS_KEY, BUFFERS_KEY):
            kind = "PARAMETER" if entry.key == PARAMETERS_KEY else "BUFFER"
            for name in _json_names(entry.key, entry.value):
                kinds[name] = kind
    return kinds, traced_names


def _read_folded(graph: onnx.GraphProto, initializers: Mapping[str, TensorHeader]) -> dict[str, tuple[str, ...]]:
    return {
        info.name: folded_parameters(string_list(entry.value))
        for info in graph.value_info
        if info.metadata_props and info.name in initializers
        for entry in info.metadata_props
        if entry.key == FOLDED_KEY and is_text(entry.value)
    }


def _json_names(key: str, text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the model's metadata {key!r} must be a JSON list of names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise invalid(f"the model's metadata {key!r} must be a JSON list of names")
    return names


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


def _check_names(
    nodes: list[OnnxNode],
    inputs: list[str],
    initializers: Mapping[str, TensorHeader],
    outputs: list[str],
    limits: GraphLimits,
) -> dict[str, OnnxNode]:
    defined = {*inputs, *initializers, ""}
    producers: dict[str, OnnxNode] = {}
    for node in nodes:
        for name in node.inputs:
            if name not in defined:
                raise invalid(_why_undefined(name, node, nodes))
        for name in node.outputs:
            if name:
                if not is_text(name):
                    raise invalid(f"node {node.label!r} writes the value {name!r}, whose name is not valid UTF-8")
                if name in defined:
                    raise invalid(f"the value {name!r}, written by node {node.label!r}, is defined twice")
                defined.add(name)
                producers[name] = node
    for name in outputs:
        if not name or name not in defined:
            raise invalid(f"the graph output {name!r} is written by no node")
    return producers


def _why_undefined(name: str, node: OnnxNode, nodes: list[OnnxNode]) -> str:
    if any(name in other.outputs for other in nodes):
        return (
            f"node {node.label!r} reads {name!r} before it is written: the nodes are in a cycle or not in"
            " topological order"
        )
    return f"node {node.label!r} reads {name!r}, which nothing writes"


def _inline_integers(tensor: onnx.TensorProto) -> tuple[int, ...] | None:
    dtype = _INTEGER_DTYPES.get(tensor.data_type)
    if dtype is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    count = 1
    for size in tensor.dims:
        count *= size
    if not 0 <= count <= _MAX_INTEGERS:
        return None
    if tensor.raw_data:
        if len(tensor.raw_data) != count * numpy.dtype(dtype).itemsize:
            return None
        return tuple(numpy.frombuffer(tensor.raw_data, dtype=dtype).tolist())
    values = tensor.int64_data if tensor.data_type == onnx.TensorProto.INT64 else tensor.int32_data
    return tuple(values) if len(values) == count else None
