"""Whether the target computes what the source computes, from structures and channel maps alone.

Both files are numbered value by value (hash consing): equal operators on equally numbered operands get equal numbers,
where a target's tensor counts as the source's tensor that it was mapped from without loss, and a unit that passes its
input on has the number of its input. The networks are the same if their outputs are, and if no map breaks what an
operator needs: means over channels need every channel equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Layer, Network, Value
from ghn_service.transfer.relations import Relations
from ghn_service.transfer.scales import Scale
from ghn_service.transfer.units import Unit, repeats_input
from ghn_service.transfer.work import spend

_COMMUTATIVE = frozenset({"Add", "Mul", "Sum", "Max", "Min", "Equal", "And", "Or"})
_UNREAD = frozenset(
    {"kernel_shape", "pads", "auto_pad", "group", "momentum", "training_mode", "stash_type", "allowzero",
     "storage_order"}
)  # fmt: skip
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_SHAPED = frozenset({"Reshape", "Expand", "Split", "SplitToSequence", "Slice"})
"""Operators whose integer operands say sizes, which the axes of the result say too."""


def find_differences(
    target: Network,
    source: Network,
    relations: Relations,
    copied: Mapping[str, str],
    inserted: Sequence[Unit],
    scales: tuple[list[Scale], list[Scale]],
    ends: tuple[Sequence[str], Sequence[str]],
) -> list[str]:
    """Why the target will not compute what the source computes; empty if it will.

    Args:
        target: Read structure of the target.
        source: Read structure of the source.
        relations: Which group of the source each group of the target stands for.
        copied: Source tensor by target tensor, for tensors that were mapped without loss; "" for zeros that count as
            absent.
        inserted: Units of the target that pass their input on.
        scales: Of the attention of target and source.
        ends: The values of target and source to compare, as many in both.
    """
    found = list(_broken_maps(target, inserted, relations))
    sizes = [[axis.size for axis in network.input_axes[1:]] for network in (target, source)]
    counts_positions = sizes[0] == sizes[1]  # examples at once belong to a file, not to its function
    known = set(relations.of.values())

    def name_theirs(leaf: Dim) -> object:
        if leaf in known:
            return id(leaf)
        return leaf.size if counts_positions or "position" not in leaf.flags else 0

    def name_mine(leaf: Dim) -> object:
        related = relations.of.get(leaf)
        if related is not None and "position" not in leaf.flags:
            return id(related) if related.size > 1 else None  # the source has one, or none
        return leaf.size if counts_positions or "position" not in leaf.flags else 0

    numbers: dict[object, int] = {}
    compensated = {relations.of[group] for group in relations.gains}
    neutral = [
        {place for scale in scales[0] if scale.group in relations.gains for place in scale.constants},
        {place for scale in scales[1] if scale.group in compensated for place in scale.constants},
    ]
    parameters = {name: name for name, tensor in source.tensors.items() if tensor.kind != "constant"}
    theirs = _Numbering(source, numbers, parameters, name_theirs, neutral[1], {})
    limit = len(numbers)
    mine = _Numbering(target, numbers, copied, name_mine, neutral[0], {unit.exit: unit.entry for unit in inserted})
    if len(ends[0]) != len(ends[1]):
        found.append(f"the target has {len(ends[0])} outputs, the source {len(ends[1])}")
    elif [mine.end(name) for name in ends[0]] != [theirs.end(name) for name in ends[1]]:
        odd = next((node for node, number in mine.made if number >= limit), None)
        what = f"from {odd.label!r} ({odd.op_type}) on, it" if odd is not None else "it"
        found.append(f"the target has other operators or layers than the source: {what} computes something else")
    return found


def _broken_maps(target: Network, inserted: Sequence[Unit], relations: Relations) -> Iterator[str]:
    """Maps that lose something where the source's function passes."""
    idle = {id(layer) for unit in inserted for layer in unit.layers}
    layers = [layer for layer in target.layers if id(layer) not in idle]
    used = {leaf for layer in layers for tensor in layer.tensors.values() for leaf in tensor.leaves()}
    kinds = {leaf: relations.kind(leaf) for leaf in relations.of if leaf in used}
    if cut := list(kinds.values()).count("cut"):
        yield f"{cut} channel groups are narrower than the source's"
    if relations.lost:
        yield "channels of the source that are concatenated have no place in the target"
    for leaf in (leaf for leaf, kind in kinds.items() if kind == "grown"):
        size = relations.of[leaf].size
        if "even" in leaf.flags and leaf.size % max(size, 1):
            yield f"a mean is taken over {leaf.size} channels that stand for {size}: only whole multiples are exact"
            return
        if "dotted" in leaf.flags and leaf not in relations.gains:
            yield f"queries and keys have {leaf.size} channels for the source's {size}"
            return
    for axis in dict.fromkeys(axis.root() for axis in target.even_axes):
        parts = [part for factor in axis.factors() if factor.kind == "concat" for part in factor.parts]
        leaves = [part.leaves()[0] for part in parts if len(part.leaves()) == 1]
        if len({leaf.size / max(relations.of.get(leaf, leaf).size, 1) for leaf in leaves}) > 1:
            yield "a mean is taken over concatenated channels that grow unequally"
            return


class _Numbering:
    """Numbers for the values of one network.

    Args:
        network: The network.
        numbers: Number by key; shared by networks that are compared.
        copied: Source tensor by tensor.
        name_of: What a channel group is called in both networks; None where the other has none.
        neutral: Values that are multiplied with numbers that are made good elsewhere, and these.
        skipped: Values that equal an earlier one.
    """

    def __init__(
        self,
        network: Network,
        numbers: dict[object, int],
        copied: Mapping[str, str],
        name_of: Callable[[Dim], object],
        neutral: set[tuple[str, str]],
        skipped: Mapping[str, str],
    ) -> None:
        self.network, self.numbers, self.name_of, self.neutral = network, numbers, name_of, neutral
        self.of: dict[str, int] = {"": -1}
        self.made: list[tuple[OnnxNode, int]] = []
        self.reshaped_from: dict[str, str] = {}
        self.layers: dict[int, Layer] = {id(layer.node): layer for layer in network.layers}
        self.examples = {leaf for axis in network.input_axes[:1] for leaf in axis.leaves()}
        self.numbered_axes: dict[Dim, int] = {}
        for position, header in enumerate(network.file.inputs):
            key = ("input", "main" if header.name == network.input else position)
            is_input = header.name not in network.file.contents  # or a mask that is too large for the file
            self.of[header.name] = self._number(key if is_input else self._constant_key(header.name))
        for name in (*network.tensors, *network.file.initializers):
            tensor = network.tensors.get(name)
            if name in copied:
                self.of[name] = self._number(("tensor", copied[name])) if copied[name] else self.of[""]
            elif tensor is not None and tensor.kind != "constant":
                self.of[name] = self._number(("own", id(self), name))
            else:
                self.of[name] = self._number(self._constant_key(name))
        for node in network.file.nodes:
            self._visit(node, skipped)

    def _number(self, key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def end(self, name: str) -> object:
        """What two ends must share: an output with more channels is another one, what is unknown is like nothing."""
        number, axes = self.of[name], self.network.values[name].axes or ()
        sizes = [axis.size for axis in axes if not axis.is_positions] if name in self.network.file.outputs else []
        return (number, tuple(sizes)) if number != self.of[""] else id(self)

    def _constant_key(self, name: str) -> object:
        value = self.network.values[name]
        if value.known is None:
            told = self.network.file.content(name)
            sizes = tuple(axis.size for axis in value.axes or ())
            return ("constant", sizes, told) if told else ("own", id(self), name)
        spend(1 + value.known.nbytes // 512)
        content = f"{value.number:.6g}" if value.known.size == 1 else value.known.tobytes()
        return ("numbers", value.known.shape, content)

    def _visit(self, node: OnnxNode, skipped: Mapping[str, str]) -> None:
        name = node.outputs[0]
        value = self.network.values[name]
        spend(1 + len(node.inputs) + len(node.outputs))
        if value.known is not None or node.op_type == "Constant":
            number = self._number(self._constant_key(name))
        elif repeats_input(node) or name in self.network.merged_pads:
            number = self.of[node.inputs[0]]
        elif value.is_data and (node.op_type in _RESHAPES or name in self.network.reshaped):
            number = self._visit_reshape(node, value)
        elif node.op_type == "Add" and len(summands := self._present(node)) == 1:
            number = self.of[summands[0]]
        else:
            number = self._number(self._key(node, value))
        for position, output in enumerate(node.outputs):
            if output:
                self.of[output] = self._number(("output", number, position)) if position else number
        if name in skipped:
            self.of[name] = self.of[skipped[name]]
            self.reshaped_from[name] = self.reshaped_from.get(skipped[name], skipped[name])
        elif value.is_data:
            self.made.append((node, number))

    def _present(self, node: OnnxNode) -> list[str]:
        """The operands of a node that do not count as absent."""
        return [name for name in node.inputs if self.of[name] != self.of[""]]

    def _visit_reshape(self, node: OnnxNode, value: Value) -> int:
        """A chain of reshapes counts as one, or none where it ends as it began."""
        base = self.reshaped_from.get(node.inputs[0], node.inputs[0])
        self.reshaped_from[node.outputs[0]] = base
        axes = self._axes(value)
        if axes == self._axes(self.network.values[base]):
            return self.of[base]
        return self._number(("reshape", self.of[base], axes))

    def _key(self, node: OnnxNode, value: Value) -> tuple[object, ...]:
        operands = []
        for name in node.inputs:
            held = self.network.values[name]
            is_free = node.op_type == "Concat" and held.is_data and self._is_free(held)
            is_size = node.op_type in _SHAPED and held.known is not None and not self._cuts_positions(node)
            if not is_free and not is_size:
                is_neutral = (node.outputs[0], name) in self.neutral
                operands.append(self._number(("scale",)) if is_neutral else self.of[name])
        while operands and operands[-1] == self.of[""]:
            operands.pop()
        if node.op_type in _COMMUTATIVE:
            operands.sort()
        if node.outputs[0] in self.network.global_means:
            return ("", "GlobalAveragePool", tuple(operands[:1]), self._number(("attributes",)), self._axes(value))
        return (node.domain, node.op_type, tuple(operands), self._attributes(node), self._axes(value))

    def _is_free(self, value: Value) -> bool:
        return any(self.name_of(leaf) is None for axis in value.axes or () for leaf in axis.leaves())

    def _cuts_positions(self, node: OnnxNode) -> bool:
        axes = self.network.values[node.inputs[0]].axes
        out = self.network.values[node.outputs[0]].axes
        if node.op_type != "Slice" or axes is None or out is None:
            return False
        return all(a.is_positions for a, b in zip(axes, out, strict=False) if a.root() is not b.root())

    def _attributes(self, node: OnnxNode) -> int:
        """A number for what attributes say, which many nodes may share."""
        found: list[object] = []
        layer = self.layers.get(id(node))
        has_placement = layer is not None and layer.kind == "conv"
        if layer is not None and has_placement:
            windows = ((stride, dilation if kernel > 1 else 1) for kernel, stride, dilation, _ in layer.placement)
            found.append((*windows, layer.surplus))
        for name, attribute in sorted(node.attributes.items()):
            is_window = name in ("strides", "dilations")
            is_read = name not in _UNREAD or node.op_type in _POOLS or ("pad" in name and not has_placement)
            is_read &= node.op_type != "BatchNormalization" and not (is_window and has_placement)
            spend(len(attribute.ints) + len(attribute.floats) + len(attribute.s))
            content = (tuple(attribute.ints), tuple(attribute.floats), attribute.i, attribute.f, bytes(attribute.s))
            if name == "axis" and attribute.i < 0 and node.inputs:
                content = ((), (), attribute.i + len(self.network.values[node.inputs[0]].axes or ()), 0.0, b"")
            is_default = not any(content) or content[-1] == b"NOTSET" or (is_window and set(content[0]) == {1})
            is_default |= name == "pads" and not any(content[0])
            if is_read and not is_default:
                found.append((name, content))
        return self._number(("attributes", *found, *self._cuts(node)))

    def _cuts(self, node: OnnxNode) -> list[object]:
        """Which channels a Slice takes, which its operands say in numbers of one network."""
        cuts = self.network.cuts.get(node.outputs[0], ())
        none = self._number(("axis",))
        return [(axis, self._axis(before.root()) if before.size else none, bounds) for axis, before, bounds in cuts]

    def _axes(self, value: Value) -> object:
        if value.axes is None:
            return None
        return tuple(self._axis(axis.root()) for axis in value.axes)

    def _axis(self, axis: Dim) -> int:
        if axis not in self.numbered_axes:
            names = (self.name_of(leaf) for leaf in axis.leaves() if leaf not in self.examples)
            self.numbered_axes[axis] = self._number(("axis", *(name for name in names if name is not None)))
        return self.numbered_axes[axis]
