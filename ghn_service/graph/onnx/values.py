"""The state of one reading: what is known about each value, and the few steps that every handler is made of.

Legend: a *view* is a weight behind Transpose, Reshape, Cast and the like; ``order`` lists its stored axes longer than 1
in the order in which the view has them, or is None once they are mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from ghn_service.errors import InvalidArchitectureError, UnsupportedArchitectureError
from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxFile, OnnxNode, TensorHeader
from ghn_service.graph.onnx.folded import token_shape
from ghn_service.graph.onnx.names import TorchNames, is_anonymous
from ghn_service.graph.onnx.patterns import find_patterns
from ghn_service.graph.raw_graph import (
    INPUT,
    NOTHING,
    Flow,
    GraphLimits,
    RawGraph,
    Source,
    TensorUse,
    exceeded,
    never_ends,
)

_UNSAFE_NAMES = frozenset({"__metadata__"})
_LARGEST_COUNT = 2**63 - 1
_MAX_VIEWS = 16


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A weight as one value of that shape shows it, None where the shape is unknown; see the module docstring."""

    source: Source
    shape: Shape | None
    order: Shape | None

    @staticmethod
    def of(source: Source) -> View:
        """The weight itself."""
        return View(source, source.shape, tuple(axis for axis, size in enumerate(source.shape) if size > 1))

    def transposed(self, permutation: Shape) -> View:
        """The view with its axes permuted; without a permutation, reversed."""
        if self.shape is None:
            return View(self.source, None, None)
        rank = len(self.shape)
        axes = permutation or tuple(reversed(range(rank)))
        if sorted(axes) != list(range(rank)):
            return View(self.source, None, None)
        shape = tuple(self.shape[axis] for axis in axes)
        if self.order is None:
            return View(self.source, shape, None)
        stored = dict(zip((axis for axis, size in enumerate(self.shape) if size > 1), self.order, strict=True))
        return View(self.source, shape, tuple(stored[axis] for axis in axes if axis in stored))

    def reshaped(self, shape: Shape | None) -> View:
        """The view with another shape of as many elements."""
        if shape is None or self.shape is None:
            return View(self.source, shape, None)
        same = [size for size in shape if size > 1] == [size for size in self.shape if size > 1]
        return View(self.source, shape, self.order if same else None)

    def permutation(self, axes: Shape) -> Shape:
        """How torch's axes are stored, where this view's axes ``axes`` are torch's in order.

        Returns:
            ``ParameterSpec.permutation``; empty if the stored layout is torch's own, or if it cannot be told.
        """
        if self.shape is None or self.order is None or len(axes) != len(self.shape):
            return ()
        stored = dict(zip((axis for axis, size in enumerate(self.shape) if size > 1), self.order, strict=True))
        ones = iter([axis for axis, size in enumerate(self.source.shape) if size <= 1])
        result = [stored[axis] if axis in stored else next(ones, -1) for axis in axes]
        if len(self.source.shape) != len(axes):
            long_axes = [stored[axis] for axis in axes if axis in stored]
            result = long_axes + [axis for axis in range(len(self.source.shape)) if axis not in long_axes]
        if sorted(result) != list(range(len(self.source.shape))):
            return ()
        return () if result == sorted(result) else tuple(result)


@dataclass(frozen=True, slots=True)
class Value:
    """What is known about one value.

    Attributes:
        flow: Raw nodes that its data comes from; empty for weights, constants and shape arithmetic.
        views: Weights that it was computed from, where it carries no data.
        gate: Name of the value that went into the sigmoid, for the output of a gate; "" otherwise.
        attention: Softmax nodes whose probabilities this value is.
        layer: Raw node of the layer that this is the output of, while a bias may still follow; -1 otherwise.
        norm: Raw node of the layer normalisation that this is the scaled output of, while a bias may still follow.
        normalized: ``layer`` after a decomposed layer normalisation, ``other`` after another one, while scale and
            bias may still follow; "" otherwise.
        spatial: Sizes of the spatial axes of a channels-first image, where known.
        shifted: Whether a constant was just added, as in a hard sigmoid.
    """

    flow: Flow = NOTHING
    views: tuple[View, ...] = ()
    gate: str = ""
    attention: Flow = NOTHING
    layer: int = -1
    norm: int = -1
    normalized: str = ""
    spatial: Shape | None = None
    shifted: bool = False


CONSTANT = Value()


class ReadContext:
    """Values, raw nodes and weights found so far.

    Attributes:
        file: The model.
        graph: The raw graph.
        patterns: What ``find_patterns`` found.
        names: Torch names.
        values: What is known about each value.
        sources: Every tensor that may be a weight, in file order.
        unknown_operators: Operators without a handler, with their number of nodes.
        folded: Labels of convolutions with a batch normalization folded into them.
        restored: Torch names of zero biases that the exporter dropped.
        batch: First axis of the first data input that states a shape.
        num_examples: The same for data inputs of two axes or more; 0 where none states a shape.
        level: Level of the node that is being read.
    """

    def __init__(self, file: OnnxFile, limits: GraphLimits, check: Callable[[], None] = never_ends) -> None:
        self.file = file
        self.graph = RawGraph(limits, check=check)
        self.patterns = find_patterns(file, check)
        self.names = TorchNames(file)
        self.values: dict[str, Value] = {"": CONSTANT}
        self.sources: list[Source] = []
        self.unknown_operators: dict[str, int] = {}
        self.folded: list[str] = []
        self.restored: list[str] = []
        self.batch: int | None = None
        self.num_examples = 0
        self.level = 0
        self._limits = limits
        self._levels: dict[str, int] = {"": 0}
        self._elements = 0
        for header in (*file.initializers.values(), *file.inputs):
            name, shape = header.name, header.shape
            is_constant = name in file.initializers or name in file.kinds or name in self.patterns.input_kinds
            if not is_constant:
                _check_tensor(name, (), limits)
                if self.batch is None and shape:
                    self.batch = shape[0]
                if not self.num_examples and shape is not None and len(shape) >= 2:
                    self.num_examples = shape[0]
                self.values[name] = Value(
                    flow=INPUT, spatial=shape[2:] if shape is not None and len(shape) > 2 else None
                )
                continue
            if shape is None:
                raise InvalidArchitectureError(
                    f"the weight {name!r} has no fixed shape; export the model with static weight shapes"
                )
            self.values[name] = CONSTANT
            if header.data_type not in FLOAT_TYPES:
                _check_tensor(name, shape, limits)
                continue
            source = self.new_source(name, shape, kind=self.kind_of(name, shape))
            if source is not None:
                source.folded = file.folded.get(name)
                self.values[name] = Value(views=(View.of(source),))

    def read(self, node: OnnxNode, handler: Callable[[ReadContext, OnnxNode, list[Value]], Value]) -> None:
        """Gives the outputs of a node, but those that ``handler`` wrote itself, the value that it returns."""
        values, levels, level, data = self.values, self._levels, 0, []
        for name in node.inputs:
            data.append(values[name])
            if levels.get(name, 0) > level:
                level = levels[name]
        self.level = level + 1
        value = handler(self, node, data)
        for name in filter(None, node.outputs):
            values.setdefault(name, value)
            levels[name] = self.level

    def joined(self, values: list[Value]) -> Value:
        """A value computed from several by an operator without weights; data wins over weights and constants."""
        data = [value for value in values if value.flow]
        if not data:
            alone = sum(bool(value.views) for value in values) == 1
            views: dict[int, View] = {}
            for view in (view for value in values for view in value.views):
                if len(views) < _MAX_VIEWS:
                    views[id(view.source)] = view if alone else View(view.source, None, None)
            return Value(views=tuple(views.values()))
        if len(data) == 1:
            value = data[0]
            return Value(flow=value.flow, gate=value.gate, attention=value.attention, spatial=value.spatial)
        flow = self.graph.union([value.flow for value in data])
        attention = self.graph.union([value.attention for value in data])
        return Value(flow=flow, attention=attention, spatial=data[0].spatial)

    def weight(self, node: OnnxNode, index: int, *, literal: bool = True) -> View | None:
        """The weight at an operand, or None where the operand is absent, data, or not trainable.

        With ``literal``, constants of the file count as weights too.

        Raises:
            InvalidArchitectureError: The operand is an empty tensor.
            UnsupportedArchitectureError: The operand is quantised.
        """
        name = node.inputs[index] if index < len(node.inputs) else ""
        value = self.values[name]
        if not name or value.flow:
            return None
        header = self.file.initializers.get(name)
        if header is not None and not value.views:
            raise _unusable_operand(header, node)
        candidates = [view for view in value.views if self.is_trainable(view.source, literal=literal)]
        if not candidates:
            for view in value.views:
                if view.source.kind == "BUFFER":
                    self.use(node, index, view, "buffer")
            return None
        best = max(candidates, key=lambda view: view.source.num_elements)
        for view in candidates:
            if view is not best:
                self.use(node, index, view, "ones")
        return best

    def is_trainable(self, source: Source, *, literal: bool = False) -> bool:
        """Whether a tensor is a weight when read outside (``literal=False``) or inside a weight slot."""
        if source.kind == "CONSTANT":
            return literal and (source.num_elements > 1 or not source.is_literal)
        return source.kind != "BUFFER"

    def is_token(self, name: str) -> bool:
        """Whether an initializer is a token that the exporter expanded along the batch axis."""
        header = self.file.initializers.get(name)
        return bool(self.file.folded.get(name) and header and token_shape(header.shape or (), self.batch))

    def is_computed(self, source: Source) -> bool:
        """Whether an exporter may have computed a tensor from parameters; the older one does not say of which."""
        if source.folded is not None:
            return bool(source.folded)
        return self.file.is_torch and not self.file.kinds and source.kind == "CONSTANT" and not source.is_literal

    def use(
        self,
        node: OnnxNode,
        index: int,
        view: View,
        role: str,
        *,
        slot: str = "operand",
        axes: tuple[int, ...] | None = None,
        is_scale: bool = False,
        parameter_shape: tuple[int, ...] = (),
    ) -> TensorUse:
        """Records that a node reads a weight.

        ``role`` is ``node``, ``buffer`` or a fallback rule, ``slot`` as in ``TorchNames.identify``, ``axes`` are the
        view's in torch's order, the rest as in ``TensorUse``.
        """
        torch_name, token = self.names.identify(view.source, node, slot, is_direct=view.order is not None)
        if view.source.folded and role != "node" and node.outputs[0] not in self.patterns.logit_additions:
            parameter_shape = token_shape(view.source.shape, self.batch)
        if view.source.folded and role != "node" and not (parameter_shape or view.source.is_vector):
            torch_name = token = ""  # how the tensor was computed is not known, so neither is its origin's shape
        use = TensorUse(
            source=view.source,
            role=role,
            level=self.level,
            node=node.label,
            input_index=index,
            torch_name=torch_name,
            token=token,
            permutation=view.permutation(axes) if axes is not None else (),
            is_scale=is_scale,
            parameter_shape=parameter_shape if torch_name else (),
        )
        view.source.uses.append(use)
        self.graph.spend(1)
        return use

    def fall_back(self, node: OnnxNode, index: int, rule: str, *, literal: bool = False) -> None:
        """Gives every weight at an operand the fallback rule."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        for view in self.values[name].views:
            if self.is_trainable(view.source, literal=literal):
                self.use(node, index, view, rule)

    def new_source(
        self, name: str, shape: tuple[int, ...], *, kind: str = "", initializer: str = "", is_literal: bool = False
    ) -> Source | None:
        """Registers a tensor; None for an empty one.

        Raises:
            LimitExceededError: All weights together are over ``max_parameters``.
        """
        count = _check_tensor(name, shape, self._limits)
        if count == 0:
            return None
        if not initializer:
            self._elements += count
            if self._elements > self._limits.max_parameters:
                raise exceeded("parameters", f"at least {self._elements}", self._limits.max_parameters)
        source = Source(name, initializer or name, shape, kind, is_literal)
        self.sources.append(source)
        return source

    def kind_of(self, name: str, shape: tuple[int, ...]) -> str:
        """The kind of an initializer or input, as in ``Source.kind``."""
        declared = self.file.kinds.get(name) or self.patterns.input_kinds.get(name)
        if declared:
            return declared
        folded = self.file.folded.get(name)
        if folded is not None:
            return "" if folded else "CONSTANT"
        is_scalar = all(size == 1 for size in shape)
        if self.file.is_torch and (is_anonymous(name) or (is_scalar and self.file.kinds)):
            return "CONSTANT"
        return "CONSTANT" if is_scalar and not self.file.is_torch else ""


def _unusable_operand(header: TensorHeader, node: OnnxNode) -> Exception:
    if header.data_type in FLOAT_TYPES:
        return InvalidArchitectureError(
            f"the weight {header.name!r} of node {node.label!r} has shape {header.shape}, which is empty"
        )
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    kind = names.get(header.data_type, f"number {header.data_type}")
    return UnsupportedArchitectureError(
        f"node {node.label!r} ({node.op_type}) has the weight {header.name!r} of type {kind};"
        " weights must be floating point: export the network before quantising it"
    )


def _check_tensor(name: str, shape: Shape, limits: GraphLimits) -> int:
    """The number of elements of a tensor whose name can be a key of a reply and whose size is within the limits."""
    if name in _UNSAFE_NAMES:
        raise InvalidArchitectureError(
            f"a tensor is called {name!r}, which is reserved in safetensors files; rename it"
        )
    if len(name) > limits.max_name_bytes or len(name.encode("utf-8", "replace")) > limits.max_name_bytes:
        raise InvalidArchitectureError(
            f"a tensor name starting {name[:40]!r} has over {limits.max_name_bytes} bytes; shorten it"
        )
    if "\0" in name:
        raise InvalidArchitectureError(f"the tensor name {name!r} holds a NUL character; rename it")
    count = 1
    for size in shape:
        if size < 0:
            raise InvalidArchitectureError(f"tensor {name!r} has shape {shape}; a size must not be negative")
        count *= size
        if count > _LARGEST_COUNT:
            raise InvalidArchitectureError(
                f"tensor {name!r} has shape {shape}; its number of elements overflows 64 bits"
            )
    if count > limits.max_parameters:
        raise exceeded(f"elements in tensor {name!r}", count, limits.max_parameters)
    return count
