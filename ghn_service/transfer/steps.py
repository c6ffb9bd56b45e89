"""How each tensor of the target is made, which channel groups that relates, and what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ghn_service.transfer.alignment import Alignment, Mode
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.network import Layer, Network, Tensor
from ghn_service.transfer.relations import Relations
from ghn_service.transfer.scales import COST_OF_HOP, VIEWS
from ghn_service.transfer.work import spend

_TABLES = frozenset({"table", "token", "shift", "scale", "other"})
"""Kinds of layers whose tensors may hold a value for each position, which others do for other positions."""

Origin = Literal["exact", "grown", "cut", "none"]
"""How a tensor comes from the source: unchanged; larger, with the same function; smaller or otherwise changed; not."""


@dataclass(eq=False, slots=True)
class Step:
    """How one target tensor is made.

    Attributes:
        target: The tensor.
        source: The source's tensor, None where values follow from the architecture.
        mode: As in ``alignment``.
        role: Of the tensor in its layer.
        layer: The target's layer.
        source_layer: The source's.
    """

    target: Tensor
    source: Tensor | None
    mode: Mode
    role: str
    layer: Layer
    source_layer: Layer | None

    @property
    def adds_nothing(self) -> bool:
        """Whether it is a bias of zeros, which a layer may as well be without."""
        return self.mode == "zero" and self.role == "bias" and self.layer.kind in ("conv", "deconv", "linear")

    @property
    def passes_on(self) -> bool:
        """Whether it is the matrix or kernel of a layer that passes its input on."""
        return self.mode == "pass" and self.role == "weight" and self.layer.kind != "norm"


def make_steps(alignment: Alignment) -> list[Step]:
    """One step per target tensor; a tensor that several layers share gets its first."""
    steps: dict[str, Step] = {}
    for layer, other, mode in alignment.pairs:
        for role, tensor in layer.tensors.items():
            partner = other.tensors.get(role) if other is not None else None
            is_new_bias = mode == "copy" and role == "bias" and partner is None and other is not None
            how: Mode = "zero" if is_new_bias else mode
            if partner is not None or how == "pass" or (how == "zero" and role not in ("mean", "var")):
                steps.setdefault(tensor.name, Step(tensor, partner, how, role, layer, other))
    return list(steps.values())


def relate_groups(steps: list[Step]) -> Relations:
    """What the groups of the target stand for, if all steps are taken."""
    relations = Relations()
    for late in (False, True):
        for step in steps:
            if step.source is not None and len(step.target.shape) == len(step.source.shape):
                for mine, theirs in zip(step.target.axes, step.source.axes, strict=True):
                    relations.relate(mine, theirs, late=late)
        for step in steps:
            if step.passes_on:
                _relate_passing(step, relations)
    return relations


def _relate_passing(step: Step, relations: Relations) -> None:
    """What passes its input on has the same channels on both sides."""
    columns, rows = (step.target.axes[axis].factors() for axis in step.layer.columns_and_rows)
    for row, column in zip(rows, columns, strict=True) if len(rows) == len(columns) else ():
        if row.kind == column.kind == "leaf":
            if column in relations.of:
                relations.bind(row, relations.of[column])
            elif row in relations.of:
                relations.bind(column, relations.of[row])


def class_groups(network: Network) -> list[Dim]:
    """Groups of the output that no layer reads: classes; pinned, since each has a meaning.

    A single class is no group: the axis of one row stands for it, of the last layer before the output.
    """
    axes = network.values[network.output].axes or []
    leaves = [leaf for axis in axes for leaf in axis.leaves() if "position" not in leaf.flags]
    read = {leaf for tensor in network.tensors.values() for i in tensor.contracted for leaf in tensor.axes[i].leaves()}
    if not leaves:
        leaves = _single_row(network)
    if not read.isdisjoint(leaves):
        return []
    for leaf in leaves:
        leaf.flags.add("pinned")
    return leaves


def _single_row(network: Network) -> list[Dim]:
    """The axis that a matrix or kernel of one row writes, if nothing else leads to the output."""
    name = network.output
    while (layer := network.makers.get(name)) is None or layer.kind not in ("conv", "deconv", "linear"):
        node = network.file.producers.get(name)
        names = network.data_inputs(node) if node is not None else []
        if len(names) != 1:
            return []
        (name,) = names
    weight = layer.tensors["weight"]
    written = [axis.root() for i, axis in enumerate(weight.axes[:2]) if i not in weight.contracted]
    return [axis for axis in written if axis.size == 1][:1]


def _writes(layer: Layer, classes: Collection[Dim]) -> bool:
    """Whether a layer makes classes."""
    axes = [axis for tensor in layer.tensors.values() for axis in tensor.axes]
    return any(dim in classes for axis in axes for dim in (axis.root(), *axis.leaves()))


def class_layer_input(network: Network, classes: Collection[Dim]) -> str:
    """What the layer that makes the classes reads; "" if there is none."""
    classes = set(classes)
    return next((layer.node.inputs[0] for layer in network.layers if _writes(layer, classes)), "")


def find_refusal(step: Step, relations: Relations, classes: Collection[Dim], stem: Collection[Dim]) -> str:
    """Why a tensor cannot be mapped; "" if it can.

    Args:
        step: How it would be made.
        relations: Of all steps.
        classes: Groups of the target that are reset.
        stem: Groups of the input's channels, whose number may differ.
    """
    mine, source = step.target, step.source
    if _writes(step.layer, classes):
        return "the class layer is not kept"
    if step.mode == "zero":
        return ""
    if step.passes_on:
        columns, rows = (
            [relations.of.get(leaf) for leaf in mine.axes[i].leaves()] for i in step.layer.columns_and_rows
        )
        is_flat = all(factor.kind == "leaf" for i in step.layer.columns_and_rows for factor in mine.axes[i].factors())
        is_known = mine.contracted and is_flat and rows == columns and None not in rows
        return "" if is_known else "the layer's channels could not be told from the layers around it"
    if source is None:
        return ""
    if len(mine.axes) != len(source.axes):
        return f"the tensor has {len(mine.axes)} axes, the source's {len(source.axes)}"
    if problem := _resizing(step, mine, source):
        return problem
    for position, (a, b) in enumerate(zip(mine.axes, source.axes, strict=True)):
        if a.is_positions and b.is_positions:
            continue
        if not relations.relate(a, b, late=True):
            return f"the channels of axis {position} are arranged differently from the source's"
        for leaf in a.leaves():
            is_stem = step.layer.kind == "conv" and position == 1 and leaf in stem and a.root() is leaf
            is_free = "position" in leaf.flags or a.has("rows") or is_stem
            if relations.kind(leaf) == "blocked" and not is_free:
                size = relations.of[leaf].size
                return f"{size} channels of axis {position} became {leaf.size} where they must not change"
    return ""


def _resizing(step: Step, mine: Tensor, source: Tensor) -> str:
    """Why positions cannot become more or fewer; "" if they can: pixels of a kernel, or one axis of a table."""
    is_kernel = step.layer.kind == "conv" and step.role == "weight"
    resized = []
    for position, (a, b) in enumerate(zip(mine.axes, source.axes, strict=True)):
        if a.size == b.size or (is_kernel and position > 1):
            continue
        if a.is_positions != b.is_positions:
            return f"axis {position} has channels in one network and positions in the other"
        if a.is_positions or a.has("rows"):
            resized.append(position)
    if len(resized) > 1 or (resized and step.layer.kind not in _TABLES):
        axis = resized[-1]
        return f"{source.axes[axis].size} positions of axis {axis} became {mine.axes[axis].size}, which must not change"
    return ""


def find_origin(step: Step, relations: Relations) -> Origin:
    """How a tensor that is mapped comes from the source."""
    if step.source is None or step.mode != "copy":
        return "grown"
    kinds = {relations.kind(leaf) for leaf in step.target.leaves() if "position" not in leaf.flags} - {""}
    is_lost = any(leaf in relations.lost for leaf in step.source.leaves())
    if is_lost or kinds & {"cut", "blocked"}:
        return "cut"
    if step.layer.kind == "conv" and step.role == "weight" and step.source_layer is not None:
        room = kernel_room(step.layer, step.source_layer)
        if room is None or any(amount < 0 for amounts in room for amount in amounts):
            return "cut"
    else:
        resized = [a for a, b in zip(step.target.axes, step.source.axes, strict=True) if a.size != b.size]
        if any(axis.is_positions or (axis.has("rows") and step.target.is_grid) for axis in resized):
            return "cut"  # a grid of positions that is interpolated
    return "exact" if step.target.shape == step.source.shape and kinds <= {"equal"} else "grown"


def lost_epsilons(target: Network, kept: list[Step]) -> list[str]:
    """Norms with a larger epsilon than the source's, and no weight of their own that makes up for it; sentences."""
    weighted = {
        id(step.layer)
        for step in kept
        if step.role == "weight" and target.file.kinds.get(step.target.name) != "BUFFER" and step.source is not None
    }
    return [
        f"the epsilon of {step.layer.label!r} is larger than the source's, and no weight can make up for it"
        for step in kept
        if step.role == "var" and step.mode == "copy" and step.source_layer is not None
        if step.layer.epsilon > step.source_layer.epsilon and id(step.layer) not in weighted
    ]


def kernel_room(target: Layer, source: Layer) -> list[tuple[int, int]] | None:
    """Per spatial axis, the columns to add before and after the source's kernel; None where pixels do not meet."""
    result = []
    for (mine, _, dilation, before), (theirs, _, other, pads) in zip(target.placement, source.placement, strict=True):
        if (dilation != other and theirs > 1 and mine > 1) or (before - pads) % dilation:
            return None
        shift = (before - pads) // dilation
        if not -theirs < shift < mine:
            return None
        result.append((shift, mine - theirs - shift))
    return result


def describe_cuts(steps: list[Step], relations: Relations) -> tuple[str, ...]:
    """Narrower groups, by the layers that write them."""
    names: dict[Dim, list[str]] = {}
    for step in steps:
        label = step.layer.label
        for position, axis in enumerate(step.target.axes):
            for leaf in axis.leaves() if position not in step.target.contracted else ():
                if leaf in relations.of and relations.of[leaf].size > leaf.size > 0:
                    names.setdefault(leaf, []).append(label)
    return tuple(
        f"{', '.join(dict.fromkeys(labels))} ({relations.of[leaf].size} to {leaf.size})"
        for leaf, labels in names.items()
    )


def feed_tables(target: Network, steps: list[Step], relations: Relations) -> list[str]:
    """Tables that are looked up and multiplied with too (tied embeddings): their copies are made good before them.

    Returns:
        Why that could not be done, in sentences.
    """
    problems = []
    for step in steps:
        tensor = step.target
        leaves = [leaf for axis in tensor.contracted for leaf in tensor.axes[axis].leaves()]
        copies = math.prod(leaf.size / max(relations.of.get(leaf, leaf).size, 1) for leaf in leaves)
        if not tensor.is_looked_up or step.source is None or copies <= 1:
            continue
        for name in tensor.fed_by:
            is_alone = len(target.consumers[name]) == 1
            while name not in target.makers and (node := target.file.producers.get(name)) and node.op_type in VIEWS:
                spend(COST_OF_HOP)
                name = node.inputs[0]
                is_alone &= len(target.consumers[name]) == 1
            layer = target.makers.get(name)
            if layer is None or layer.kind not in ("layer_norm", "scale", "linear") or not is_alone:
                problems.append(f"the table {tensor.name!r} is read and multiplied with, which wider channels change")
            else:
                relations.factors.update((item.name, 1 / copies) for item in layer.tensors.values())
    return problems
