"""Small patterns of ONNX nodes that mean one thing together, found before reading.

* A layer normalisation written out: ``(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)``.
* Additions to attention logits, between a product of two activations and its softmax: masks and position biases.
* Graph inputs that are really weights, in files whose initializers were turned into inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxFile, OnnxNode
from ghn_service.graph.raw_graph import never_ends

# Weight operands by operator: input index -> whether it is a buffer.
WEIGHT_SLOTS: dict[str, dict[int, bool]] = {
    "Conv": {1: False, 2: False},
    "ConvTranspose": {1: False, 2: False},
    "Gemm": {1: False, 2: False},
    "MatMul": {1: False},
    "BatchNormalization": {1: False, 2: False, 3: True, 4: True},
    "LayerNormalization": {1: False, 2: False},
    "GroupNormalization": {1: False, 2: False},
    "InstanceNormalization": {1: False, 2: False},
    "RMSNormalization": {1: False},
    "PRelu": {1: False},
    "LSTM": {1: False, 2: False, 3: False},
    "GRU": {1: False, 2: False, 3: False},
    "RNN": {1: False, 2: False, 3: False},
}
_VIEWS = frozenset({"Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze"})
_LITERALS = frozenset({"Constant", "ConstantOfShape"})
_LOGIT_OPS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "CastLike", "Reshape", "Identity", "Transpose", "Unsqueeze",
     "Squeeze", "Max", "Min", "Clip", "Tanh"}
)  # fmt: skip


@dataclass(slots=True)
class Patterns:
    """What was found; nodes are identified by their first output.

    Attributes:
        norm_means: ReduceMeans that belong to a normalisation, so they are no pooling.
        layer_norms: Last node of each written-out layer normalisation over channels.
        other_norms: The same for normalisations over other axes.
        logit_additions: Additions to attention logits.
        input_kinds: ``PARAMETER`` or ``BUFFER`` for graph inputs that are weights.
        consumers: Nodes that read each value.
    """

    norm_means: set[str] = field(default_factory=set)
    layer_norms: set[str] = field(default_factory=set)
    other_norms: set[str] = field(default_factory=set)
    logit_additions: set[str] = field(default_factory=set)
    input_kinds: dict[str, str] = field(default_factory=dict)
    consumers: dict[str, list[OnnxNode]] = field(default_factory=dict)

    def ends_norm(self, node: OnnxNode) -> bool:
        """Whether a node is the last one of a written-out normalisation."""
        return node.outputs[0] in self.layer_norms or node.outputs[0] in self.other_norms


def find_patterns(file: OnnxFile, check: Callable[[], None] = never_ends) -> Patterns:
    """Everything of the module docstring, in time proportional to the file; ``check`` is called in between."""
    patterns = Patterns()
    for node in file.nodes:
        for name in dict.fromkeys(node.inputs):
            patterns.consumers.setdefault(name, []).append(node)
    for find in (_find_norms, _find_logit_additions, _find_weight_inputs):
        check()
        find(file, patterns)
    return patterns


def _operand(file: OnnxFile, node: OnnxNode, index: int) -> OnnxNode | None:
    return file.producers.get(node.inputs[index]) if index < len(node.inputs) else None


def _find_norms(file: OnnxFile, patterns: Patterns) -> None:
    for root in file.nodes:
        if root.op_type != "Sqrt" or not root.inputs:
            continue
        mean = _variance_mean(file, root)
        if mean is None:
            continue
        patterns.norm_means.add(mean.outputs[0])
        square = _operand(file, mean, 0)
        centred = _operand(file, square, 0) if square is not None and square.op_type in ("Pow", "Mul") else None
        centre = _operand(file, centred, 1) if centred is not None and centred.op_type == "Sub" else None
        if centred is None or centre is None or centre.op_type != "ReduceMean":
            continue
        if centre.inputs[:1] != centred.inputs[:1]:
            continue
        patterns.norm_means.add(centre.outputs[0])
        axes = mean.integers("axes") or (file.integers(mean.inputs[1]) if len(mean.inputs) > 1 else None)
        found = patterns.layer_norms if axes is not None and len(axes) == 1 else patterns.other_norms
        # The nodes that divide the centred input by the deviation: a Div, or a Mul by the reciprocal.
        for node in patterns.consumers.get(root.outputs[0], ()):
            if node.op_type == "Reciprocal":
                products = patterns.consumers.get(node.outputs[0], ())
                found.update(item.outputs[0] for item in products if item.op_type == "Mul")
            elif node.op_type == "Div":
                found.add(node.outputs[0])


def _variance_mean(file: OnnxFile, root: OnnxNode) -> OnnxNode | None:
    """The ReduceMean under ``sqrt(mean + eps)``."""
    total = _operand(file, root, 0)
    if total is not None and total.op_type == "Add":
        operands = (_operand(file, total, 0), _operand(file, total, 1))
        total = next((node for node in operands if node is not None and node.op_type == "ReduceMean"), None)
    return total if total is not None and total.op_type == "ReduceMean" and total.inputs else None


def _find_logit_additions(file: OnnxFile, patterns: Patterns) -> None:
    seen: set[str] = set()
    products: dict[str, bool] = {}  # by output of a product, whether both operands are data
    for node in file.nodes:
        if node.op_type != "Softmax" or not node.inputs:
            continue
        additions: list[str] = []
        has_product = False
        waiting = [node.inputs[0]]
        while waiting:
            name = waiting.pop()
            producer = file.producers.get(name)
            if producer is None or name in seen:
                continue
            if producer.op_type in ("MatMul", "Einsum"):
                if name not in products:
                    products[name] = not any(is_constant(file, operand) for operand in producer.inputs)
                has_product |= products[name]
            elif producer.op_type in _LOGIT_OPS:
                seen.add(name)
                if producer.op_type == "Add":
                    additions.append(producer.outputs[0])
                waiting.extend(producer.inputs[:3])
        if has_product:
            patterns.logit_additions.update(additions)


def is_constant(file: OnnxFile, name: str) -> bool:
    """Whether a value is a weight or constant of the file, or a mere view of one."""
    for _ in range(8):
        if name in file.initializers or name in file.kinds:
            return True
        producer = file.producers.get(name)
        if producer is None or producer.op_type not in _VIEWS or not producer.inputs:
            return producer is not None and producer.op_type in _LITERALS
        name = producer.inputs[0]
    return False


def _find_weight_inputs(file: OnnxFile, patterns: Patterns) -> None:
    undeclared = [header for header in file.inputs if header.name not in file.kinds]
    if len(undeclared) < 2 or any(len(header.shape or ()) > 1 for header in file.initializers.values()):
        return
    names = {header.name for header in undeclared}
    slots: dict[str, str] = {}
    data: set[str] = {undeclared[0].name}
    for node in file.nodes:
        slot_table = WEIGHT_SLOTS.get(node.op_type)
        if slot_table is None:
            continue
        for index, name in enumerate(node.inputs):
            root = _root_input(file, name, names)
            if root and index in slot_table:
                slots.setdefault(root, "BUFFER" if slot_table[index] else "PARAMETER")
            elif root:
                data.add(root)
    if not set(slots) - data:
        return
    for header in undeclared:
        if header.name not in data and header.data_type in FLOAT_TYPES and header.shape is not None:
            patterns.input_kinds[header.name] = slots.get(header.name, "PARAMETER")


def _root_input(file: OnnxFile, name: str, names: set[str]) -> str:
    for _ in range(8):
        if name in names:
            return name
        producer = file.producers.get(name)
        if producer is None or producer.op_type not in _VIEWS or not producer.inputs:
            return ""
        name = producer.inputs[0]
    return ""
