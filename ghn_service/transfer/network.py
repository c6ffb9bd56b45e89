"""A network as channel groups: every operator of an ONNX file says which axes are the same channels.

``read_network`` walks the nodes once. A value has a ``Dim`` per axis; weights are values too, so a transposed or
reshaped weight needs no rule of its own. What an operator does with channels is one function per kind of operator;
an operator without one pins every group it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

from ghn_service.errors import GhnServiceError
from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxFile, OnnxNode, constant_number, load_file
from ghn_service.graph.onnx.values import ReadContext
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.transfer.axes import Dim, concatenation, reshaped, split_sum, unify

MAX_RANK = 16
_MAX_INTEGERS = 4096
Kind = str
"""conv, deconv, linear, norm (with statistics), layer_norm, scale, shift, table, token or other."""


@dataclass(eq=False, slots=True)
class Tensor:
    """A float tensor of the file.

    Attributes:
        axes: One dim per axis.
        kind: ``parameter``, ``statistic`` of a norm, or ``constant``.
        contracted: Axes that are summed over with the network's data (fan-in).
        layer: The first layer that reads it.
        is_looked_up: Whether it is a table whose rows data selects; then nothing may change its scale.
        fed_by: Values that are multiplied with it.
    """

    name: str
    shape: tuple[int, ...]
    axes: list[Dim]
    kind: str
    contracted: set[int] = field(default_factory=set)
    layer: Layer | None = None
    is_looked_up: bool = False
    fed_by: list[str] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Value:
    """What is known of a value: axes (None if unknown), integers of a small constant, and where it comes from.

    Attributes:
        tensor: The tensor that it is a mere view of.
        axis_of: For a view, the tensor's axis behind each axis.
        waiting: Tensors that it was computed from, not yet met by data.
        is_data: Whether it depends on the network's input.
        number: The number that it holds, if it is a known single one.
        pieces: The members of a sequence.
    """

    axes: list[Dim] | None
    ints: numpy.ndarray | None = None
    tensor: Tensor | None = None
    axis_of: list[int | None] = field(default_factory=list)
    waiting: tuple[Tensor, ...] = ()
    is_data: bool = False
    number: float | None = None
    pieces: tuple[Value, ...] = ()


@dataclass(eq=False, slots=True)
class Layer:
    """A place where weights meet data.

    Attributes:
        index: Position of the node in the file.
        tensors: By role: ``weight``, ``bias``, ``mean``, ``var``.
        output: Name of the value that it makes.
        groups: Of a convolution.
        placement: Of a convolution, per spatial axis: kernel, stride, dilation, pixels of padding before.
    """

    kind: Kind
    index: int
    node: OnnxNode
    tensors: dict[str, Tensor]
    output: str
    groups: int = 1
    placement: tuple[tuple[int, int, int, int], ...] = ()
    epsilon: float = 0.0

    @property
    def label(self) -> str:
        """What people call it: the common stem of its tensors' names."""
        return next(iter(self.tensors.values())).name.rpartition(".")[0] or self.node.label


@dataclass(eq=False, slots=True)
class Network:
    """A file, read: values, tensors and layers in the order of the file."""

    file: OnnxFile
    values: dict[str, Value]
    tensors: dict[str, Tensor]
    layers: list[Layer]
    input: str
    consumers: dict[str, list[int]]
    even_axes: list[Dim]


def read_network(data: bytes, limits: GraphLimits, field_name: str) -> Network:
    """The channel groups of an ONNX model.

    Raises:
        InvalidArchitectureError, UnsupportedArchitectureError, LimitExceededError: As ``read_onnx``.
    """
    try:
        context = ReadContext(load_file(data, limits), limits)
        return _Reader(context).read()
    except GhnServiceError as error:
        error.field = error.field or field_name
        raise


class _Reader:
    """The state of one reading."""

    def __init__(self, context: ReadContext) -> None:
        self.file = file = context.file
        self.values: dict[str, Value] = {"": Value(None)}
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[Layer] = []
        self.made_by: dict[str, Layer] = {}
        self.even_axes: list[Dim] = []
        self.consumers: dict[str, list[int]] = {}
        for index, node in enumerate(file.nodes):
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(index)
        inputs = []
        for header in (*file.initializers.values(), *file.inputs):
            name, shape = header.name, header.shape
            if name in file.initializers or name in file.kinds or name in context.patterns.input_kinds:
                assert shape is not None
                self.values[name] = self._constant_tensor(context, name, shape, header.data_type in FLOAT_TYPES)
            else:
                inputs.append(name)
                axes = None if shape is None else [Dim(max(size, 1), position=i != 1) for i, size in enumerate(shape)]
                self.values[name] = Value(axes)
        for name in inputs:
            for i, dim in enumerate(self.values[name].axes or ()):
                dim.is_pinned = True
                dim.is_position = i != 1 or len(self.values[name].axes or ()) < 3
        self.input = self._main_input(inputs)
        if self.input:
            self.values[self.input].is_data = True

    def _constant_tensor(self, context: ReadContext, name: str, shape: tuple[int, ...], is_float: bool) -> Value:
        if not is_float or math.prod(shape) <= 0:
            integers = self.file.integers(name)
            array = numpy.array(integers, dtype=numpy.int64).reshape(shape) if integers is not None else None
            return Value([Dim(size, pinned=True) for size in shape], array)
        kind = context.kind_of(name, shape)
        is_vector = sum(size > 1 for size in shape) == 1 and name in self.file.initializers
        is_weight = kind in ("", "PARAMETER") or (kind == "CONSTANT" and is_vector)  # folded from a reshaped parameter
        tensor = Tensor(name, shape, [Dim(size) for size in shape], "parameter" if is_weight else "constant")
        self.tensors[name] = tensor
        return Value(tensor.axes, tensor=tensor, axis_of=list(range(len(shape))))

    def _main_input(self, inputs: list[str]) -> str:
        """The input that most nodes depend on."""
        best, most = "", -1
        for name in inputs:
            reached = {name}
            for node in self.file.nodes:
                if node.op_type not in _SHAPE_ONLY and any(item in reached for item in node.inputs):
                    reached.update(node.outputs)
            if len(reached) > most:
                best, most = name, len(reached)
        return best

    def read(self) -> Network:
        for index, node in enumerate(self.file.nodes):
            operands = [self.values[name] for name in node.inputs]
            self.index = index
            ints = _fold(node, operands)
            handler = _HANDLERS.get(node.op_type) if node.domain in ("", "com.microsoft") else None
            try:
                results = (handler or _unknown)(self, node, operands)
            except (ValueError, IndexError, TypeError, AttributeError, KeyError, ZeroDivisionError, OverflowError):
                results = _unknown(self, node, operands)  # malformed in one of many ways: its groups are not mapped
            sources = operands[:1] if node.op_type == "CastLike" else operands
            is_data = any(value.is_data for value in sources) and node.op_type not in _SHAPE_ONLY
            self._meet(node, operands, is_data)
            is_apart = is_data or node.op_type in _SHAPE_ONLY
            waiting = () if is_apart else tuple(dict.fromkeys(t for v in operands for t in _origins(v)))[:64]
            for position, name in enumerate(node.outputs):
                if not name:
                    continue
                value = results[position] if position < len(results) else Value(None)
                if value.axes is None or len(value.axes) > MAX_RANK:
                    shape = self.file.value_shape(name)
                    value.axes = None
                    if shape is not None and len(shape) <= MAX_RANK and min(shape, default=1) >= 0:
                        value.axes = [Dim(size, pinned=True) for size in shape]
                if position == 0 and ints is not None:
                    value.ints = ints
                value.is_data = is_data
                value.number = None if is_data or position else _number(node, operands, ints)
                value.waiting = waiting if value.tensor is None else ()
                self.values[name] = value
        return Network(self.file, self.values, self.tensors, self.layers, self.input, self.consumers, self.even_axes)

    def _meet(self, node: OnnxNode, operands: list[Value], is_data: bool) -> None:
        """Records tensors that meet data here and that no handler has given a layer."""
        if not is_data:
            return
        for value in operands:
            if value.is_data:
                continue
            for tensor in _origins(value):
                if tensor.layer is None and tensor.kind == "parameter":
                    kind = (
                        "token"
                        if node.op_type == "Concat"
                        else "table"
                        if tensor.axes and tensor.axes[0].root().is_rows
                        else "other"
                    )
                    self.add_layer(node, kind, {"weight": tensor})

    def add_layer(self, node: OnnxNode, kind: Kind, tensors: dict[str, Tensor | None], **facts: object) -> Layer | None:
        present = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        if not present:
            return None
        layer = Layer(kind, self.index, node, present, node.outputs[0], **facts)  # type: ignore[arg-type]
        for role, tensor in present.items():
            tensor.kind = "statistic" if role in ("mean", "var") else "parameter"
            tensor.layer = tensor.layer or layer
        self.layers.append(layer)
        self.made_by[node.outputs[0]] = layer
        return layer

    def weight(self, operands: list[Value], index: int) -> Tensor | None:
        """The tensor of a weight operand; a weight that is computed from others pins what it touches."""
        value = operands[index] if index < len(operands) else None
        if value is None or value.is_data:
            return None
        if value.tensor is None:
            for tensor in value.waiting:
                for axis in tensor.axes:
                    axis.mark("pinned")
        return value.tensor


def _origins(value: Value) -> tuple[Tensor, ...]:
    return (value.tensor,) if value.tensor is not None else value.waiting


# ---- what operators do with axes ------------------------------------------------------------------------------------

_Handler = Callable[[_Reader, OnnxNode, list[Value]], Sequence[Value]]


def _pin(*values: Value) -> None:
    for value in values:
        for axis in value.axes or ():
            axis.mark("pinned")


def _known(*values: Value) -> bool:
    """Whether all axes are known; otherwise what is known gets pinned."""
    if all(value.axes is not None for value in values):
        return True
    _pin(*values)
    return False


def _unknown(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    _pin(*operands)
    return []


def _same(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Element by element on one operand."""
    return [Value(operands[0].axes)]


def _view(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """The same elements under another name or type."""
    value = operands[0]
    return [Value(value.axes, value.ints, value.tensor, value.axis_of)]


def _broadcast(operands: list[Value]) -> list[Dim] | None:
    if not _known(*operands):
        return None
    rank = max((len(value.axes or ()) for value in operands), default=0)
    axes: list[Dim] = []
    for position in range(-rank, 0):
        dims = [(value, (value.axes or ())[position]) for value in operands if len(value.axes or ()) >= -position]
        wide = [dim for _, dim in dims if dim.size != 1]
        for value, dim in dims:
            if dim.size != 1 and value.tensor is not None and value.tensor.kind == "constant":
                dim.mark("pinned")
        for dim in wide[1:]:
            if dim.size != wide[0].size:
                _pin(*operands)
                return None
            unify(wide[0], dim)
        axes.append(wide[0] if wide else Dim(1))
    return axes


def _elementwise(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Element by element on several operands, with broadcasting; a bias joins the product before it."""
    axes = _broadcast(operands)
    tensors = [value.tensor for value in operands if value.tensor is not None and value.tensor.kind == "parameter"]
    names = [name for name, value in zip(node.inputs, operands, strict=True) if value.is_data]
    if len(tensors) == 1 and len(names) == 1:
        before = reader.made_by.get(names[0])
        is_bias = node.op_type == "Add" and before is not None and before.kind == "linear"
        is_bias = is_bias and tensors[0].layer is None and math.prod(tensors[0].shape) == tensors[0].shape[-1]
        if is_bias and before is not None and "bias" not in before.tensors and len(reader.consumers[names[0]]) == 1:
            before.tensors["bias"], before.output = tensors[0], node.outputs[0]
            tensors[0].layer = before
            reader.made_by[node.outputs[0]] = before
        else:
            kind = {"Add": "shift", "Sub": "shift", "Mul": "scale"}.get(node.op_type, "other")
            reader.add_layer(node, kind, {"weight": tensors[0]})
    return [Value(axes)]


def _padding(node: OnnxNode, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """Per spatial axis: kernel, stride, dilation, padding before and after."""
    count = len(kernel)
    strides = node.integers("strides") or (1,) * count
    dilations = node.integers("dilations") or (1,) * count
    pads = node.integers("pads") or (0,) * (2 * count)
    result = []
    for i in range(count):
        before, after = pads[i], pads[i + count]
        mode = node.text("auto_pad")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            reach = dilations[i] * (kernel[i] - 1) + 1
            total = max((math.ceil(sizes[i] / strides[i]) - 1) * strides[i] + reach - sizes[i], 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
            after = total - before
        elif mode == "VALID":
            before = after = 0
        result.append((kernel[i], strides[i], dilations[i], before, after))
    return result


def _slid(node: OnnxNode, axes: Sequence[Dim], kernel: Sequence[int]) -> list[Dim]:
    """Spatial axes after a window slid over them."""
    up = node.integer("ceil_mode", 0)
    result = []
    for (size, stride, dilation, before, after), axis in zip(
        _padding(node, [axis.size for axis in axes], kernel), axes, strict=True
    ):
        room = axis.size + before + after - dilation * (size - 1) - 1
        result.append(Dim(max((room + (stride - 1 if up else 0)) // stride + 1, 1), position=True))
    return result


def _convolution(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    weight, bias = reader.weight(operands, 1), reader.weight(operands, 2)
    if not _known(*operands[:2]):
        return []
    data, kernel = operands[0].axes or [], operands[1].axes or []
    groups = node.integer("group", 1)
    out, per_group = kernel[0], kernel[1]
    if operands[1].tensor is None or operands[1].axis_of != list(range(len(kernel))):
        _pin(operands[1])
    if groups == 1:
        unify(data[1], per_group)
    elif per_group.size == 1 and out.size == groups:
        unify(data[1], out)
    else:
        channels = reshaped([data[1]], [groups, per_group.size])
        rows = reshaped([out], [groups, out.size // groups])
        unify(channels[0], rows[0])
        unify(channels[1], per_group)
    if len(operands) > 2 and operands[2].axes:
        unify(operands[2].axes[0], out)
    sizes, windows = [axis.size for axis in data[2:]], [axis.size for axis in kernel[2:]]
    for axis in kernel[2:]:
        axis.is_position = True
    placement = [item[:4] for item in _padding(node, sizes, windows)]
    padded = reader.file.producers.get(node.inputs[0])
    if padded is not None and padded.op_type == "Pad" and len(reader.consumers[node.inputs[0]]) == 1:
        pads = _pads(reader, padded, len(data))
        if pads is not None and padded.text("mode") in ("", "constant"):
            placement = [(*item[:3], item[3] + pads[2 + i]) for i, item in enumerate(placement)]
    if weight is not None:
        weight.contracted.add(1)
        reader.add_layer(node, "conv", {"weight": weight, "bias": bias}, groups=groups, placement=tuple(placement))
    return [Value([data[0], out, *_slid(node, data[2:], windows)])]


def _pads(reader: _Reader, node: OnnxNode, rank: int) -> list[int] | None:
    """Pixels of padding: before each axis, then after each."""
    pads = list(node.integers("pads")) or None
    if pads is None and len(node.inputs) > 1 and reader.values[node.inputs[1]].ints is not None:
        pads = [int(item) for item in reader.values[node.inputs[1]].ints.flatten()]  # type: ignore[union-attr]
    if pads is not None and len(node.inputs) > 3 and node.inputs[3]:
        axes = reader.values[node.inputs[3]].ints
        if axes is None:
            return None
        full = [0] * (2 * rank)
        for i, axis in enumerate(axes.flatten()):
            full[int(axis) % rank], full[int(axis) % rank + rank] = pads[i], pads[i + len(axes.flatten())]
        pads = full
    return pads if pads is not None and len(pads) == 2 * rank else None


def _pad(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(operands[0]):
        return []
    axes = list(operands[0].axes or [])
    pads = _pads(reader, node, len(axes))
    if pads is None:
        return _unknown(reader, node, operands[:1])
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        if before or after:
            if min(before, after) < 0 or all(leaf.is_position for leaf in axis.leaves()):
                axes[i] = Dim(axis.size + before + after, position=True)
            else:
                parts = [Dim(size) for size in (before, after)]
                axes[i] = concatenation([*parts[: before > 0], axis, *parts[2 - (after > 0) :]])
    return [Value(axes)]


def _transposed_convolution(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    weight, bias = reader.weight(operands, 1), reader.weight(operands, 2)
    if node.integer("group", 1) != 1 or not _known(*operands[:2]):
        return _unknown(reader, node, operands)
    kernel = operands[1].axes or []
    unify((operands[0].axes or [])[1], kernel[0])
    for axis in kernel[2:]:
        axis.is_position = axis.is_pinned = True
    if len(operands) > 2 and operands[2].axes:
        unify(operands[2].axes[0], kernel[1])
    if weight is not None:
        weight.contracted.add(0)
        reader.add_layer(node, "deconv", {"weight": weight, "bias": bias})
    shape = reader.file.value_shape(node.outputs[0])
    spatial = shape[2:] if shape is not None else [0] * len(kernel[2:])
    return [Value([(operands[0].axes or [])[0], kernel[1], *(Dim(max(size, 1), position=True) for size in spatial)])]


def _linear(reader: _Reader, node: OnnxNode, operands: list[Value], pairs: list[tuple[int, int]]) -> None:
    """Unifies axes that two operands are summed over together, ``(axis of 0, axis of 1)``; notes who is fan-in."""
    for first, second in pairs:
        dims = (operands[0].axes or [])[first], (operands[1].axes or [])[second]
        unify(*dims)
        both_data = True
        for operand, axis in ((operands[0], first), (operands[1], second)):
            if operand.is_data or not _origins(operand):
                continue
            both_data = False
            origin = operand.axis_of[axis] if operand.tensor is not None else None
            if operand.tensor is not None and origin is not None:
                operand.tensor.contracted.add(origin)
                operand.tensor.fed_by.append(node.inputs[1 if operand is operands[0] else 0])
            else:
                reader.weight([operand], 0)
                dims[0].mark("pinned")
        if both_data:
            dims[0].mark("dotted")


def _matmul(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands[:2]):
        return []
    a, b = operands[0].axes or [], operands[1].axes or []
    _linear(reader, node, operands, [(len(a) - 1, max(len(b) - 2, 0))])
    batch = _broadcast([Value(a[:-2]), Value(b[:-2])])
    tensors = [value.tensor for value in operands[:2] if not value.is_data and value.tensor is not None]
    if len(tensors) == 1 and any(value.is_data for value in operands):
        reader.add_layer(node, "linear", {"weight": tensors[0]})
    if batch is None:
        return []
    return [Value([*batch, *([a[-2]] if len(a) > 1 else []), *([b[-1]] if len(b) > 1 else [])])]


def _gemm(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands):
        return []
    a, b = operands[0].axes or [], operands[1].axes or []
    first, second = (0 if node.integer("transA", 0) else 1), (1 if node.integer("transB", 0) else 0)
    _linear(reader, node, operands, [(first, second)])
    out = [a[1 - first], b[1 - second]]
    weight, bias = reader.weight(operands, 1), reader.weight(operands, 2)
    if len(operands) > 2 and operands[2].axes is not None:
        _broadcast([Value(out), operands[2]])
    if any(value.is_data for value in operands[:2]):
        reader.add_layer(node, "linear", {"weight": weight, "bias": bias})
    return [Value(out)]


def _einsum(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    equation = node.text("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(operands) or len(operands) != 2 or "." in equation or not _known(*operands):
        return _unknown(reader, node, operands)
    found: dict[str, Dim] = {}
    for term, value in zip(terms, operands, strict=True):
        for letter, dim in zip(term, value.axes or [], strict=True):
            if letter in found:
                unify(found[letter], dim)
            found.setdefault(letter, dim)
    shared = [letter for letter in terms[0] if letter in terms[1] and letter not in right]
    _linear(reader, node, operands, [(terms[0].index(letter), terms[1].index(letter)) for letter in shared])
    tensors = [value.tensor for value in operands if not value.is_data and value.tensor is not None]
    if len(tensors) == 1 and any(value.is_data for value in operands):
        reader.add_layer(node, "linear", {"weight": tensors[0]})
    return [Value([found[letter] for letter in right])]


def _batch_norm(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands[:5]):
        return []
    channels = (operands[0].axes or [])[1]
    for value in operands[1:5]:
        unify(channels, (value.axes or [])[0])
    names = ("weight", "bias", "mean", "var")
    tensors = {name: reader.weight(operands, i + 1) for i, name in enumerate(names)}
    epsilon = node.attributes["epsilon"].f if "epsilon" in node.attributes else 1e-5
    reader.add_layer(node, "norm", tensors, epsilon=epsilon)
    return [Value(operands[0].axes)]


def _layer_norm(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands):
        return []
    axes = operands[0].axes or []
    start = node.integer("axis", -1) % max(len(axes), 1)
    if node.op_type == "InstanceNormalization":
        start = 2
        for value in operands[1:]:
            unify(axes[1], (value.axes or [])[0])
    else:
        _broadcast(operands)
    for axis in axes[start:]:
        axis.mark("even")
        reader.even_axes.append(axis)
    epsilon = node.attributes["epsilon"].f if "epsilon" in node.attributes else 1e-5
    tensors = {name: reader.weight(operands, i + 1) for i, name in enumerate(("weight", "bias"))}
    tensors = {name: t for name, t in tensors.items() if t is not None and t.kind == "parameter"}
    reader.add_layer(node, "layer_norm", tensors, epsilon=epsilon)
    return [Value(axes)]


def _group_norm(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands):
        return []
    axes = operands[0].axes or []
    groups = reshaped([axes[1]], [node.integer("num_groups", 1), axes[1].size // node.integer("num_groups", 1)])
    groups[1].mark("even")
    for value in operands[1:3]:
        unify((value.axes or [])[0], axes[1] if (value.axes or [])[0].size == axes[1].size else groups[0])
    epsilon = node.attributes["epsilon"].f if "epsilon" in node.attributes else 1e-5
    tensors = {name: reader.weight(operands, i + 1) for i, name in enumerate(("weight", "bias"))}
    reader.add_layer(node, "layer_norm", tensors, epsilon=epsilon)
    return [Value(axes)]


def _pool(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(operands[0]):
        return []
    axes = operands[0].axes or []
    if node.op_type.startswith("Global"):
        return [Value([*axes[:2], *(Dim(1) for _ in axes[2:])])]
    return [Value([*axes[:2], *_slid(node, axes[2:], node.integers("kernel_shape"))])]


def _listed_axes(node: OnnxNode, operands: list[Value], rank: int, position: int = 1) -> list[int] | None:
    """The axes that an operator names, as attribute or operand; all if it names none, None if they are unknown."""
    if "axes" in node.attributes:
        axes = list(node.integers("axes"))
    elif len(operands) > position and node.inputs[position]:
        if operands[position].ints is None:
            return None
        axes = [int(item) for item in operands[position].ints.flatten()]  # type: ignore[union-attr]
    else:
        axes = list(range(rank))
    return [axis % rank if rank else 0 for axis in axes]


def _reduce(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(operands[0]):
        return []
    dims = operands[0].axes or []
    axes = _listed_axes(node, operands, len(dims))
    if axes is None:
        return _unknown(reader, node, operands)
    for axis in axes:
        dims[axis].mark("even" if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin") else "pinned")
        reader.even_axes.append(dims[axis])
    keep = node.integer("keepdims", 1)
    kept = [Dim(1) if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes]
    return [Value(kept)]


def _softmax(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    axes = operands[0].axes
    if axes:
        axes[node.integer("axis", -1)].mark("pinned")
    return [Value(axes)]


def _reshape(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value):
        return []
    dims = value.axes or []
    sizes = _new_sizes(reader, node, operands, [dim.size for dim in dims])
    if sizes is None or math.prod(sizes) != math.prod(dim.size for dim in dims) or len(sizes) > MAX_RANK:
        return _unknown(reader, node, operands[:1])
    axes = reshaped(dims, sizes)
    if value.tensor is None:
        return [Value(axes)]
    wide = [axis for axis, dim in zip(value.axis_of, dims, strict=True) if dim.size != 1]
    origins: list[int | None] = [None] * len(sizes)
    if [size for size in sizes if size != 1] == [dim.size for dim in dims if dim.size != 1]:  # only ones came or went
        waiting = iter(wide)
        origins = [next(waiting) if size != 1 else None for size in sizes]
    elif len(wide) == 1:
        origins = [wide[0] if size != 1 else None for size in sizes]
    return [Value(axes, None, value.tensor, origins)]


def _new_sizes(reader: _Reader, node: OnnxNode, operands: list[Value], old: list[int]) -> list[int] | None:
    """The shape that a Reshape, Flatten, Squeeze or Unsqueeze makes."""
    if node.op_type == "Flatten":
        axis = node.integer("axis", 1) % (len(old) + 1) if node.integer("axis", 1) >= 0 else node.integer("axis", 1)
        return [math.prod(old[:axis]), math.prod(old[axis:])]
    if node.op_type == "Squeeze":
        axes = _listed_axes(node, operands, len(old))
        named = len(operands) > 1 or "axes" in node.attributes
        return None if axes is None else [n for i, n in enumerate(old) if i not in axes or (not named and n != 1)]
    if node.op_type == "Unsqueeze":
        given = node.integers("axes") or (operands[1].ints if len(operands) > 1 else None)
        if given is None:
            return None
        rank = len(old) + len(tuple(numpy.ravel(given)))
        new, waiting = {int(axis) % rank for axis in numpy.ravel(given)}, iter(old)
        return [1 if i in new else next(waiting) for i in range(rank)]
    if len(operands) < 2 or operands[1].ints is None:
        shape = reader.file.value_shape(node.outputs[0])
        return None if shape is None else list(shape)
    sizes = [int(item) for item in operands[1].ints.flatten()]
    if not node.integer("allowzero", 0):
        sizes = [old[i] if size == 0 and i < len(old) else size for i, size in enumerate(sizes)]
    if -1 in sizes:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = math.prod(old) // rest if rest > 0 else 0
    return sizes if min(sizes, default=1) > 0 else None


def _transpose(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value):
        return []
    dims = value.axes or []
    order = node.integers("perm") or tuple(reversed(range(len(dims))))
    if sorted(order) != list(range(len(dims))):
        return _unknown(reader, node, operands)
    axis_of = [value.axis_of[i] for i in order] if value.tensor is not None else []
    return [Value([dims[i] for i in order], None, value.tensor, axis_of)]


def _expand(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value) or operands[1].ints is None:
        return _unknown(reader, node, operands[:1])
    dims, sizes = list(value.axes or []), [int(size) for size in operands[1].ints.flatten()]
    rank = max(len(dims), len(sizes))
    if rank > MAX_RANK:
        return _unknown(reader, node, operands[:1])
    dims = [Dim(1)] * (rank - len(dims)) + dims
    sizes = [1] * (rank - len(sizes)) + sizes
    axes = [dim if size in (1, -1) or dim.size == size else Dim(size) for dim, size in zip(dims, sizes, strict=True)]
    pad: list[int | None] = [None] * (rank - len(value.axis_of))
    return [Value(axes, None, value.tensor, [*pad, *value.axis_of] if value.tensor is not None else [])]


def _concat(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if not _known(*operands):
        return []
    rank = len(operands[0].axes or [])
    axis = node.integer("axis", 0) % max(rank, 1)
    axes: list[Dim] = []
    for i in range(rank):
        dims = [(value.axes or [])[i] for value in operands]
        if i == axis:
            axes.append(concatenation(dims))
            continue
        wide = [dim for dim in dims if dim.size != 1] or dims[:1]
        for dim in wide[1:]:
            unify(wide[0], dim)
        axes.append(wide[0])
    return [Value(axes)]


def _cut(axis: Dim, sizes: Sequence[int]) -> list[Dim]:
    """An axis in consecutive pieces; pixels and tokens have no identity that is worth keeping."""
    leaves = axis.leaves()
    if leaves and all(leaf.is_position for leaf in leaves):
        return [Dim(size, position=True) for size in sizes]
    wanted = [size for size in sizes if size]
    pieces = split_sum(axis, wanted) if sum(sizes) == axis.size else None
    if pieces is None:
        axis.mark("pinned")
        return [Dim(size, pinned=True) for size in sizes]
    waiting = iter(pieces)
    return [next(waiting) if size else Dim(0, pinned=True) for size in sizes]


def _split(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value):
        return []
    dims = value.axes or []
    axis = node.integer("axis", 0) % max(len(dims), 1)
    count = len(node.outputs)
    sizes = list(node.integers("split"))
    if not sizes and len(operands) > 1 and operands[1].ints is not None:
        sizes = [int(size) for size in operands[1].ints.flatten()]
    if not sizes:
        each = -(-dims[axis].size // count)
        sizes = [min(each, dims[axis].size - i * each) for i in range(count)]
    pieces = _cut(dims[axis], sizes)
    return [Value([*dims[:axis], piece, *dims[axis + 1 :]], None, value.tensor, value.axis_of) for piece in pieces]


def _split_to_sequence(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value) or len(operands) < 2 or operands[1].ints is None:
        return _unknown(reader, node, operands[:1])
    dims = value.axes or []
    axis = node.integer("axis", 0) % max(len(dims), 1)
    sizes = [int(size) for size in operands[1].ints.flatten()]
    if operands[1].ints.ndim == 0 and sizes[0] > 0:
        whole, rest = divmod(dims[axis].size, sizes[0])
        sizes = [sizes[0]] * min(whole, _MAX_INTEGERS) + ([rest] if rest else [])
    pieces = _cut(dims[axis], sizes)
    return [Value(None, pieces=tuple(Value([*dims[:axis], piece, *dims[axis + 1 :]]) for piece in pieces))]


def _sequence_at(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    if operands[1].ints is None:
        return []
    return [Value(operands[0].pieces[int(operands[1].ints.flatten()[0])].axes)]


def _slice(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value = operands[0]
    if not _known(value):
        return []
    dims = list(value.axes or [])
    named: dict[str, tuple[int, ...]] = {
        name: node.integers(name) for name in ("starts", "ends", "axes") if name in node.attributes
    }
    for position, name in enumerate(("starts", "ends", "axes", "steps"), start=1):
        if len(operands) > position and node.inputs[position]:
            if operands[position].ints is None:
                return _unknown(reader, node, operands[:1])
            named[name] = tuple(int(item) for item in operands[position].ints.flatten())  # type: ignore[union-attr]
    axes = named.get("axes", tuple(range(len(named["starts"]))))
    for i, axis in enumerate(axes):
        dim, step = dims[axis], named.get("steps", (1,) * len(axes))[i]
        chosen = range(*slice(named["starts"][i], named["ends"][i], step).indices(dim.size))
        if step == 1 and len(chosen) == dim.size:
            continue
        if step == 1:
            dims[axis] = _cut(dim, (chosen.start, len(chosen), dim.size - chosen.start - len(chosen)))[1]
        else:
            if not all(leaf.is_position for leaf in dim.leaves()):
                dim.mark("pinned")
            dims[axis] = Dim(len(chosen), position=all(leaf.is_position for leaf in dim.leaves()), pinned=True)
    return [Value(dims, None, value.tensor, value.axis_of)]


def _gather(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, index = operands[0], operands[1]
    if not _known(value, index):
        return []
    dims = value.axes or []
    axis = node.integer("axis", 0) % max(len(dims), 1)
    places = index.axes or []
    if value.tensor is not None and places:
        dims[axis].mark("rows")
        if index.is_data:
            value.tensor.is_looked_up = True
            reader.add_layer(node, "table", {"weight": value.tensor})
    else:
        dims[axis].mark("pinned")
    return [Value([*dims[:axis], *(Dim(dim.size, position=True) for dim in places), *dims[axis + 1 :]])]


def _gather_nd(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    value, index = operands
    if not _known(value, index) or node.integer("batch_dims", 0) or not index.axes or value.is_data:
        return _unknown(reader, node, operands)
    dims, count = value.axes or [], index.axes[-1].size
    for dim in dims[:count]:
        dim.mark("rows")
    return [Value([*(Dim(dim.size, position=True) for dim in index.axes[:-1]), *dims[count:]])]


def _resize(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    shape = reader.file.value_shape(node.outputs[0])
    dims = operands[0].axes
    if dims is None or shape is None or tuple(dim.size for dim in dims[:2]) != shape[:2]:
        return _unknown(reader, node, operands)
    return [Value([*dims[:2], *(Dim(size, position=True) for size in shape[2:])])]


def _constant(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    shape: tuple[int, ...] = ()
    for name, attribute in node.attributes.items():
        if name == "value":
            shape = tuple(attribute.t.dims)
        elif name in ("value_ints", "value_floats"):
            shape = (len(attribute.ints) or len(attribute.floats),)
    integers = reader.file.integers(node.outputs[0])
    fits = integers is not None and len(integers) == math.prod(shape)
    array = numpy.array(integers, dtype=numpy.int64).reshape(shape) if fits else None
    return [Value([Dim(size, pinned=True) for size in shape], array)]


def _made(reader: _Reader, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Shapes, ranges and constants: axes of no group."""
    ints = operands[0].ints if operands else None
    if node.op_type == "Shape":
        return [Value([Dim(len(operands[0].axes or []), pinned=True)] if operands[0].axes is not None else None)]
    if node.op_type == "ConstantOfShape" and ints is not None and ints.size <= MAX_RANK:
        return [Value([Dim(max(int(size), 0), pinned=True) for size in ints.flatten()])]
    if node.op_type == "Range" and all(value.ints is not None for value in operands):
        start, limit, delta = (int(value.ints.flatten()[0]) for value in operands)  # type: ignore[union-attr]
        return [Value([Dim(len(range(start, limit, delta)), position=True, pinned=True)])]
    return [Value(None)]


def _fold(node: OnnxNode, operands: list[Value]) -> numpy.ndarray | None:
    """The integers that a node computes from known ones, of shapes and indices."""
    if node.op_type == "Shape" and operands and operands[0].axes is not None:
        sizes = [dim.size for dim in operands[0].axes]
        end = node.integer("end", len(sizes))
        return numpy.array(sizes[node.integer("start", 0) : end], dtype=numpy.int64)
    rule = _FOLDS.get(node.op_type)
    used = [value for name, value in zip(node.inputs, operands, strict=True) if name]
    if rule is None or not used or any(value.ints is None or value.ints.size > _MAX_INTEGERS for value in used):
        return None
    arrays = [value.ints for value in used if value.ints is not None]
    try:
        if node.op_type == "Range" and len(range(*(int(item.flatten()[0]) for item in arrays))) > _MAX_INTEGERS:
            return None
        result = numpy.asarray(rule(node, *arrays))
    except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
        return None
    return result.astype(numpy.int64) if result.size <= _MAX_INTEGERS and result.ndim <= MAX_RANK else None


def _number(node: OnnxNode, operands: list[Value], ints: numpy.ndarray | None) -> float | None:
    """The single number that a node computes from known ones, of scales."""
    if ints is not None:
        return float(ints.flatten()[0]) if ints.size == 1 else None
    if node.op_type == "Constant":
        return constant_number(node)
    numbers = [value.number for name, value in zip(node.inputs, operands, strict=True) if name]
    rule = _NUMBERS.get(node.op_type)
    if rule is None or not numbers or numbers[0] is None:
        return None
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Pow"):
        if len(numbers) != 2 or numbers[1] is None:
            return None
        numbers = numbers[:2]
    else:
        numbers = numbers[:1]
    try:
        result = float(rule(*numbers))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None
    return result if math.isfinite(result) else None


_NUMBERS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Reshape", "Squeeze", "Unsqueeze"), lambda x: x),
    "Sqrt": math.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "Neg": lambda x: -x,
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Pow": lambda a, b: a**b,
}


def _slice_ints(node: OnnxNode, data: numpy.ndarray, starts: numpy.ndarray, ends: numpy.ndarray, *more: numpy.ndarray):  # type: ignore[no-untyped-def]  # noqa: ANN202
    if data.ndim != 1:
        raise ValueError("only lists are folded")
    return data[int(starts.flatten()[0]) : int(ends.flatten()[0]) : int(more[1].flatten()[0]) if len(more) > 1 else 1]


_FOLDS: dict[str, Callable[..., object]] = {
    "Identity": lambda node, x: x,
    "Cast": lambda node, x: x,
    "Add": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: a // b,
    "Mod": lambda node, a, b: a % b,
    "Neg": lambda node, x: -x,
    "Equal": lambda node, a, b: a == b,
    "Max": lambda node, a, b: numpy.maximum(a, b),
    "Min": lambda node, a, b: numpy.minimum(a, b),
    "Where": lambda node, c, a, b: numpy.where(c, a, b),
    "Concat": lambda node, *items: numpy.concatenate([numpy.atleast_1d(item) for item in items]),
    "Gather": lambda node, x, i: numpy.take(x, i, axis=node.integer("axis", 0)),
    "Squeeze": lambda node, x, *axes: x.reshape([size for size in x.shape if size != 1]),
    "Unsqueeze": lambda node, x, *axes: x.reshape([1, *x.shape] if x.ndim < 2 else [-1, -1]),
    "Reshape": lambda node, x, shape: x.reshape([int(size) for size in shape]),
    "Slice": _slice_ints,
    "ConstantOfShape": lambda node, shape: numpy.zeros([int(size) for size in shape]),
    "Range": lambda node, a, b, c: numpy.arange(int(a.flatten()[0]), int(b.flatten()[0]), int(c.flatten()[0])),
    "ReduceProd": lambda node, x, *axes: x.prod(keepdims=bool(node.integer("keepdims", 1))),
}
_SHAPE_ONLY = frozenset(
    {"Shape", "Size", "ConstantOfShape", "Range", "Constant", "RandomNormalLike", "RandomUniformLike"}
)


def _rows(handler: _Handler, names: str) -> dict[str, _Handler]:
    return dict.fromkeys(names.split(), handler)


_HANDLERS: dict[str, _Handler] = {
    **_rows(_view, "Identity Cast CastLike Dropout"),
    **_rows(
        _same,
        "Relu Sigmoid Tanh Erf Gelu FastGelu QuickGelu Elu Selu Celu LeakyRelu ThresholdedRelu HardSigmoid HardSwish"
        " Mish Softplus"
        " Softsign Swish Silu Sqrt Reciprocal Exp Log Neg Abs Sin Cos Sign Floor Ceil Round Not IsNaN IsInf Clip"
        " Trilu CumSum",
    ),
    **_rows(
        _elementwise,
        "Add Sub Mul Div Pow Sum Mean Max Min Mod Where Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor PRelu"
        " BiasGelu",
    ),
    **_rows(_convolution, "Conv"),
    **_rows(_transposed_convolution, "ConvTranspose"),
    **_rows(_matmul, "MatMul"),
    **_rows(_gemm, "Gemm"),
    **_rows(_einsum, "Einsum"),
    **_rows(_batch_norm, "BatchNormalization"),
    **_rows(_layer_norm, "LayerNormalization RMSNormalization SimplifiedLayerNormalization InstanceNormalization"),
    **_rows(_group_norm, "GroupNormalization"),
    **_rows(_pool, "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool"),
    **_rows(
        _reduce, "ReduceMean ReduceMax ReduceMin ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp"
    ),
    **_rows(_softmax, "Softmax LogSoftmax"),
    **_rows(_reshape, "Reshape Flatten Squeeze Unsqueeze"),
    **_rows(_transpose, "Transpose"),
    **_rows(_expand, "Expand"),
    **_rows(_concat, "Concat"),
    **_rows(_split, "Split"),
    **_rows(_split_to_sequence, "SplitToSequence"),
    **_rows(_sequence_at, "SequenceAt"),
    **_rows(_slice, "Slice"),
    **_rows(_gather, "Gather"),
    **_rows(_gather_nd, "GatherND"),
    **_rows(_pad, "Pad"),
    **_rows(_resize, "Resize Upsample"),
    **_rows(_constant, "Constant"),
    **_rows(_made, "Shape ConstantOfShape Range"),
}
