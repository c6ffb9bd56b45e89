"""Puts predicted weights into the ONNX model that they were predicted for.

Everything else in the file stays. Where an exporter had merged equal tensors of several layers into one, each use gets
a tensor of its own; where a node produced a weight (ConstantOfShape, Constant), an initializer takes its place.
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
from onnx.external_data_helper import load_external_data_for_tensor

from ghn_client.errors import LoadError
from ghn_client.factors import FACTOR_IN, FACTOR_OUT, factor_pairs
from ghn_client.onnx.edit import (
    FIRST_IR_VERSION_WITHOUT_INPUTS,
    ONNX_TYPES,
    TORCH_DTYPES,
    graphs,
    parse_onnx,
    tensor_proto,
)
from ghn_client.onnx.export import ModelSource
from ghn_client.onnx.factor import factorize_onnx
from ghn_client.onnx.strip import BUFFERS_KEY, PARAMETERS_KEY
from ghn_client.wire.metadata import TensorInfo

if TYPE_CHECKING:
    from ghn_client.prediction import Prediction

_LISTS_OF_VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_INITIAL_STATISTICS = {3: 0.0, 4: 1.0}


def fill_model(prediction: Prediction, source: ModelSource | None) -> onnx.ModelProto:
    """The model of ``source`` with the weights in it.

    Raises:
        LoadError: There is no model, or the weights do not fit it.
    """
    if source is None:
        raise LoadError(
            "this prediction was loaded from a file: give the model that it is for, to_onnx(path, model=...)"
        )
    model = parse_onnx(source.original or (source.path.read_bytes() if source.path else source.structure))
    filler = _Filler(model, source.path.parent if source.path else None)
    pairs = factor_pairs(dict(prediction))
    for name, tensor in prediction.items():
        if not name.endswith((FACTOR_IN, FACTOR_OUT)):
            filler.put(prediction.notes.get(name) or TensorInfo(name, "", initializer=name), tensor)
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

    def __init__(self, model: onnx.ModelProto, folder: Path | None) -> None:
        self.model = model
        self.folder = folder
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
            self.model.graph.input.remove(self.inputs[initializer])
            self._add(initializer, tensor, self.inputs[initializer].type.tensor_type.elem_type)
        elif initializer in self.producers:
            self._replace_producer(initializer, tensor)
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
                self.model.graph.input.remove(self.inputs[name])
                self._add(name, value, self.inputs[name].type.tensor_type.elem_type)
        self._initialise_statistics()
        for name, (_, tensor) in self.initializers.items():
            if name not in self.filled and tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._load_external(tensor)
        for item in [item for item in self.model.metadata_props if item.key in (PARAMETERS_KEY, BUFFERS_KEY)]:
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

    def _replace_producer(self, name: str, tensor: torch.Tensor) -> None:
        graph, node = self.producers.pop(name)
        if len(node.output) != 1:
            raise LoadError(f"the weight {name!r} is one of several outputs of a node and cannot be replaced")
        graph.node.remove(node)
        self._add(name, tensor, ONNX_TYPES[tensor.dtype])

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

    def _initialise_statistics(self) -> None:
        """Mean 0 and variance 1 for running statistics without values, as a new module has them."""
        for graph in self.graphs:
            for node in graph.node:
                if node.op_type != "BatchNormalization":
                    continue
                for index, value in _INITIAL_STATISTICS.items():
                    info = self.inputs.get(node.input[index])
                    if info is not None and info.name not in self.filled:
                        self.model.graph.input.remove(info)
                        tensor_type = info.type.tensor_type
                        shape = [dim.dim_value for dim in tensor_type.shape.dim]
                        self._add(info.name, torch.full(shape, value), tensor_type.elem_type)

    def _load_external(self, tensor: onnx.TensorProto) -> None:
        if self.folder is None:
            raise LoadError(
                f"{tensor.name!r} is stored outside of the model, whose folder is not known; give the model as a path"
            )
        try:
            load_external_data_for_tensor(tensor, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise LoadError(f"the external data of {tensor.name!r} cannot be read: {error}") from error
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT


def _stored(proto: onnx.TensorProto, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the shape that the file has it in."""
    values = as_stored(tensor, proto.dims)
    if values is None:
        raise LoadError(f"{proto.name!r} has shape {tuple(proto.dims)} in the model and {tuple(tensor.shape)} here")
    return values


# ---- what exporters compute from parameters --------------------------------------------------------------------------


def as_stored(parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """What the exporter computed from ``parameter``, as a tensor of shape ``shape``; None if that is not known.

    Args:
        parameter: The parameter in its own shape: ``shape`` itself, one that is repeated along axes to get it, or
            ((2w - 1)^2, H).
        shape: The shape in the file; for a table ([1,] H, w^2, w^2), (w^2, w^2, H) or (w^4, H).
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
    flat = table[_relative_positions(side).to(table.device)]
    square = flat.reshape(area, area, heads)
    if target == (area * area, heads):
        return flat
    if target == (area, area, heads) and area != heads:
        return square
    if target in ((heads, area, area), (1, heads, area, area)):
        return square.permute(2, 0, 1).reshape(target)
    return None


def _relative_positions(side: int) -> torch.Tensor:
    """Row of the table for every pair of positions of a window, (w^4,): first the row difference, then the column's."""
    place = torch.arange(side)
    difference = place[:, None] - place[None, :] + side - 1  # (w, w), from 0 to 2w - 2
    rows = difference[:, None, :, None] * (2 * side - 1)
    columns = difference[None, :, None, :]
    return (rows + columns).reshape(-1)
