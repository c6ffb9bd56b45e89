"""Puts predicted weights into the ONNX model that they were predicted for.

Everything else in the file stays. Where an exporter had merged equal tensors of several layers into one, each use gets
a tensor of its own; where a node produced a weight (ConstantOfShape, Constant), an initializer takes its place.

Of weights that come as factors, one layer becomes two thinner ones: ``Conv`` a convolution to r channels and a 1 x 1
convolution, ``Gemm`` and ``MatMul`` two of themselves. Where a weight is read by anything else, the product is computed
inside the model, and nothing but size is saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from onnx import helper
from onnx.external_data_helper import uses_external_data

from ghn_client.errors import LoadError
from ghn_client.factors import FACTOR_IN, FACTOR_OUT, FactorPair, factor_pairs
from ghn_client.onnx.edit import (
    FIRST_IR_VERSION_WITHOUT_INPUTS,
    ONNX_TYPES,
    TORCH_DTYPES,
    copied,
    graphs,
    load_external,
    parse_onnx,
    tensor_proto,
)
from ghn_client.onnx.export import ModelSource
from ghn_client.onnx.strip import BUFFERS_KEY, CONTENTS_KEY, PARAMETERS_KEY
from ghn_client.wire.metadata import TensorInfo

if TYPE_CHECKING:
    from ghn_client.prediction import Prediction

_LISTS_OF_VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_FIRST_OPSET_OF_GEMM_WITHOUT_BIAS = 11


def fill_model(prediction: Prediction, source: ModelSource | None) -> onnx.ModelProto:
    """The model of ``source`` with the weights in it.

    Raises:
        LoadError: There is no model, or the weights do not fit it.
    """
    if source is None:
        raise LoadError(
            "this prediction was loaded from a file: give the model that it is for, to_onnx(path, model=...)"
        )
    try:
        model = parse_onnx(source.original or (source.path.read_bytes() if source.path else source.structure))
    except OSError as error:
        raise LoadError(
            f"cannot read the model {str(source.path)!r} any more ({error.strerror}); give it, to_onnx(path, model=...)"
        ) from error
    filler = _Filler(model, source.path)
    pairs = factor_pairs(dict(prediction))
    for name, tensor in prediction.items():
        if not name.endswith((FACTOR_IN, FACTOR_OUT)):
            filler.put(prediction.notes.get(name) or TensorInfo(name, "", initializer=name), tensor)
    for name, tensor in prediction.statistics.items():
        filler.put(TensorInfo(name, "", initializer=name), tensor)
    layers = (prediction.metadata.low_rank or {}).get("layers", ())
    permutations = {item["parameter"]: item["permutation"] for item in layers if item.get("permutation")}
    for name, pair in pairs.items():
        # A weight that the file merges with another, or that a node or a subgraph holds, becomes a dense tensor of its
        # own first: only those of the main graph can be rewritten.
        if not filler.is_weight_of_main_graph(name):
            note = prediction.notes.get(name + FACTOR_IN) or TensorInfo(name, "", initializer=name)
            filler.put(dataclasses.replace(note, name=name), pair.dense_in_layout(permutations.get(name, ())))
    filler.finish(source.values)
    if pairs:
        model = factorize_onnx(model, pairs, permutations=permutations)
    tensors = [tensor for graph in graphs(model.graph) for tensor in graph.initializer]
    empty = [tensor.name for tensor in tensors if math.prod(tensor.dims) > 0 and not _has_data(tensor)]
    if empty:
        raise LoadError(
            f"{len(empty)} tensors of the model have no values and were not predicted: {', '.join(empty[:5])}; "
            "give the original model, not a stripped one"
        )
    return model


def _has_data(tensor: onnx.TensorProto) -> bool:
    return tensor.HasField("raw_data") or any(len(getattr(tensor, field)) for field in _LISTS_OF_VALUES)


class _Filler:
    """One model while it is filled."""

    def __init__(self, model: onnx.ModelProto, path: Path | None) -> None:
        self.model, self.path = model, path
        self.graphs = list(graphs(model.graph))
        self.initializers = {tensor.name: (graph, tensor) for graph in self.graphs for tensor in graph.initializer}
        self.nodes: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.producers: dict[str, tuple[onnx.GraphProto, onnx.NodeProto]] = {}
        for graph in self.graphs:
            for node in graph.node:
                label = node.name or next((name for name in node.output if name), node.op_type)
                self.nodes[label].append(node)
                self.producers.update((output, (graph, node)) for output in node.output)
        self.inputs = {info.name: info for info in model.graph.input}
        self.filled: set[str] = set()
        self.redirected: set[str] = set()

    def put(self, note: TensorInfo, tensor: torch.Tensor) -> None:
        """Gives the tensor of ``note`` its value."""
        initializer = note.initializer or note.name
        if note.uses:
            self._redirect(note, initializer, tensor)
        elif initializer in self.initializers:
            self._fill(self.initializers[initializer][1], tensor)
        elif initializer in self.inputs:
            self._fill_input(initializer, tensor)
        elif initializer in self.producers:
            graph, node = self.producers.pop(initializer)
            if len(node.output) != 1:
                raise LoadError(
                    f"the weight {initializer!r} is one of several outputs of a node: it cannot be replaced"
                )
            graph.node.remove(node)
            self._add(initializer, tensor, ONNX_TYPES[tensor.dtype])
        else:
            raise LoadError(
                f"the model has no tensor {initializer!r} to fill; weights inside functions of the model cannot be "
                "filled: inline them first (onnx.inliner.inline_local_functions)"
            )

    def is_weight_of_main_graph(self, name: str) -> bool:
        """Whether the file has a weight of this name where ``factorize_onnx`` rewrites it."""
        graph, _ = self.initializers.get(name, (None, None))
        return graph is self.model.graph or name in self.inputs

    def finish(self, values: Mapping[str, torch.Tensor]) -> None:
        """Fills in what is no weight, drops merged tensors that nothing reads any more, loads external data."""
        read = {name for nodes in self.nodes.values() for node in nodes for name in node.input}
        read |= {output.name for output in self.model.graph.output}
        for name in self.redirected - read:
            if name in self.initializers:
                graph, tensor = self.initializers.pop(name)
                graph.initializer.remove(tensor)
        for name, value in values.items():
            if name in self.inputs and name not in self.filled:
                self._fill_input(name, value)
        # Running statistics without values are those of a new module, mean 0 and variance 1.
        norms = [node for graph in self.graphs for node in graph.node if node.op_type == "BatchNormalization"]
        for name, first in [(node.input[3], 0.0) for node in norms] + [(node.input[4], 1.0) for node in norms]:
            if name in self.inputs and name not in self.filled:
                shape = [dim.dim_value for dim in self.inputs[name].type.tensor_type.shape.dim]
                self._fill_input(name, torch.full(shape, first))
        outside = [name for name, (_, item) in self.initializers.items() if uses_external_data(item)]
        if outside and self.path is None:
            raise LoadError(
                f"{outside[0]!r} is stored outside of the model, whose folder is not known; give the model as a path"
            )
        try:
            if self.path is not None:
                load_external(self.model, self.path)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise LoadError(f"the external data of the model cannot be read: {error}") from error
        for item in [
            item for item in self.model.metadata_props if item.key in (PARAMETERS_KEY, BUFFERS_KEY, CONTENTS_KEY)
        ]:
            self.model.metadata_props.remove(item)

    def _redirect(self, note: TensorInfo, initializer: str, tensor: torch.Tensor) -> None:
        data_type: int = onnx.TensorProto.FLOAT
        if initializer in self.initializers:
            merged = self.initializers[initializer][1]
            data_type = merged.data_type
            tensor = _stored(merged, tensor)
        name = note.name
        while name != initializer and (name in self.initializers or name in self.inputs or name in self.producers):
            name += "_"
        if name in self.initializers:
            self._fill(self.initializers[name][1], tensor)
        else:
            self._add(name, tensor, data_type)
        for use in note.uses:
            readers = self.nodes.get(use.node, [])
            if len(readers) != 1:
                raise LoadError(
                    f"{note.name!r} is read by the node {use.node!r}, of which the model has {len(readers)}"
                )
            inputs = readers[0].input
            inputs.extend([""] * (use.input_index + 1 - len(inputs)))
            inputs[use.input_index] = name
        self.redirected.add(initializer)

    def _fill_input(self, name: str, tensor: torch.Tensor) -> None:
        self.model.graph.input.remove(self.inputs[name])
        self._add(name, tensor, self.inputs[name].type.tensor_type.elem_type)

    def _add(self, name: str, tensor: torch.Tensor, data_type: int) -> None:
        proto = self.model.graph.initializer.add(name=name, data_type=data_type, dims=tensor.shape)
        self._fill(proto, tensor)
        self.initializers[name] = (self.model.graph, proto)
        if self.model.ir_version < FIRST_IR_VERSION_WITHOUT_INPUTS:
            self.model.graph.input.append(onnx.helper.make_tensor_value_info(name, data_type, tuple(tensor.shape)))

    def _fill(self, proto: onnx.TensorProto, tensor: torch.Tensor) -> None:
        if proto.data_type not in TORCH_DTYPES:
            type_name = onnx.TensorProto.DataType.Name(proto.data_type)
            raise LoadError(f"{proto.name!r} has the type {type_name}, which cannot be filled")
        proto.CopyFrom(tensor_proto(proto.name, _stored(proto, tensor), proto.data_type))
        self.filled.add(proto.name)


def _stored(proto: onnx.TensorProto, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the shape that the file has it in."""
    values = as_stored(tensor, proto.dims)
    if values is None:
        raise LoadError(f"{proto.name!r} has shape {tuple(proto.dims)} in the model and {tuple(tensor.shape)} here")
    return values


# ---- what exporters compute from parameters --------------------------------------------------------------------------


def as_stored(parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """What the exporter computed from ``parameter``, as a tensor of shape ``shape``; None if that is not known.

    The parameter has this shape, or is repeated along axes to get it, or is a table of relative positions in windows,
    ((2w - 1)^2, H), that the file has as ([1,] H, w^2, w^2), (w^2, w^2, H) or (w^4, H).
    """
    target = tuple(shape)
    if tuple(parameter.shape) == target:
        return parameter
    pairs = zip(parameter.shape, target, strict=False)
    if parameter.dim() == len(target) and all(own in (1, stored) for own, stored in pairs):
        return parameter.expand(target)
    return _looked_up(parameter, target) if parameter.dim() == 2 else None


def _looked_up(table: torch.Tensor, target: tuple[int, ...]) -> torch.Tensor | None:
    entries, heads = table.shape
    side = (math.isqrt(entries) + 1) // 2
    area = side * side
    if (2 * side - 1) ** 2 != entries or math.prod(target) != heads * area * area:
        return None
    place = torch.arange(side)
    difference = place[:, None] - place[None, :] + side - 1  # (w, w), from 0 to 2w - 2
    rows = difference[:, None, :, None] * (2 * side - 1)  # first the row difference, then the column's
    flat = table[(rows + difference[None, :, None, :]).reshape(-1).to(table.device)]  # (w^4, H)
    square = flat.reshape(area, area, heads)
    if target == (area * area, heads):
        return flat
    if target == (area, area, heads) and area != heads:
        return square
    if target in ((heads, area, area), (1, heads, area, area)):
        return square.permute(2, 0, 1).reshape(target)
    return None


# ---- weights that come as factors ------------------------------------------------------------------------------------


def factorize_onnx(
    model: onnx.ModelProto, pairs: Mapping[str, FactorPair], *, permutations: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """A copy of a model whose weights named in ``pairs`` are replaced by their factors.

    Args:
        model: A model whose weights are initializers (with or without data) or graph inputs.
        pairs: Factors by name of the weight in the file; names that the file does not have are left out.
        permutations: For weights stored in another layout than torch's, which stored axis each of torch's axes is;
            needed only where the file reads them in an unusual way.
    """
    result = copied(model)
    graph = result.graph
    for name, pair in pairs.items():
        stored = [(item.data_type, list(item.dims)) for item in graph.initializer if item.name == name]
        for info in [item.type.tensor_type for item in graph.input if item.name == name]:
            stored.append((info.elem_type, [axis.dim_value for axis in info.shape.dim]))
        if not stored:
            continue
        data_type, shape = stored[0]
        dtype = TORCH_DTYPES.get(data_type, pair.factor_in.dtype)
        pair = FactorPair(pair.factor_in.to(dtype), pair.factor_out.to(dtype))
        if not _split_layers(graph, name, pair):
            _insert_product(graph, name, pair, shape, tuple((permutations or {}).get(name, ())))
        for items in (graph.initializer, graph.input, graph.value_info):
            for item in [item for item in items if item.name == name]:
                items.remove(item)  # type: ignore[arg-type]
    _follow_old_rules(result)
    return result


def _follow_old_rules(model: onnx.ModelProto) -> None:
    """What files of older versions must have: a bias for each Gemm, and every initializer among the inputs."""
    graph = model.graph
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    if opset < _FIRST_OPSET_OF_GEMM_WITHOUT_BIAS:
        for node in [item for item in graph.node if item.op_type == "Gemm" and len(item.input) == 2]:
            factor = next(item for item in graph.initializer if item.name == node.input[1])
            node.input.append(f"{factor.name}.bias")
            _add_tensor(graph, node.input[2], torch.zeros(factor.dims[0], dtype=TORCH_DTYPES[factor.data_type]))
    if model.ir_version < FIRST_IR_VERSION_WITHOUT_INPUTS:
        known = {item.name for item in graph.input}
        for item in [item for item in graph.initializer if item.name not in known]:
            graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))


def _split_layers(graph: onnx.GraphProto, name: str, pair: FactorPair) -> bool:
    """Replaces every layer that reads the weight; False, and nothing done, if one of them is no plain layer."""
    readers = [node for node in graph.node if name in node.input]
    transposes = [node for node in readers if node.op_type == "Transpose" and _attributes(node).get("perm") == [1, 0]]
    layers = [(node, name) for node in readers if node not in transposes]
    layers += [(node, x.output[0]) for x in transposes for node in graph.node if x.output[0] in node.input]
    shown = {name, *(node.output[0] for node in transposes)}
    in_subgraphs = {item for inner in list(graphs(graph))[1:] for node in inner.node for item in node.input}
    if not layers or shown & in_subgraphs or name in {item.name for item in graph.output}:
        return False
    if not all(_is_plain_layer(node, weight) for node, weight in layers):
        return False
    for node, _ in layers:
        _split(graph, node, name, pair)
    for node in transposes:
        graph.node.remove(node)
    return True


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _is_plain_layer(node: onnx.NodeProto, weight: str) -> bool:
    attributes, inputs = _attributes(node), list(node.input)
    if inputs.count(weight) != 1 or inputs.index(weight) != 1:
        return False
    if node.op_type == "Conv":
        return attributes.get("group", 1) == 1
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transA"))


def _split(graph: onnx.GraphProto, node: onnx.NodeProto, name: str, pair: FactorPair) -> None:
    """Puts two nodes in the place of one."""
    first, second = copied(node), copied(node)
    base, middle = node.name or node.output[0], f"{node.output[0]}.low_rank"
    first.name, second.name = base + FACTOR_IN, base + FACTOR_OUT
    names, factors = [name + FACTOR_IN, name + FACTOR_OUT], [pair.factor_in, pair.factor_out]
    if node.op_type == "MatMul":
        names = [f"{item}.transposed" for item in names]
        factors = [factor.flatten(1).mT for factor in factors]
    elif node.op_type == "Gemm":
        factors = [factor.flatten(1) for factor in factors]
        _set_attributes(first, {"transB": 1}, drop=("alpha", "beta"))
        _set_attributes(second, {"transB": 1})
    else:
        kernel_shape = [1] * (pair.factor_in.dim() - 2)
        _set_attributes(second, {"kernel_shape": kernel_shape}, drop=("strides", "pads", "dilations", "auto_pad"))
    del first.input[2:]
    first.input[1], first.output[0] = names[0], middle
    second.input[0], second.input[1] = middle, names[1]
    place = list(graph.node).index(node)
    graph.node[place].CopyFrom(second)
    graph.node.insert(place, first)
    for factor_name, factor in zip(names, factors, strict=True):
        _add_tensor(graph, factor_name, factor)


def _set_attributes(node: onnx.NodeProto, values: Mapping[str, object], *, drop: Sequence[str] = ()) -> None:
    for item in [item for item in node.attribute if item.name in {*values, *drop}]:
        node.attribute.remove(item)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in values.items())


def _insert_product(
    graph: onnx.GraphProto, name: str, pair: FactorPair, stored: list[int], permutation: tuple[int, ...]
) -> None:
    """Computes the weight from its factors at the start of the graph, under the weight's own name."""
    shape = [pair.factor_out.shape[0], *pair.factor_in.shape[1:]]
    _add_tensor(graph, name + FACTOR_OUT, pair.factor_out.flatten(1))
    _add_tensor(graph, name + FACTOR_IN, pair.factor_in.flatten(1))
    if not permutation and stored != shape and stored == shape[::-1]:
        permutation = (1, 0)
    nodes = [helper.make_node("MatMul", [name + FACTOR_OUT, name + FACTOR_IN], [f"{name}.product"])]
    if len(shape) > 2:
        _add_tensor(graph, f"{name}.shape", torch.tensor(shape))
        nodes.append(helper.make_node("Reshape", [nodes[-1].output[0], f"{name}.shape"], [f"{name}.reshaped"]))
    if permutation:
        inverse = [permutation.index(axis) for axis in range(len(permutation))]
        nodes.append(helper.make_node("Transpose", [nodes[-1].output[0]], [f"{name}.transposed"], perm=inverse))
    nodes[-1].output[0] = name
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _add_tensor(graph: onnx.GraphProto, name: str, tensor: torch.Tensor) -> None:
    if all(item.name != name for item in graph.initializer):
        graph.initializer.append(tensor_proto(name, tensor))
