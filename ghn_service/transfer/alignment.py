"""Which layer of the target stands where which layer of the source stands.

The path from input to output is cut at the values that everything passes through. Between two cuts lies a unit: one
layer with its norm and activation, a residual block, or another region with branches. Units of both networks are
aligned by monotone dynamic programming (as in DPIAT, arXiv:2212.13970), and so are the layers inside two units. What
the target has beyond the source is given weights with which it passes its input on: a residual block whose branch ends
in zeros, a plain layer with a Dirac kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from ghn_service.errors import LimitExceededError
from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.network import Layer, Network

MAX_CELLS = 4_000_000
"""Of the table of dynamic programming; more is refused."""

Mode = Literal["copy", "zero", "dirac", "identity"]
"""How a layer gets its values: from the source's; zeros where it writes; passing on; a norm that changes nothing."""

_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Sigmoid", "Tanh", "Erf", "Gelu", "Elu", "Selu", "Celu", "LeakyRelu", "HardSigmoid", "HardSwish",
     "Mish", "Softplus", "Softsign", "Swish", "Silu", "Mul", "Add", "Div", "Sub", "Pow", "Sqrt", "Exp"}
)  # fmt: skip
_NOTHING = frozenset({"Identity", "Dropout", "Cast", "CastLike"})
_KEEPS_SIGN = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_KEEPS_ZERO = _NOTHING | {
    "Relu", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat", "Pad", "Tanh", "Gelu", "Split"
}  # fmt: skip
_COMMUTING = frozenset({"Relu", "Clip"})  # f(f(x)) = f(x)
_Item = TypeVar("_Item")


@dataclass(eq=False, slots=True)
class Unit:
    """A piece of the path between two values that everything passes through.

    Attributes:
        kind: ``layer``, ``block`` (an identity shortcut around it), ``region`` (other branches), or an operator.
        nodes: Positions of its nodes in the file.
        layers: Its layers, in order.
        shortcut: Those of them that lie on the shorter of two summed branches.
        activation: The operators after its last layer or sum.
        scale: Pixels of the input per pixel of its output.
        has_attention: Whether there is a softmax in it.
    """

    kind: str
    nodes: list[int]
    entry: str
    exit: str
    layers: list[Layer] = field(default_factory=list)
    shortcut: set[int] = field(default_factory=set)
    activation: tuple[str, ...] = ()
    sum: str = ""
    scale: float = 0.0
    has_attention: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """What two units must share to be interchangeable."""
        return (
            self.kind,
            self.has_attention,
            tuple((role(layer), id(layer) in self.shortcut) for layer in self.layers),
        )


@dataclass(eq=False, slots=True)
class Alignment:
    """The result: pairs of layers, and what has no partner.

    Attributes:
        pairs: Target layer, source layer (None where its values follow from the architecture), and how.
        units: Pairs of units; either side may be None.
        inserted: Units that pass their input on.
        left_out: Layers of the source without a place.
        missing: Layers of the target without a partner.
    """

    pairs: list[tuple[Layer, Layer | None, Mode]] = field(default_factory=list)
    units: list[tuple[Unit | None, Unit | None]] = field(default_factory=list)
    inserted: list[Unit] = field(default_factory=list)
    left_out: list[Layer] = field(default_factory=list)
    missing: list[Layer] = field(default_factory=list)
    score: float = 0.0


def align(target: Network, source: Network) -> Alignment:
    """The best alignment of two networks.

    Raises:
        LimitExceededError: The networks are too long to compare.
    """
    result = Alignment()
    mine, theirs = find_units(target), find_units(source)
    known: dict[tuple[object, ...], float] = {}

    def similarity(a: Unit, b: Unit) -> float:
        key = (a.signature, a.activation, a.scale, b.signature, b.activation, b.scale)
        if key not in known:
            known[key] = _unit_similarity(a, b)
        return known[key]

    free = [_insertable(target, mine, i) for i in range(len(mine))]
    pairs = best_pairs(
        mine,
        theirs,
        similarity,
        lambda i: -0.01 if free[i] else -0.3 * max(len(mine[i].layers), 0.1),
        lambda j: -0.3 * max(len(theirs[j].layers), 0.1),
    )
    for i, j in pairs:
        a, b = (mine[i] if i is not None else None), (theirs[j] if j is not None else None)
        result.units.append((a, b))
        if a is None and b is not None:
            result.left_out.extend(b.layers)
        elif a is not None and b is not None:
            _align_layers(result, a, b)
    _insert(result, target, mine, [i for i, j in pairs if i is not None and j is None and free[i]], dict(pairs), theirs)
    result.missing.extend(
        layer for a, b in result.units if a is not None and b is None and a not in result.inserted for layer in a.layers
    )
    placed = {id(layer) for unit in mine for layer in unit.layers}
    result.missing.extend(layer for layer in target.layers if id(layer) not in placed)
    used = {id(layer) for unit in theirs for layer in unit.layers}
    result.left_out.extend(layer for layer in source.layers if id(layer) not in used)
    matched = sum(_overlap(a, b) for a, b, mode in result.pairs if b is not None and mode == "copy")
    result.score = min(2 * matched / max(len(target.layers) + len(source.layers), 1), 1.0)
    return result


def best_pairs(
    left: Sequence[_Item],
    right: Sequence[_Item],
    similarity: Callable[[_Item, _Item], float],
    left_gap: Callable[[int], float],
    right_gap: Callable[[int], float],
) -> list[tuple[int | None, int | None]]:
    """Monotone pairs with the largest sum of similarities and gaps (Needleman-Wunsch); early pairs among equals.

    Raises:
        LimitExceededError: The table would be too large.
    """
    rows, columns = len(left), len(right)
    if (rows + 1) * (columns + 1) > MAX_CELLS:
        raise LimitExceededError(
            f"networks of {rows} and {columns} units cannot be aligned; at most {MAX_CELLS} pairs of units are compared"
        )
    skip_left, skip_right = [left_gap(i) for i in range(rows)], [right_gap(j) for j in range(columns)]
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    step = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows, -1, -1):
        for j in range(columns, -1, -1):
            if i == rows and j == columns:
                continue
            options = []
            if i < rows and j < columns:
                value = similarity(left[i], right[j])
                if value > 0:
                    options.append((best[i + 1][j + 1] + value, 2))
            if i < rows:
                options.append((best[i + 1][j] + skip_left[i], 1))
            if j < columns:
                options.append((best[i][j + 1] + skip_right[j], 0))
            best[i][j], step[i][j] = max(options, key=lambda option: (round(option[0], 9), option[1]))
    pairs: list[tuple[int | None, int | None]] = []
    i = j = 0
    while i < rows or j < columns:
        choice = step[i][j]
        pairs.append((i if choice else None, j if choice != 1 else None))
        i, j = i + (choice > 0), j + (choice != 1)
    return pairs


def role(layer: Layer) -> tuple[object, ...]:
    """What two layers must share to be interchangeable."""
    rank = len(layer.tensors["weight"].shape) if "weight" in layer.tensors else 0
    if layer.kind != "conv":
        return (layer.kind, rank if layer.kind != "linear" else 0)
    windows = tuple((kernel > 1, stride) for kernel, stride, _, _ in layer.placement)
    return ("conv", windows, tuple(item[0] for item in layer.placement), layer.is_depthwise, layer.groups > 1)


def is_depthwise(layer: Layer) -> bool:
    """Whether a convolution keeps channels apart."""
    return layer.groups > 1 and layer.tensors["weight"].shape[1] == 1


def _layer_similarity(a: Layer, b: Layer) -> float:
    if a.kind != b.kind or len(a.placement) != len(b.placement):
        return 0.0
    if a.kind == "conv":
        if a.is_depthwise != b.is_depthwise:
            return 0.0
        score: float = 1.0 if (a.groups > 1) == (b.groups > 1) else 0.4
        for mine, theirs in zip(a.placement, b.placement, strict=True):
            score *= 1.0 if mine[1] == theirs[1] else 0.5
            score *= 1.0 if mine[0] == theirs[0] else 0.9 if min(mine[0], theirs[0]) > 1 else 0.6
        return score
    ranks = [len(layer.tensors["weight"].shape) if "weight" in layer.tensors else 0 for layer in (a, b)]
    return 1.0 if ranks[0] == ranks[1] or a.kind == "linear" else 0.5


def _unit_similarity(a: Unit, b: Unit) -> float:
    if a.layers and b.layers and ({a.kind, b.kind} <= {"block", "region"} or a.kind == b.kind):
        matched = sum(
            _layer_similarity(a.layers[i], b.layers[j])
            for i, j in _layer_pairs(a, b)
            if i is not None and j is not None
        )
        score = matched / max(len(a.layers), len(b.layers))
        score *= 1.0 if a.kind == b.kind else 0.5
        score *= 1.0 if a.activation == b.activation else 0.9
        score *= 1.0 if a.has_attention == b.has_attention else 0.2
        return float(score * (1.0 if a.scale == b.scale else 0.3) * len(a.layers) ** 0.5)
    return 0.05 if a.kind == b.kind and not a.layers and not b.layers else 0.0


def _layer_pairs(a: Unit, b: Unit) -> list[tuple[int | None, int | None]]:
    def similarity(x: Layer, y: Layer) -> float:
        return _layer_similarity(x, y) if (id(x) in a.shortcut) == (id(y) in b.shortcut) else 0.0

    return best_pairs(a.layers, b.layers, similarity, lambda i: -0.1, lambda j: -0.1)


def _align_layers(result: Alignment, a: Unit, b: Unit) -> None:
    for i, j in _layer_pairs(a, b):
        if i is not None and j is not None:
            result.pairs.append((a.layers[i], b.layers[j], "copy"))
        elif i is not None:
            result.missing.append(a.layers[i])
        elif j is not None:
            result.left_out.append(b.layers[j])


def _overlap(a: Layer, b: Layer) -> float:
    """Share of the larger of two layers' sizes that both have, per axis, averaged geometrically."""
    one, other = a.tensors.get("weight"), b.tensors.get("weight")
    if one is None or other is None or len(one.shape) != len(other.shape):
        return 0.5
    ratio = 1.0
    for x, y in zip(one.shape, other.shape, strict=True):
        ratio *= min(x, y) / max(x, y)
    return float(ratio ** (1 / max(len(one.shape), 1)))


# ---- units ----------------------------------------------------------------------------------------------------------


def find_units(network: Network) -> list[Unit]:
    """The path from the input to the first output that depends on it, cut into units."""
    nodes, values = network.file.nodes, network.values
    output = next((name for name in network.file.outputs if values[name].is_data), "")
    needed, path = {output}, []
    for index in range(len(nodes) - 1, -1, -1):
        if any(name in needed for name in nodes[index].outputs if name) and output:
            names = [name for name in nodes[index].inputs if values[name].is_data]
            if names and values[nodes[index].outputs[0]].is_data:
                needed.update(names)
                path.append(index)
    path.reverse()
    last_use = {name: index for index in path for name in nodes[index].inputs}
    last_use[output] = len(nodes)
    at: dict[int, list[Layer]] = {}
    for layer in network.layers:
        at.setdefault(layer.index, []).append(layer)
    live, entry, items, current = {network.input}, network.input, [], []
    for index in path:
        current.append(index)
        live.update(name for name in nodes[index].outputs if last_use.get(name, -1) > index)
        live -= {name for name in nodes[index].inputs if last_use[name] == index}
        if len(live) == 1:
            (exit_name,) = live
            items.append(_make_unit(network, current, entry, exit_name, at))
            entry, current = exit_name, []
    return _joined(items, network)


def _make_unit(network: Network, indices: list[int], entry: str, exit_name: str, at: dict[int, list[Layer]]) -> Unit:
    nodes = network.file.nodes
    layers = [layer for index in indices for layer in at.get(index, ())]
    unit = Unit(nodes[indices[-1]].op_type, indices, entry, exit_name, layers)
    unit.scale = _scale(network, exit_name)
    unit.has_attention = any(nodes[index].op_type == "Softmax" for index in indices)
    if len(indices) > 1:
        unit.kind = "region" if layers else "+".join(sorted(nodes[index].op_type for index in indices))
        last = nodes[indices[-1]]
        names = [name for name in last.inputs if network.values[name].is_data]
        if last.op_type in ("Add", "Sum") and len(names) == 2 and layers:
            unit.sum = last.outputs[0]
            reached = [_layers_before(network, name, unit) for name in names]
            if reached[0] != reached[1]:
                shorter = min(reached, key=len)
                unit.shortcut = shorter - max(reached, key=len)
                if not shorter and entry in (_behind(network, name) for name in names):
                    unit.kind = "block"
    elif layers:
        unit.kind = "layer" if layers[0].kind in ("conv", "linear", "deconv") else layers[0].kind
    if not layers and all(nodes[index].op_type in _ACTIVATIONS | _NOTHING for index in indices):
        unit.activation = tuple(nodes[index].op_type for index in indices if nodes[index].op_type not in _NOTHING)
        unit.kind = "activation"
    return unit


def _joined(items: list[Unit], network: Network) -> list[Unit]:
    """Norms and activations join the layer before them, activations the block before them."""
    units: list[Unit] = []
    for item in items:
        before = units[-1] if units else None
        joins = before is not None and before.layers and item.kind == "activation"
        if before is not None and before.kind == "layer" and item.kind in ("norm", "scale", "shift"):
            joins = not before.activation
        if joins and before is not None:
            before.nodes += item.nodes
            before.exit = item.exit
            before.layers += item.layers
            before.activation += item.activation
        else:
            units.append(item)
    return units


def _scale(network: Network, name: str) -> float:
    """Pixels or tokens of the input per one of the value, as a ratio; 0 where it is not known."""
    first, axes = network.values[network.input].axes, network.values[name].axes
    if not first or not axes or len(first) < 3:
        return 0.0
    positions = 1
    for axis in axes[1:]:
        positions *= axis.size if any(("position" in leaf.flags) for leaf in axis.leaves()) else 1
    total = 1
    for axis in first[2:]:
        total *= axis.size
    return round(total / max(positions, 1), 2)


def _behind(network: Network, name: str) -> str:
    """The value that ``name`` merely repeats."""
    producers = network.file.producers
    while name in producers and producers[name].op_type in _NOTHING:
        name = producers[name].inputs[0]
    return name


def _layers_before(network: Network, name: str, unit: Unit) -> set[int]:
    """Ids of the unit's layers that a value depends on."""
    makers = {output: index for index in unit.nodes for output in network.file.nodes[index].outputs}
    by_index: dict[int, set[int]] = {}
    for layer in unit.layers:
        by_index.setdefault(layer.index, set()).add(id(layer))
    seen: set[int] = set()
    found: set[int] = set()
    waiting = [name]
    while waiting:
        index = makers.get(waiting.pop())
        if index is not None and index not in seen:
            seen.add(index)
            found |= by_index.get(index, set())
            waiting.extend(network.file.nodes[index].inputs)
    return found


# ---- what the target has beyond the source --------------------------------------------------------------------------


def _insertable(network: Network, units: list[Unit], i: int) -> bool:
    """Whether a unit can be given weights with which it passes its input on."""
    unit = units[i]
    if unit.activation:
        before = i - 1
        while before >= 0 and (units[before].kind in _KEEPS_SIGN):
            before -= 1
        same = before >= 0 and units[before].activation == unit.activation
        if len(unit.activation) > 1 or unit.activation[0] not in _COMMUTING or not same:
            return False
    if unit.kind == "block":
        return bool(_silenced(network, unit))
    if unit.kind != "layer":
        return False
    kinds = [layer.kind for layer in unit.layers]
    if kinds[0] == "linear" and kinds[1:] in ([], ["norm"]):
        return True
    keeps_size = all(
        kernel % 2 == 1 and stride == 1 and before == dilation * (kernel // 2)
        for kernel, stride, dilation, before in unit.layers[0].placement
    )
    return kinds[0] == "conv" and kinds[1:] in ([], ["norm"]) and keeps_size and unit.layers[0].groups == 1


def _silenced(network: Network, unit: Unit) -> list[Layer]:
    """The layers of a block that make its branch zero when their own values are zero; none if there is no such set."""
    makers = {layer.output: layer for layer in unit.layers}
    (branch, *others) = [name for name in _sum_node(network, unit).inputs if _behind(network, name) != unit.entry]
    if others:
        return []
    found: list[Layer] = []
    waiting = [branch]
    while waiting:
        name = waiting.pop()
        layer = makers.get(name)
        if layer is not None and layer.kind in ("conv", "linear", "norm", "layer_norm", "scale"):
            found.append(layer)
            continue
        node = network.file.producers.get(name)
        if node is None or name == unit.entry:
            return []
        names = [item for item in node.inputs if network.values[item].is_data]
        if layer is not None and layer.kind == "shift":
            found.append(layer)
            waiting.extend(names)
        elif node.op_type == "Mul" and names:
            waiting.append(names[0] if _reaches(network, names[0], makers, unit) else names[-1])
        elif node.op_type in _KEEPS_ZERO and names:
            waiting.extend(names)
        else:
            return []
    return found


def _reaches(network: Network, name: str, makers: dict[str, Layer], unit: Unit) -> bool:
    """Whether walking back from a value through operators that keep zero ends at a layer."""
    for _ in range(len(unit.nodes)):
        if name in makers:
            return True
        node = network.file.producers.get(name)
        if node is None or (node.op_type not in _KEEPS_ZERO and node.op_type != "Mul"):
            return False
        name = node.inputs[0]
    return False


def _sum_node(network: Network, unit: Unit) -> OnnxNode:
    return network.file.producers[unit.sum]


def _insert(
    result: Alignment,
    target: Network,
    mine: list[Unit],
    indices: list[int],
    partner: dict[int | None, int | None],
    theirs: list[Unit],
) -> None:
    """Gives inserted units values: blocks those of a matched neighbour of their kind, with a silent branch."""
    for i in indices:
        unit = mine[i]
        result.inserted.append(unit)
        if unit.kind == "layer":
            result.pairs.append((unit.layers[0], None, "dirac"))
            result.pairs.extend((layer, None, "identity") for layer in unit.layers[1:])
            continue
        silent = {id(layer) for layer in _silenced(target, unit)}
        order = sorted(
            (j for j, s in partner.items() if j is not None and s is not None), key=lambda j: (abs(j - i), j)
        )
        like = next((j for j in order if mine[j].signature == unit.signature and mine[j].scale == unit.scale), None)
        twin = theirs[partner[like] or 0] if like is not None else None
        donors = dict(_layer_pairs(unit, twin)) if twin is not None else {}
        for position, layer in enumerate(unit.layers):
            donor = donors.get(position)
            copied = twin.layers[donor] if twin is not None and donor is not None else None
            if id(layer) in silent:
                result.pairs.append((layer, copied, "zero"))
            elif copied is not None:
                result.pairs.append((layer, copied, "copy"))
            else:
                result.missing.append(layer)
