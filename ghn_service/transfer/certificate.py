"""Whether the target computes what the source computes, from structures and channel maps alone.

Both files are numbered value by value (hash consing): equal operators on equally numbered operands get equal numbers,
where a target's tensor counts as the source's tensor that it was mapped from without loss, and a unit that passes its
input on has the number of its input. The networks are the same if their outputs are, and if no map breaks what an
operator needs: means over channels need every channel equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.alignment import Alignment
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.maps import FREE, UNIT, Relations, kind_of_map
from ghn_service.transfer.network import Layer, Network, Value
from ghn_service.transfer.scales import Scale

_REPEATS = frozenset({"Identity", "Dropout", "Cast", "CastLike"})
_COMMUTATIVE = frozenset({"Add", "Mul", "Sum", "Max", "Min", "Equal", "And", "Or"})
_UNREAD = frozenset(
    {
        "kernel_shape",
        "pads",
        "auto_pad",
        "group",
        "momentum",
        "training_mode",
        "stash_type",
        "allowzero",
        "storage_order",
    }
)
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_SHAPED = frozenset({"Reshape", "Expand", "Split", "SplitToSequence", "Slice"})
"""Operators whose integer operands say sizes, which the axes of the result say too."""


def find_differences(
    target: Network,
    source: Network,
    alignment: Alignment,
    relations: Relations,
    copied: Mapping[str, str],
    scales: tuple[list[Scale], list[Scale]],
    ends: tuple[str, str] | None = None,
) -> list[str]:
    """Why the target will not compute what the source computes; empty if it will.

    Args:
        target: Read structure of the target.
        source: Read structure of the source.
        alignment: Of both.
        relations: Which group of the source each group of the target stands for.
        copied: Source tensor by target tensor, for tensors that were mapped without loss.
        scales: Of the attention of target and source.
        ends: The values of target and source to compare; None for their outputs.
    """
    found = list(_broken_maps(target, alignment, relations))
    numbers: dict[object, int] = {}
    known = set(relations.of.values())
    # examples at once belong to a file, not to its function
    sizes = [[axis.size for axis in (net.values[net.input].axes or ())[1:]] for net in (target, source)]
    count_positions = sizes[0] == sizes[1]

    def of_source(leaf: Dim) -> object:
        return id(leaf) if leaf in known else leaf.size if count_positions or not ("position" in leaf.flags) else 0

    def of_target(leaf: Dim) -> object:
        related = relations.of.get(leaf)
        if related is not None and not ("position" in leaf.flags):
            return None if related is UNIT or related is FREE else id(related)
        return leaf.size if count_positions or not ("position" in leaf.flags) else 0

    theirs = _Numbering(
        source,
        numbers,
        {name: name for name, tensor in source.tensors.items() if tensor.kind != "constant"},
        of_source,
        {},
    )
    compensated = set(relations.gains)
    mine_scaled = {name for scale in scales[0] if scale.group in compensated for name in scale.constants}
    groups = {relations.of[group] for group in compensated}
    theirs.neutral = {name for scale in scales[1] if scale.group in groups for name in scale.constants}
    theirs.run()
    skipped = {unit.exit: unit.entry for unit in alignment.inserted}
    mine = _Numbering(target, numbers, copied, of_target, skipped)
    mine.neutral = mine_scaled
    limit = len(numbers)
    mine.run()
    ends = ends or (_output(target), _output(source))
    if mine.of.get(ends[0]) != theirs.of.get(ends[1]):
        odd = next((node for node, number in mine.made if number >= limit), None)
        what = f"from {odd.label!r} ({odd.op_type}) on, it" if odd is not None else "it"
        found.append(f"the target has other operators or layers than the source: {what} computes something else")
    return found


def _output(network: Network) -> str:
    return next((name for name in network.file.outputs if network.values[name].is_data), "")


def _broken_maps(target: Network, alignment: Alignment, relations: Relations) -> Iterator[str]:
    """Maps that lose something where the source's function passes."""
    idle = {id(layer) for unit in alignment.inserted for layer in unit.layers}
    used = {
        leaf
        for layer in target.layers
        if id(layer) not in idle
        for tensor in layer.tensors.values()
        for axis in tensor.axes
        for leaf in axis.leaves()
    }
    cut = sum(1 for leaf, other in relations.of.items() if leaf in used and kind_of_map(leaf, other) == "cut")
    if cut:
        yield f"{cut} channel groups are narrower than the source's"
    if relations.lost:
        yield "channels of the source that are concatenated have no place in the target"
    for leaf, other in relations.of.items():
        if leaf not in used or kind_of_map(leaf, other) != "grown":
            continue
        if ("even" in leaf.flags) and leaf.size % max(other.size, 1):
            yield (
                f"a mean is taken over {leaf.size} channels that stand for {other.size}: only whole multiples are exact"
            )
            return
        if ("dotted" in leaf.flags) and leaf not in relations.gains:
            yield f"queries and keys have {leaf.size} channels for the source's {other.size}"
            return
    for axis in target.even_axes:
        ratios = {
            part.size / max(sum(relations.of.get(leaf, leaf).size for leaf in part.leaves()), 1)
            for factor in axis.factors()
            if factor.kind == "concat"
            for part in (item.root() for item in factor.parts)
            if len(part.leaves()) == 1
        }
        if len(ratios) > 1:
            yield "a mean is taken over concatenated channels that grow unequally"
            return


class _Numbering:
    """Numbers for the values of one network."""

    def __init__(
        self,
        network: Network,
        numbers: dict[object, int],
        copied: Mapping[str, str],
        name_of: object,
        skipped: Mapping[str, str],
    ) -> None:
        self.network, self.numbers, self.copied, self.skipped = network, numbers, copied, skipped
        self.name_of = name_of
        self.of: dict[str, int] = {"": -1}
        self.neutral: set[str] = set()
        self.bases: dict[str, tuple[int, object]] = {}
        self.made: list[tuple[OnnxNode, int]] = []
        self.layers: dict[int, Layer] = {layer.index: layer for layer in network.layers}
        self.examples = {leaf for axis in (network.values[network.input].axes or ())[:1] for leaf in axis.leaves()}

    def number(self, key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def run(self) -> None:
        network = self.network
        for position, header in enumerate(network.file.inputs):
            if header.name not in network.tensors:
                self.of[header.name] = self.number(("input", header.name == network.input or position))
        for name in network.tensors:
            self.of[name] = self._tensor(name)
        for name in network.file.initializers:
            self.of.setdefault(name, self._constant(name))
        for index, node in enumerate(network.file.nodes):
            self._node(index, node)

    def _tensor(self, name: str) -> int:
        tensor = self.network.tensors[name]
        if name in self.copied:
            return self.number(("tensor", self.copied[name]))
        if tensor.kind == "constant":
            return self._constant(name)
        return self.number(("own", id(self), name))

    def _constant(self, name: str) -> int:
        value = self.network.values[name]
        if value.known is not None:
            return self.number(("integers", value.known.shape, value.known.tobytes()))
        data = self.network.file.small_constant(name)
        return self.number(("constant", tuple(axis.size for axis in value.axes or ()), data))

    def _node(self, index: int, node: OnnxNode) -> None:
        network = self.network
        value = network.values[node.outputs[0]]
        if value.number is not None:
            is_scale = node.outputs[0] in self.neutral
            number = self.number(("scale",) if is_scale else ("number", len(value.axes or ()), f"{value.number:.6g}"))
        elif node.op_type in _REPEATS or self._is_merged_pad(node):
            number = self.of[node.inputs[0]]
        elif node.op_type in _RESHAPES and value.is_data:
            number = self._reshaped(node, value)
        elif value.known is not None:
            number = self.number(("integers", value.known.shape, value.known.tobytes()))
        elif node.op_type == "Constant":
            number = self._constant(node.outputs[0])
        else:
            number = self.number(self._key(index, node, value))
        for position, name in enumerate(node.outputs):
            if name:
                self.of[name] = self.number(("output", number, position)) if position else number
        if node.outputs[0] in self.skipped:
            entry = self.skipped[node.outputs[0]]
            self.of[node.outputs[0]] = self.of[entry]
            self.bases[node.outputs[0]] = self._base(entry)
        elif value.is_data:
            self.made.append((node, number))

    def _base(self, name: str) -> tuple[int, object]:
        """What a chain of reshapes started from: its number and axes."""
        return self.bases.get(name) or (self.of[name], self._axes(self.network.values[name]))

    def _reshaped(self, node: OnnxNode, value: Value) -> int:
        """A chain of reshapes counts as one, or none where it ends as it began."""
        base, axes = self._base(node.inputs[0]), self._axes(value)
        self.bases[node.outputs[0]] = base
        return base[0] if axes == base[1] else self.number(("reshape", base[0], axes))

    def _is_merged_pad(self, node: OnnxNode) -> bool:
        """Zeros around an image that the next convolution's placement counts as its own."""
        if node.op_type != "Pad" or not self.network.values[node.inputs[0]].is_data:
            return False
        readers = self.network.consumers.get(node.outputs[0], [])
        return len(readers) == 1 and self.network.file.nodes[readers[0]].op_type == "Conv"

    def _key(self, index: int, node: OnnxNode, value: Value) -> tuple[object, ...]:
        network, layer = self.network, self.layers.get(index)
        operands = []
        for name in node.inputs:
            held = network.values[name]
            if node.op_type == "Concat" and held.is_data and self._is_free(held):
                continue
            if node.op_type in _SHAPED and held.known is not None and not self._cuts_positions(node):
                continue
            operands.append(self.of[name])
        if node.op_type in _COMMUTATIVE:
            operands.sort()
        return (node.domain, node.op_type, tuple(operands), self._attributes(node, layer), self._axes(value))

    def _is_free(self, value: Value) -> bool:
        leaves = [leaf for axis in value.axes or () for leaf in axis.leaves()]
        return any(self.name_of(leaf) is None for leaf in leaves)  # type: ignore[operator]

    def _cuts_positions(self, node: OnnxNode) -> bool:
        axes = self.network.values[node.inputs[0]].axes
        out = self.network.values[node.outputs[0]].axes
        if node.op_type != "Slice" or axes is None or out is None:
            return False
        changed = [a for a, b in zip(axes, out, strict=False) if a.root() is not b.root()]
        return all(("position" in leaf.flags) for axis in changed for leaf in axis.leaves())

    def _attributes(self, node: OnnxNode, layer: Layer | None) -> tuple[object, ...]:
        found: list[object] = []
        if layer is not None and layer.kind == "conv":
            found.append(
                tuple((stride, dilation if kernel > 1 else 1) for kernel, stride, dilation, _ in layer.placement)
            )
        for name, attribute in sorted(node.attributes.items()):
            is_read = name not in _UNREAD or node.op_type in _POOLS
            if node.op_type == "BatchNormalization" or (node.op_type == "Conv" and name in ("strides", "dilations")):
                is_read = False
            content = (tuple(attribute.ints), tuple(attribute.floats), attribute.i, attribute.f, bytes(attribute.s))
            if name == "axis" and attribute.i < 0:
                axes = self.network.values[node.inputs[0]].axes
                content = ((), (), attribute.i + len(axes or ()), 0.0, b"")
            ones = attribute.ints and set(attribute.ints) == {1} and name in ("strides", "dilations")
            if is_read and not ones and any(part for part in content) and content[-1] != b"NOTSET":
                found.append((name, content))
        return tuple(found)

    def _axes(self, value: Value) -> object:
        if value.axes is None:
            return None
        axes = ([leaf for leaf in axis.leaves() if leaf not in self.examples] for axis in value.axes)
        names = ([self.name_of(leaf) for leaf in axis] for axis in axes)  # type: ignore[operator]
        return tuple(tuple(name for name in axis if name is not None) for axis in names)
