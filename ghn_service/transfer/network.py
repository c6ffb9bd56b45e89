"""What is known of a network: its values, its tensors, and its layers, with a ``Dim`` for every axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from ghn_service.graph.onnx.file import OnnxFile, OnnxNode
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.work import spend

Kind = str
"""conv, deconv, linear, norm (with statistics), layer_norm, scale, shift, table, token or other."""


class NotUnderstoodError(Exception):
    """What an operator does with channels is not known, so the groups that it touches may not change."""


@dataclass(eq=False, slots=True)
class Tensor:
    """A float tensor of the file.

    Attributes:
        axes: One dim per axis.
        kind: ``parameter``, ``statistic`` of a norm, or ``constant``.
        contracted: Axes that are summed over with the network's data (fan-in).
        layer: The first layer that reads it.
        is_looked_up: Whether it is a table whose rows data selects; then nothing may change its scale.
        is_buffer: Whether the file says that it is none of the network's parameters.
        is_grid: Whether it is a table of which constants select more rows than there are: relative positions.
        fed_by: Values that are multiplied with it.
    """

    name: str
    shape: tuple[int, ...]
    axes: list[Dim]
    kind: str
    contracted: set[int] = field(default_factory=set)
    layer: Layer | None = None
    is_looked_up: bool = False
    is_buffer: bool = False
    is_grid: bool = False
    fed_by: list[str] = field(default_factory=list)

    def leaves(self) -> list[Dim]:
        """The groups of all its axes."""
        return [leaf for axis in self.axes for leaf in axis.leaves()]


@dataclass(eq=False, slots=True)
class Value:
    """What is known of a value.

    Attributes:
        axes: One dim per axis; None if unknown.
        known: Its numbers, int64 or float64, if they follow from the file and are few.
        tensor: The tensor that it is a mere view of.
        axis_of: For a view, the tensor's axis behind each axis.
        made_from: Tensors that it was computed from, not yet met by data.
        is_data: Whether it depends on the network's input.
        pieces: The members of a sequence.
        padding: Pixels of zeros that were just put before and after each spatial axis.
    """

    axes: list[Dim] | None
    known: numpy.ndarray | None = None
    tensor: Tensor | None = None
    axis_of: list[int | None] = field(default_factory=list)
    made_from: tuple[Tensor, ...] = ()
    is_data: bool = False
    pieces: tuple[Value, ...] = ()
    padding: list[tuple[int, int]] = field(default_factory=list)

    @property
    def dims(self) -> list[Dim]:
        """Its axes.

        Raises:
            NotUnderstoodError: They are unknown.
        """
        if self.axes is None:
            raise NotUnderstoodError
        return self.axes

    @property
    def integers(self) -> list[int]:
        """Its numbers as integers.

        Raises:
            NotUnderstoodError: They are unknown, or fractions.
        """
        if self.known is None or self.known.dtype != numpy.int64:
            raise NotUnderstoodError
        spend(self.known.size)
        return [int(item) for item in self.known.flatten()]

    @property
    def number(self) -> float | None:
        """The number that it holds, if it is a known single one."""
        return float(self.known.flat[0]) if self.known is not None and self.known.size == 1 else None

    @property
    def origins(self) -> tuple[Tensor, ...]:
        """The tensors behind it."""
        return (self.tensor,) if self.tensor is not None else self.made_from

    def view(self, axes: list[Dim], axis_of: list[int | None]) -> Value:
        """The same elements with other axes."""
        return Value(axes, tensor=self.tensor, axis_of=axis_of if self.tensor is not None else [])


@dataclass(eq=False, slots=True)
class Layer:
    """A place where weights meet data.

    Attributes:
        node: Where they meet.
        tensors: By role: ``weight``, ``bias``, ``mean``, ``var``.
        output: Name of the value that it makes.
        groups: Of a convolution.
        placement: Of a convolution, per spatial axis: kernel, stride, dilation, pixels of padding before.
        surplus: Of a convolution, per spatial axis: pixels that its pads add over those that its kernel takes.
    """

    kind: Kind
    node: OnnxNode
    tensors: dict[str, Tensor]
    output: str
    groups: int = 1
    placement: tuple[tuple[int, int, int, int], ...] = ()
    surplus: tuple[int, ...] = ()
    epsilon: float = 0.0

    @property
    def label(self) -> str:
        """What people call it: the common stem of its tensors' names."""
        return next(iter(self.tensors.values())).name.rpartition(".")[0] or self.node.label

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a convolution that keeps channels apart."""
        return self.groups > 1 and self.tensors["weight"].shape[1] == 1

    @property
    def rank(self) -> int:
        """Axes of its weight."""
        return len(self.tensors["weight"].shape) if "weight" in self.tensors else 0

    @property
    def columns_and_rows(self) -> tuple[int, int]:
        """The axes of its weight that it reads and writes."""
        (columns,) = self.tensors["weight"].contracted or {1}
        return columns, 1 - columns if self.kind == "linear" else 0


@dataclass(eq=False, slots=True)
class Network:
    """A file, read: values, tensors and layers in the order of the file.

    Attributes:
        consumers: Positions of the nodes that read a value, by its name.
        input: Name of the input that most of the network depends on.
        makers: The layer that makes a value, by its name.
        even_axes: Axes over which means are taken.
        merged_pads: Values that are padded for a convolution, which counts the pads as its own.
        reshaped: Values that a Gather takes from another one whole and in order.
        global_means: Values that a ReduceMean makes as GlobalAveragePool would.
        constants: Numbers of Constant nodes, by their shape and the identities of their attributes.
        cuts: By the value that a Slice makes: axis, channels left out before, and bounds where these do not say all.
    """

    file: OnnxFile
    consumers: dict[str, list[int]] = field(default_factory=dict)
    input: str = ""
    values: dict[str, Value] = field(default_factory=lambda: {"": Value(None)})
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    makers: dict[str, Layer] = field(default_factory=dict)
    even_axes: list[Dim] = field(default_factory=list)
    merged_pads: set[str] = field(default_factory=set)
    reshaped: set[str] = field(default_factory=set)
    global_means: set[str] = field(default_factory=set)
    constants: dict[tuple[object, ...], numpy.ndarray | None] = field(default_factory=dict)
    cuts: dict[str, list[tuple[int, Dim, tuple[int, ...]]]] = field(default_factory=dict)

    @property
    def input_axes(self) -> list[Dim]:
        """Axes of the input; none if they are unknown."""
        return self.values[self.input].axes or []

    @property
    def output(self) -> str:
        """The first output that depends on the input; "" if none does."""
        return next(iter(self.outputs), "")

    @property
    def outputs(self) -> list[str]:
        """All outputs that depend on the input."""
        return [name for name in self.file.outputs if self.values[name].is_data]

    def data_inputs(self, node: OnnxNode) -> list[str]:
        """The operands of a node that depend on the input."""
        return [name for name in node.inputs if self.values[name].is_data]

    def add_layer(self, node: OnnxNode, kind: Kind, tensors: dict[str, Tensor | None], **facts: Any) -> None:
        """Notes that tensors, if there are any, meet data in a node."""
        present = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        if not present:
            return
        layer = Layer(kind, node, present, node.outputs[0], **facts)
        for role, tensor in present.items():
            tensor.kind = "statistic" if role in ("mean", "var") else "parameter"
            tensor.layer = tensor.layer or layer
        self.layers.append(layer)
        self.makers[node.outputs[0]] = layer


def weight_operand(operands: list[Value], index: int) -> Tensor | None:
    """The tensor of a weight operand; a weight that is computed from others pins what it touches."""
    value = operands[index] if index < len(operands) else None
    if value is None or value.is_data:
        return None
    for tensor in value.made_from:
        for axis in tensor.axes:
            axis.mark("pinned")
    return value.tensor


def listed_axes(node: OnnxNode, operands: list[Value], rank: int, position: int = 1) -> list[int]:
    """The axes that an operator names, as attribute or operand; all if it names none."""
    axes: Sequence[int] = range(rank)
    if "axes" in node.attributes:
        axes = node.integers("axes")
    elif len(operands) > position and node.inputs[position]:
        axes = operands[position].integers
    if len(axes) > rank:
        raise NotUnderstoodError
    return [axis % rank for axis in axes]
