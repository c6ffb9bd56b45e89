"""The path through a network in units: layers with their norm and activation, residual blocks, regions with branches.

The path from input to output is cut at the values that everything passes through; between two cuts lies a unit. The
first output's path comes first, then for each further output what only it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ghn_service.graph.onnx.file import FLOAT, FLOAT_TYPES, OnnxNode
from ghn_service.transfer.network import Layer, Network
from ghn_service.transfer.work import spend

_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Sigmoid", "Tanh", "Erf", "Gelu", "Elu", "Selu", "Celu", "LeakyRelu", "HardSigmoid", "HardSwish",
     "Mish", "Softplus", "Softsign", "Swish", "Silu", "Mul", "Add", "Div", "Sub", "Pow", "Sqrt", "Exp"}
)  # fmt: skip
_REPEATS = frozenset({"Identity", "Dropout", "Cast", "CastLike"})
_KEEPS_SIGN = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_KEEPS_ZERO = _REPEATS | {
    "Relu", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat", "Pad", "Tanh", "Gelu", "Split"
}  # fmt: skip
_COMMUTING = frozenset({"Relu", "Clip"})  # f(f(x)) = f(x)
_WRITERS = frozenset({"conv", "linear", "norm", "layer_norm", "scale"})
_MAX_SILENT = 64


@dataclass(eq=False, slots=True)
class Unit:
    """A piece of the path between two values that everything passes through.

    Attributes:
        kind: ``layer``, ``block`` (an identity shortcut around it), ``region`` (other branches), or an operator.
        nodes: Its nodes.
        layers: Its layers, in order.
        shortcut: Ids of those of them that lie on the shorter of two summed branches.
        activation: The operators after its last layer or sum, with the bounds of a Clip.
        branch: Of a block, the value that is added to the shortcut.
        scale: Pixels of the input per pixel of its output.
        has_attention: Whether there is a softmax in it.
    """

    kind: str
    nodes: list[OnnxNode]
    entry: str
    exit: str
    layers: list[Layer]
    shortcut: set[int] = field(default_factory=set)
    activation: tuple[str, ...] = ()
    branch: str = ""
    scale: float = 0.0
    has_attention: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """What two units must share to be interchangeable."""
        layers = tuple((_signature(layer), id(layer) in self.shortcut) for layer in self.layers)
        return (self.kind, self.has_attention, self.scale, layers)


def _signature(layer: Layer) -> tuple[object, ...]:
    if layer.kind != "conv":
        return (layer.kind, layer.rank if layer.kind != "linear" else 0)
    return ("conv", tuple(item[:2] for item in layer.placement), layer.is_depthwise, layer.groups > 1)


def repeats_input(node: OnnxNode) -> bool:
    """Whether a node only gives its operand another name or float type."""
    return node.op_type in _REPEATS and not (node.op_type == "Cast" and node.integer("to", FLOAT) not in FLOAT_TYPES)


def find_units(network: Network, outputs: Sequence[str]) -> list[Unit]:
    """The paths from the input to outputs that depend on it, cut into units."""
    places = {id(node): place for place, node in enumerate(network.file.nodes)}
    layers_at: dict[int, list[Layer]] = {}
    for layer in network.layers:
        layers_at.setdefault(id(layer.node), []).append(layer)
    units: list[Unit] = []
    done = {network.input}
    for output in outputs:
        path = sorted(_new_nodes(network, output, done), key=lambda node: places[id(node)])
        _cut_path(network, path, output, done, layers_at, units)
        done.update(name for node in path for name in node.outputs)
    return units


def _new_nodes(network: Network, output: str, done: set[str]) -> list[OnnxNode]:
    """The nodes between what is done and an output."""
    found: dict[int, OnnxNode] = {}
    waiting = [output]
    while waiting:
        name = waiting.pop()
        node = network.file.producers.get(name)
        if name not in done and node is not None and id(node) not in found:
            spend(1 + len(node.inputs))
            found[id(node)] = node
            waiting.extend(network.data_inputs(node))
    return list(found.values())


def _cut_path(
    network: Network,
    path: list[OnnxNode],
    output: str,
    done: set[str],
    layers_at: dict[int, list[Layer]],
    units: list[Unit],
) -> None:
    """Cuts a path at the values that everything passes through, and adds its units."""
    last_use = {name: index for index, node in enumerate(path) for name in node.inputs} | {output: len(path)}
    live = {name for node in path for name in network.data_inputs(node) if name in done}
    entry = next(iter(live)) if len(live) == 1 else ""
    current: list[OnnxNode] = []
    for index, node in enumerate(path):
        current.append(node)
        live.update(name for name in node.outputs if last_use.get(name, -1) > index)
        live -= {name for name in node.inputs if last_use[name] == index}
        if len(live) == 1:
            (exit_name,) = live
            layers = [layer for item in current for layer in layers_at.get(id(item), ())]
            _append(units, _make_unit(network, current, layers, entry, exit_name))
            entry, current = exit_name, []


def _append(units: list[Unit], item: Unit) -> None:
    """Norms and activations join the layer before them, activations the block before them."""
    before = units[-1] if units else None
    is_activation = item.kind == "activation" and before is not None and bool(before.layers)
    is_norm = item.kind in ("norm", "scale", "shift") and before is not None and before.kind == "layer"
    is_next = before is not None and before.exit == item.entry
    if before is not None and is_next and (is_activation or (is_norm and not before.activation)):
        before.nodes += item.nodes
        before.exit = item.exit
        before.layers += item.layers
        before.activation += item.activation
        spend(len(before.activation))
    else:
        units.append(item)


def _make_unit(network: Network, nodes: list[OnnxNode], layers: list[Layer], entry: str, exit_name: str) -> Unit:
    operators = [node.op_type for node in nodes]
    unit = Unit(operators[-1], nodes, entry, exit_name, layers)
    unit.scale = _scale(network, exit_name)
    unit.has_attention = "Softmax" in operators
    changing = [node.op_type for node in nodes if not repeats_input(node)]
    if not layers and _ACTIVATIONS.issuperset(changing):
        unit.kind = "activation"
        unit.activation = tuple(_described(network, node) for node in nodes if not repeats_input(node))
    elif len(nodes) > 1:
        unit.kind = "region" if layers else "+".join(sorted(operators))
        names = network.data_inputs(nodes[-1])
        if operators[-1] in ("Add", "Sum") and len(names) == 2 and layers:
            _find_shortcut(network, unit, names)
    elif layers:
        unit.kind = "layer" if layers[0].kind in ("conv", "linear", "deconv") else layers[0].kind
    return unit


def _described(network: Network, node: OnnxNode) -> str:
    """An operator, with the bounds of a Clip."""
    if node.op_type != "Clip":
        return node.op_type
    bounds = [network.values[name].number if name else "" for name in node.inputs[1:]]
    attributes = [(name, attribute.f) for name, attribute in sorted(node.attributes.items())]
    return f"Clip {node.outputs[0] if None in bounds else (*bounds, *attributes)}"


def _find_shortcut(network: Network, unit: Unit, summands: list[str]) -> None:
    """Tells the two summands at the end of a unit apart; it is a block if one of them is what it began with."""
    reached = [_layers_before(network, unit, name) for name in summands]
    short = 0 if len(reached[0]) <= len(reached[1]) else 1
    if reached[0] == reached[1]:
        return
    unit.shortcut = reached[short] - reached[1 - short]
    identity, producers = summands[short], network.file.producers
    while identity in producers and repeats_input(producers[identity]):
        identity = producers[identity].inputs[0]
    if identity == unit.entry:
        unit.kind, unit.branch = "block", summands[1 - short]


def _layers_before(network: Network, unit: Unit, name: str) -> set[int]:
    """Ids of the unit's layers that a value depends on."""
    waiting_nodes = {id(node): node for node in unit.nodes}
    layers: dict[int, list[int]] = {}
    for layer in unit.layers:
        layers.setdefault(id(layer.node), []).append(id(layer))
    found: set[int] = set()
    waiting = [name]
    while waiting:
        node = waiting_nodes.pop(id(network.file.producers.get(waiting.pop())), None)
        if node is not None:
            found.update(layers.get(id(node), ()))
            waiting.extend(node.inputs)
    return found


def _scale(network: Network, name: str) -> float:
    """Pixels or tokens of the input per one of the value, as a ratio; 0 where it is not known."""
    first, axes = network.input_axes, network.values[name].axes
    if len(first) < 3 or not axes:
        return 0.0
    positions = math.prod(axis.size for axis in axes[1:] if axis.has("position"))
    return round(math.prod(axis.size for axis in first[2:]) / max(positions, 1), 2)


def silenced_layers(network: Network, units: list[Unit], i: int) -> frozenset[int] | None:
    """What makes a unit pass its input on: ids of the layers of a block whose values, if zero, make its branch zero.

    None for a unit that cannot pass its input on, nothing for a plain layer that can by a Dirac kernel.
    """
    unit = units[i]
    if unit.activation:  # changes nothing behind another of its kind
        before = i - 1
        while before >= 0 and units[before].kind in _KEEPS_SIGN and units[before].exit == units[before + 1].entry:
            before -= 1
        is_behind = before >= 0 and units[before].exit == units[before + 1].entry
        is_same = is_behind and units[before].activation == unit.activation
        if len(unit.activation) > 1 or unit.activation[0].split()[0] not in _COMMUTING or not is_same:
            return None
    if unit.kind == "block":
        return _silencing(network, unit)
    kinds = [layer.kind for layer in unit.layers]
    if unit.kind != "layer" or kinds[1:] not in ([], ["norm"]):
        return None
    keeps_size = all(
        kernel % 2 == 1 and stride == 1 and before == dilation * (kernel // 2)
        for kernel, stride, dilation, before in unit.layers[0].placement
    )
    is_plain = kinds[0] == "linear" or (kinds[0] == "conv" and keeps_size and unit.layers[0].groups == 1)
    return frozenset() if is_plain else None


def _silencing(network: Network, block: Unit) -> frozenset[int] | None:
    """The last layers of a block's branch, through operators that make zeros of zeros."""
    makers = {layer.output: layer for layer in block.layers}
    found: dict[str, frozenset[int] | None] = {}
    for node in block.nodes:
        before = [found.get(name) for name in network.data_inputs(node)]
        known = [item for item in before if item is not None]
        spend(1 + sum(map(len, known)))
        layer = makers.get(node.outputs[0])
        result = None
        if layer is not None and layer.kind in _WRITERS:
            result = frozenset({id(layer)})
        elif node.op_type == "Mul":
            result = known[0] if known else None  # one zero factor is enough
        elif len(known) == len(before) and (node.op_type in _KEEPS_ZERO or (layer and layer.kind == "shift")):
            result = frozenset().union(*known, [id(layer)] if layer is not None else [])
        if result is not None and len(result) <= _MAX_SILENT:
            found.update(dict.fromkeys(node.outputs, result))
    return found.get(block.branch)
