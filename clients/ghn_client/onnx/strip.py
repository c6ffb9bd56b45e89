"""ONNX models without weights: what the service is sent.

Two forms. A model that ``export`` made knows which tensors are parameters, so they become typed graph inputs, listed
in the model's metadata; such a file passes the checker and strict shape inference. A user's own file keeps its
initializers as names with types and shapes, so that it reads exactly as the original does; only the data goes.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import onnx
import onnx_ir

from ghn_client.onnx.edit import graphs, parse_onnx

PARAMETERS_KEY = "ghn.parameters"
"""Key of the model's metadata: JSON list of the stripped trainable tensors."""

BUFFERS_KEY = "ghn.buffers"
"""Key of the model's metadata: JSON list of the float tensors that are no weights."""

CONTENTS_KEY = "ghn.contents"
"""Key of the model's metadata: JSON object of what stripped buffers and constants hold: a digest, or one number."""

KEPT_ELEMENTS = 1024
"""Integer tensors of at most this many elements keep their values: they hold shapes and axes."""

_KEPT_FLOATS = 1
_FLOAT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
)
_INDEX_TYPES = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL})
_DATA_FIELDS = (
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data",
    "external_data", "data_location", "doc_string",
)  # fmt: skip
_CLASSES_KEY = "pkg.torch.onnx.class_hierarchy"
# Names of modules and parameters, which the reader needs; the others hold source lines and paths of the user's machine.
_KEPT_MODEL_METADATA = frozenset({PARAMETERS_KEY, BUFFERS_KEY, CONTENTS_KEY})
_KEPT_METADATA = frozenset({"pkg.torch.onnx.name_scopes", _CLASSES_KEY, "pkg.torch.onnx.fx_node"})
_KEPT_VALUE_METADATA = frozenset(
    {"pkg.torch.export.graph_signature.InputSpec.kind", "pkg.onnxscript.optimizer.folded_from"}
)
_POOLING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


# ---- models made by export ------------------------------------------------------------------------------------------


def encode_structure(model: onnx_ir.Model, parameters: Collection[str], contents: Mapping[str, str]) -> bytes:
    """A model, which is changed, as bytes with float initializers as typed graph inputs; only ``parameters`` train.

    What ``contents`` says that others hold is kept.
    """
    _clear_metadata(model)
    _rename_clashes(model)
    named: dict[str, list[str]] = {PARAMETERS_KEY: [], BUFFERS_KEY: []}
    told: dict[str, str] = {}
    for name, value in list(model.graph.initializers.items()):
        if name not in parameters and not value.uses():
            del model.graph.initializers[name]
            continue
        is_float = value.dtype is not None and int(value.dtype) in _FLOAT_TYPES
        if is_float:
            named[PARAMETERS_KEY if name in parameters else BUFFERS_KEY].append(name)
        sizes = [size if isinstance(size, int) else 0 for size in value.shape or ()]
        is_large = value.shape is not None and math.prod(sizes) > (_KEPT_FLOATS if is_float else KEPT_ELEMENTS)
        if name in parameters or value.const_value is None or is_large:
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
            if name in contents:
                told[name] = contents[name]
    for key, names in named.items():
        model.metadata_props[key] = json.dumps(names)
    if told:
        model.metadata_props[CONTENTS_KEY] = json.dumps(told)
    return onnx_ir.to_proto(model).SerializeToString()


def _clear_metadata(model: onnx_ir.Model) -> None:
    model.doc_string = None
    model.metadata_props.clear()
    graphs: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            node.doc_string = None
            text = node.metadata_props.get(_CLASSES_KEY, "")
            node.metadata_props.clear()
            if text and node.op_type in _POOLING:  # which module it is tells adaptive from plain pooling
                classes = ast.literal_eval(text)
                node.metadata_props[_CLASSES_KEY] = repr([name.rpartition(".")[2] for name in classes[-2:-1]] + [""])
            for value in node.outputs:
                value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def lift_constants(model: onnx_ir.Model) -> None:
    """Makes initializers of float vectors inside the graph: the reader takes them for weights otherwise."""
    for node in list(model.graph):
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        tensor = attribute.as_tensor() if attribute is not None else None
        if tensor is None or int(tensor.dtype) not in _FLOAT_TYPES or tensor.size <= _KEPT_FLOATS:
            continue
        old = node.outputs[0]
        shape, element_type = onnx_ir.Shape(tensor.shape.numpy()), onnx_ir.TensorType(tensor.dtype)
        new = onnx_ir.Value(name=old.name, shape=shape, type=element_type, const_value=tensor)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        model.graph.initializers.add(new)


def _rename_clashes(model: onnx_ir.Model) -> None:
    """Gives way to parameters whose name an intermediate value or an input has too."""
    taken = set(model.graph.initializers)
    nodes = onnx_ir.traversal.RecursiveGraphIterator(model.graph)
    for value in [*model.graph.inputs, *(value for node in nodes for value in node.outputs)]:
        while value.name in taken:
            value.name = f"{value.name}_"
        if value.name:
            taken.add(value.name)


# ---- files of users -------------------------------------------------------------------------------------------------


def strip_weights(onnx_bytes: bytes) -> bytes:
    """The same model without the values of its weights, and without doc strings and traces of the user's machine.

    External data is not opened, and the references to it are dropped. Small integer tensors stay: they are shapes.

    Raises:
        InvalidArchitectureError: The bytes are no ONNX model.
    """
    model = parse_onnx(onnx_bytes)
    model.ClearField("doc_string")
    model.ClearField("training_info")
    _keep(model.metadata_props, _KEPT_MODEL_METADATA)
    for function in model.functions:
        _strip(function)
    owners: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for owner in owners:
        for graph in graphs(owner):
            _strip(graph)
    return model.SerializeToString()


def _keep(metadata: Any, keys: Collection[str]) -> None:
    """Drops all but some entries of a ``metadata_props`` field."""
    kept = [(entry.key, entry.value) for entry in metadata if entry.key in keys]
    del metadata[:]
    for key, text in kept:
        metadata.add(key=key, value=text)


def _strip(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    graph.ClearField("doc_string")
    for node in graph.node:
        _strip_node(node)
    if isinstance(graph, onnx.GraphProto):
        del graph.metadata_props[:]
        for tensor in (*graph.initializer, *(part for x in graph.sparse_initializer for part in (x.values, x.indices))):
            strip_tensor(tensor)
        for info in (*graph.input, *graph.output, *graph.value_info):
            info.ClearField("doc_string")
            _keep(info.metadata_props, _KEPT_VALUE_METADATA)


def _strip_node(node: onnx.NodeProto) -> None:
    node.ClearField("doc_string")
    _keep(node.metadata_props, _KEPT_METADATA)
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        if attribute.type == onnx.AttributeProto.TENSOR:
            strip_tensor(attribute.t)
        elif attribute.name == "value_floats" and len(attribute.floats) > _KEPT_FLOATS:
            count = len(attribute.floats)
            attribute.ClearField("floats")
            attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
            attribute.t.data_type = onnx.TensorProto.FLOAT
            attribute.t.dims.append(count)


def strip_tensor(tensor: onnx.TensorProto) -> None:
    """Drops the values of a tensor, unless it is a small integer tensor or a single number."""
    limit = KEPT_ELEMENTS if tensor.data_type in _INDEX_TYPES else _KEPT_FLOATS
    if tensor.data_location == onnx.TensorProto.EXTERNAL or not 0 <= math.prod(tensor.dims) <= limit:
        for field in _DATA_FIELDS:
            tensor.ClearField(field)
