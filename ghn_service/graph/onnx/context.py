"""The state of one reading of an ONNX model, and the few steps that every operator's handler is made of."""

from __future__ import annotations

import onnx

from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxFile, TensorHeader
from ghn_service.graph.onnx.folded import token_shape
from ghn_service.graph.onnx.limits import check_name, checked_shape, invalid, unsupported
from ghn_service.graph.onnx.names import TorchNames, is_anonymous
from ghn_service.graph.onnx.node import OnnxNode
from ghn_service.graph.onnx.patterns import find_patterns
from ghn_service.graph.onnx.values import CONSTANT, Value, View
from ghn_service.graph.raw_graph import INPUT, GraphLimits, RawGraph, RawNode, Source, TensorUse, exceeded

_MAX_VIEWS = 16


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
        batch: Examples in the first input, where the file fixes them.
    """

    def __init__(self, file: OnnxFile, limits: GraphLimits) -> None:
        self.file = file
        self.graph = RawGraph(limits)
        self.patterns = find_patterns(file)
        self.names = TorchNames(file)
        self.values: dict[str, Value] = {"": CONSTANT}
        self.sources: list[Source] = []
        self.unknown_operators: dict[str, int] = {}
        self.folded: list[str] = []
        self.restored: list[str] = []
        self.batch: int | None = None
        self._limits = limits
        self._level = 0
        self._levels: dict[str, int] = {"": 0}
        self._elements = 0
        for header in file.initializers.values():
            self._add_root(header)
        for header in file.inputs:
            self._add_input(header)

    # ---- values -------------------------------------------------------------------------------------------------

    def start(self, node: OnnxNode) -> list[Value]:
        """The values of a node's inputs; sets the level of what the node writes."""
        known, levels, level = self.values, self._levels, 0
        values = []
        for name in node.inputs:
            values.append(known[name])
            if levels.get(name, 0) > level:
                level = levels[name]
        self._level = level + 1
        return values

    @property
    def level(self) -> int:
        """Level of the node that is being read."""
        return self._level

    def emit(self, node: OnnxNode, value: Value) -> None:
        """Gives every output of the node this value."""
        for name in node.outputs:
            self.values[name] = value
            self._levels[name] = self._level

    def joined(self, values: list[Value]) -> Value:
        """A value computed from several by an operator without weights; data wins over weights and constants."""
        data = [value for value in values if value.flow]
        if not data:
            return Value(views=self._derived(values))
        if len(data) == 1:
            value = data[0]
            return Value(flow=value.flow, gate=value.gate, attention=value.attention, spatial=value.spatial)
        flow = self.graph.union([value.flow for value in data])
        attention = self.graph.union([value.attention for value in data])
        return Value(flow=flow, attention=attention, spatial=data[0].spatial)

    def note_activation(self, value: Value, label: str) -> None:
        """Records that the output of the nodes behind ``value`` passes the activation ``label`` next."""
        self.graph.note_activation(value.flow, self._level, label)

    def _derived(self, values: list[Value]) -> tuple[View, ...]:
        views: dict[int, View] = {}
        alone = sum(bool(value.views) for value in values) == 1
        for value in values:
            for view in value.views:
                if len(views) < _MAX_VIEWS:
                    views[id(view.source)] = view.derived(keeps_shape=alone)
        return tuple(views.values())

    # ---- weights ------------------------------------------------------------------------------------------------

    def weight(self, node: OnnxNode, index: int, *, literal: bool = True) -> View | None:
        """The weight at an operand, or None where the operand is absent, data, or not trainable.

        Args:
            node: The reading node.
            index: Index of the operand.
            literal: Whether constants of the file count as weights too.

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
            self._refuse_operand(header, node)
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

        Args:
            node: The reading node.
            index: Index of the operand.
            view: The weight as the operand shows it.
            role: ``node``, ``buffer``, or a fallback rule.
            slot: As in ``TorchNames.identify``.
            axes: The view's axes in torch's order.
            is_scale: Whether this is a normalisation's weight.
            parameter_shape: As in ``TensorUse``.
        """
        torch_name, token = self.names.identify(view.source, node, slot, is_direct=view.order is not None)
        if view.source.folded and role != "node" and node.outputs[0] not in self.patterns.logit_additions:
            parameter_shape = token_shape(view.source.shape, self.batch)
        if view.source.folded and role != "node" and not (parameter_shape or view.source.is_vector):
            torch_name = token = (
                ""  # how the exporter computed the tensor is not known, so neither is its origin's shape
            )
        use = TensorUse(
            source=view.source,
            role=role,
            level=self._level,
            node=node.label,
            input_index=index,
            torch_name=torch_name,
            token=token,
            permutation=view.permutation(axes) if axes is not None else (),
            is_scale=is_scale,
            parameter_shape=parameter_shape if torch_name else (),
        )
        view.source.uses.append(use)
        return use

    def fall_back(self, node: OnnxNode, index: int, rule: str, *, literal: bool = False) -> bool:
        """Gives every weight at an operand the fallback rule; says whether there was one."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        found = False
        for view in self.values[name].views:
            if self.is_trainable(view.source, literal=literal):
                self.use(node, index, view, rule)
                found = True
        return found

    def claim_operand(self, node: OnnxNode, index: int) -> None:
        """Declares what a layer computes on, where it is no data, to be a buffer: a table of coordinates, say."""
        for view in self.values[node.inputs[index]].views:
            if not view.source.uses and view.source.kind != "PARAMETER":
                self.use(node, index, view, "buffer")

    def new_source(
        self, name: str, shape: tuple[int, ...], *, kind: str = "", initializer: str = "", is_literal: bool = False
    ) -> Source | None:
        """Registers a tensor; None for an empty one.

        Raises:
            LimitExceededError: All weights together are over ``max_parameters``.
        """
        check_name(name, self._limits)
        count = checked_shape(name, shape, self._limits)
        if count == 0:
            return None
        if not initializer:
            self._elements += count
            if self._elements > self._limits.max_parameters:
                raise exceeded("parameters", f"at least {self._elements}", self._limits.max_parameters)
        source = Source(name, initializer or name, shape, kind, is_literal)
        self.sources.append(source)
        return source

    def add(self, node: RawNode) -> int:
        """Appends a raw node at the present level."""
        node.level = self._level
        return self.graph.add(node)

    # ---- roots --------------------------------------------------------------------------------------------------

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

    def _add_root(self, header: TensorHeader) -> None:
        shape = header.shape or ()
        self.values[header.name] = CONSTANT
        if header.data_type not in FLOAT_TYPES:
            checked_shape(header.name, shape, self._limits)
            return
        source = self.new_source(header.name, shape, kind=self.kind_of(header.name, shape))
        if source is not None:
            source.folded = self.file.folded.get(header.name)
            self.values[header.name] = Value(views=(View.of(source),))

    def _add_input(self, header: TensorHeader) -> None:
        kind = self.file.kinds.get(header.name) or self.patterns.input_kinds.get(header.name)
        if kind is None:
            if self.batch is None and header.shape:
                self.batch = header.shape[0]
            spatial = header.shape[2:] if header.shape is not None and len(header.shape) > 2 else None
            self.values[header.name] = Value(flow=INPUT, spatial=spatial)
            return
        if header.shape is None:
            raise invalid(f"the weight {header.name!r} has no fixed shape; export the model with static weight shapes")
        self._add_root(header)

    def _refuse_operand(self, header: TensorHeader, node: OnnxNode) -> None:
        if header.data_type not in FLOAT_TYPES:
            names = {number: name for name, number in onnx.TensorProto.DataType.items()}
            kind = names.get(header.data_type, f"number {header.data_type}")
            raise unsupported(
                f"node {node.label!r} ({node.op_type}) has the weight {header.name!r} of type {kind};"
                " weights must be floating point: export the network before quantising it"
            )
        raise invalid(f"the weight {header.name!r} of node {node.label!r} has shape {header.shape}, which is empty")
