"""From an ONNX file to a ``Network``: which axes are the same channels.

The nodes are walked once. Weights are values too, so a transposed or reshaped weight needs no rule of its own.
``operators`` says what each operator does with axes; one that it does not know pins every group it touches.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable

from ghn_service.errors import GhnServiceError, LimitExceededError
from ghn_service.graph.architecture import ParameterSpec, ParameterUse
from ghn_service.graph.onnx.file import FLOAT, FLOAT_TYPES, OnnxFile, OnnxNode, TensorHeader, load_file
from ghn_service.graph.onnx.values import ReadContext
from ghn_service.graph.raw_graph import GraphLimits, never_ends
from ghn_service.transfer.axes import Dim, nesting
from ghn_service.transfer.folding import MAX_RANK, constant, fold
from ghn_service.transfer.network import Network, NotUnderstoodError, Tensor, Value
from ghn_service.transfer.operators import HANDLERS, SHAPE_ONLY
from ghn_service.transfer.work import MAX_NESTING, spend

_BIAS = 2
"""Which input of Conv and Gemm the bias is."""
_MAX_INPUTS = 64
_MAX_ORIGINS = 64
_MALFORMED = (
    NotUnderstoodError, ValueError, IndexError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError
)  # fmt: skip


def read_network(
    data: bytes,
    limits: GraphLimits,
    field_name: str,
    parameters: Iterable[ParameterSpec] = (),
    *,
    check: Callable[[], None] = never_ends,
) -> Network:
    """The channel groups of an ONNX model, in which every one of its ``parameters`` is a tensor of its own.

    ``check`` is called every few milliseconds while the file is read; what axes cost is counted by the caller, in
    ``counted_work``.

    Raises:
        InvalidArchitectureError, UnsupportedArchitectureError, LimitExceededError: As ``read_onnx``.
    """
    try:
        file = load_file(data, limits, check)
        _separate(file, parameters)
        context = ReadContext(file, limits, check)
        return _read(context)
    except GhnServiceError as error:
        error.field = error.field or field_name
        raise


def _read(context: ReadContext) -> Network:
    network = Network(context.file)
    for index, node in enumerate(context.file.nodes):
        if node.domain and not node.inputs:  # whatever it is called, it is no operator of the standard's
            node.op_type = f"{node.domain}::{node.op_type}"
        for name in node.inputs:
            network.consumers.setdefault(name, []).append(index)
    _read_inputs(network, context)
    for node in context.file.nodes:
        _read_node(network, node)
    for tensor in network.tensors.values():
        if any(nesting(axis) > MAX_NESTING for axis in tensor.axes):
            raise LimitExceededError(
                f"the channels of {tensor.name!r} are joined and split over and over, more than {MAX_NESTING} times;"
                " ask without a source"
            )
    return network


def _separate(file: OnnxFile, parameters: Iterable[ParameterSpec]) -> None:
    """Gives parameters that the exporter merged as equal, or dropped as zero, back to the nodes that use them."""
    renamed = {use: spec for spec in parameters if spec.name != spec.initializer for use in spec.uses}
    if not renamed:
        return
    for node in file.nodes:
        for index in range(max(len(node.inputs), _BIAS + 1)):
            spec = renamed.get(ParameterUse(node.label, index))
            held = node.inputs[index] if index < len(node.inputs) else ""
            maker = file.producers.get(held)
            shared = maker.inputs[0] if maker is not None and maker.op_type == "Identity" and maker.inputs else held
            if spec is None or shared != spec.initializer:
                continue
            header = file.initializers.get(shared)
            if held and (header is None or header.shape != spec.shape):
                continue  # given in another shape than the file's
            data_type = header.data_type if header is not None else FLOAT
            file.initializers[spec.name] = TensorHeader(spec.name, data_type, spec.shape)
            file.kinds[spec.name] = "PARAMETER"
            file.producers.pop(spec.name, None)
            node.inputs += [""] * (index + 1 - len(node.inputs))
            node.inputs[index] = spec.name
    file.nodes = [node for node in file.nodes if not file.producers.keys().isdisjoint(node.outputs)]  # no mere aliases


def _read_inputs(network: Network, context: ReadContext) -> None:
    file = network.file
    inputs = []
    for header in (*file.initializers.values(), *file.inputs):
        if header.name in file.initializers or header.name in file.kinds or header.name in context.patterns.input_kinds:
            network.values[header.name] = _weight(network, context, header)
            continue
        inputs.append(header.name)
        value = network.values[header.name] = Value(None)
        if header.shape is not None:
            channels = 1 if len(header.shape) > 2 else None
            value.axes = [Dim(max(size, 1), "pinned") for size in header.shape]
            for axis in (axis for i, axis in enumerate(value.axes) if i != channels):
                axis.flags.add("position")
    network.input = _main_input(network, inputs)
    if network.input:
        network.values[network.input].is_data = True


def _weight(network: Network, context: ReadContext, header: TensorHeader) -> Value:
    name, shape = header.name, header.shape
    assert shape is not None, "checked by ReadContext"
    if header.data_type not in FLOAT_TYPES or math.prod(shape) <= 0:
        return Value([Dim(size, "pinned") for size in shape], constant(network.file, name, shape))
    kind = context.kind_of(name, shape)
    is_vector = sum(size > 1 for size in shape) == 1 and name in network.file.initializers
    is_weight = kind in ("", "PARAMETER") or (kind == "CONSTANT" and is_vector)  # folded from a reshaped parameter
    tensor = Tensor(name, shape, [Dim(size) for size in shape], "parameter" if is_weight else "constant")
    tensor.is_buffer = kind == "BUFFER"
    network.tensors[name] = tensor
    return Value(tensor.axes, tensor=tensor, axis_of=list(range(len(shape))))


def _main_input(network: Network, inputs: list[str]) -> str:
    """The input that most values depend on, the first among equals."""
    inputs = inputs[:_MAX_INPUTS]
    reached = {name: 1 << i for i, name in enumerate(inputs)}  # by value, one bit for each input behind it
    for node in network.file.nodes:
        bits = functools.reduce(operator.or_, (reached.get(name, 0) for name in node.inputs), 0)
        if bits and node.op_type not in SHAPE_ONLY:
            reached.update((name, bits) for name in node.outputs if name)
    alike = Counter(reached.values())
    counts = [sum(count for bits, count in alike.items() if bits >> i & 1) for i in range(len(inputs))]
    return inputs[counts.index(max(counts))] if inputs else ""


def _read_node(network: Network, node: OnnxNode) -> None:
    operands = [network.values[name] for name in node.inputs]
    spend(1 + len(node.outputs) + sum(1 + len(value.origins) for value in operands))
    handler = HANDLERS.get(node.op_type) if node.domain in ("", "com.microsoft") else None
    results: list[Value] = []
    try:
        if handler is None:
            raise NotUnderstoodError
        results = handler(network, node, operands)
    except _MALFORMED:
        for value in operands:
            for axis in value.axes or ():
                axis.mark("pinned")
    is_shape = node.op_type in SHAPE_ONLY
    read = [value for name, value in zip(node.inputs, operands, strict=True) if name]
    if node.op_type == "CastLike":
        read = read[:1]
    is_data = not is_shape and any(value.is_data for value in read)
    if is_data:
        _meet(network, node, operands)
    origins = () if is_data or is_shape else tuple(dict.fromkeys(item for value in operands for item in value.origins))
    known = fold(node, [value.known for value in read])
    for position, name in enumerate(node.outputs):
        if name:
            value = results[position] if position < len(results) else Value(None)
            if value.axes is None or len(value.axes) > MAX_RANK:
                value.axes = _stated_axes(network, name)
            if known is not None and not position:
                value.known = known
                spend(known.size)
            value.is_data = is_data
            value.made_from = origins[:_MAX_ORIGINS] if value.tensor is None else ()
            network.values[name] = value


def _stated_axes(network: Network, name: str) -> list[Dim] | None:
    """Axes of the shape that the file states for a value."""
    shape = network.file.value_shape(name)
    if shape is None or len(shape) > MAX_RANK or min(shape, default=0) < 0:
        return None
    return [Dim(size, "pinned") for size in shape]


def _meet(network: Network, node: OnnxNode, operands: list[Value]) -> None:
    """Makes layers of tensors that meet data here and that no handler has given one."""
    for tensor in (item for value in operands if not value.is_data for item in value.origins):
        if tensor.layer is None and tensor.kind == "parameter":
            is_table = bool(tensor.axes) and "rows" in tensor.axes[0].root().flags
            kind = "token" if node.op_type == "Concat" else "table" if is_table else "other"
            network.add_layer(node, kind, {"weight": tensor})
