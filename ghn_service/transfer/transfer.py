"""From a trained network and a target's structure to the target's weights: the public functions of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional

from ghn_service.errors import SourceError
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.transfer.alignment import Alignment, Mode, align
from ghn_service.transfer.axes import Dim
from ghn_service.transfer.certificate import find_differences
from ghn_service.transfer.maps import ChannelMap, Relations, axis_map, kind_of_map, make_map, rank_channels
from ghn_service.transfer.network import Layer, Network, Tensor
from ghn_service.transfer.reading import read_network
from ghn_service.transfer.scales import VIEWS, attention_scales, gains
from ghn_service.transfer.source import Source

Head = Literal["auto", "keep", "reset"]
"""The class layer: ``keep`` insists that classes are equally many, ``auto`` keeps it if they are, ``reset`` never."""

Origin = Literal["exact", "grown", "cut", "none"]
"""How a tensor comes from the source: unchanged; larger, with the same function; smaller or otherwise changed; not."""

SOURCE_FIELD = "source"
TARGET_FIELD = "architecture.onnx_model"
_MAX_LISTED = 20


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would do, from structures alone.

    Attributes:
        origins: By target tensor (parameters and BatchNorm statistics, named as in the target's structure).
        sources: The source's tensor for each target tensor that has one; "" where values follow from the architecture
            (an inserted layer that passes its input on).
        similarity: Share of the layers of both networks that the alignment explains, weighted by sizes; 0 to 1.
        is_exact: Whether the target will compute what the source computes.
        contains_source: Whether it will up to the class layer, should that be reset.
        cut_groups: Channel groups that are narrower than the source's, by the layers that produce them.
        left_out: Layers of the source that the target has no place for.
        reasons: Why a target tensor is not mapped, for every ``none``.
        warnings: Why the transfer is not exact, and what else belongs to the function (eps of norms); sentences.
    """

    origins: Mapping[str, Origin]
    sources: Mapping[str, str]
    similarity: float
    is_exact: bool
    contains_source: bool = False
    cut_groups: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    _work: _Work | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Weights for a target; tensors with the origin ``none`` are absent, for the hypernetwork to fill.

    Attributes:
        tensors: Parameters by their names in the target's structure; unchanged ones share memory with the source.
        statistics: Running means and variances of BatchNorm, which belong to the source's function.
        origins: ``exact``, ``grown`` or ``cut`` for each of both.
        plan: What was planned.
        warnings: What the user should know; sentences.
    """

    tensors: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    origins: Mapping[str, Origin]
    plan: TransferPlan
    warnings: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the target now computes what the source computes; then it must not be recalibrated."""
        return self.plan.is_exact

    @property
    def cut_groups(self) -> tuple[str, ...]:
        """Channel groups that are narrower than the source's."""
        return self.plan.cut_groups

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers of the source that the target has no place for."""
        return self.plan.left_out

    @property
    def similarity(self) -> float:
        """Score of the alignment, 0 to 1."""
        return self.plan.similarity


def plan_transfer(
    source: Source, target_structure: bytes, *, head: Head = "auto", limits: GraphLimits | None = None
) -> TransferPlan:
    """What ``transfer_weights`` would do, without a weight being read.

    Args:
        source: The trained network; of its tensors only names and shapes matter.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        head: What happens to the class layer.
        limits: The largest model that is read.

    Raises:
        InvalidArchitectureError: A structure is no well-formed ONNX model.
        UnsupportedArchitectureError: A structure is quantised or too new.
        LimitExceededError: A structure is over a limit.
        SourceError: The source has no weights, or nothing in common with the target.
    """
    limits = limits or GraphLimits()
    given = read_network(source.structure, limits, SOURCE_FIELD)
    target = read_network(target_structure, limits, TARGET_FIELD)
    _check_source(source, given)
    return _plan(target, given, head)


def transfer_weights(
    source: Source,
    target_structure: bytes,
    plan: TransferPlan | None = None,
    *,
    head: Head = "auto",
    seed: int = 0,
    limits: GraphLimits | None = None,
) -> Transfer:
    """The target's weights as far as the source has them.

    Args:
        source: The trained network.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        plan: What ``plan_transfer`` said for the same arguments; made anew if None.
        head: What happens to the class layer.
        seed: Decides the shares of copied channels.
        limits: The largest model that is read.

    Raises:
        InvalidArchitectureError: A structure is no well-formed ONNX model.
        UnsupportedArchitectureError: A structure is quantised or too new.
        LimitExceededError: A structure is over a limit.
        SourceError: The source has no weights, or nothing in common with the target.
    """
    if plan is None or plan._work is None:
        plan = plan_transfer(source, target_structure, head=head, limits=limits)
    assert plan._work is not None
    return plan._work.apply(source.tensors, plan, torch.Generator().manual_seed(seed))


def _check_source(source: Source, network: Network) -> None:
    """Every parameter of the source has values of the right shape, in floating point.

    Raises:
        SourceError: Otherwise.
    """
    wanted = {tensor.name: tensor for layer in network.layers for tensor in layer.tensors.values()}
    missing = [name for name in wanted if name not in source.tensors]
    if not wanted or len(missing) == len(wanted):
        raise SourceError(
            f"the source {source.name!r} has no weights for its {len(wanted)} tensors; give a trained network,"
            " an ONNX file with its weights, or a structure with a .safetensors file",
            field=SOURCE_FIELD,
        )
    if missing:
        raise SourceError(
            f"the source {source.name!r} has no values for {len(missing)} of its {len(wanted)} tensors,"
            f" such as {missing[0]!r}; give the complete weights",
            field=SOURCE_FIELD,
        )
    for name, tensor in wanted.items():
        value = source.tensors[name]
        if tuple(value.shape) != tensor.shape:
            raise SourceError(
                f"the tensor {name!r} of the source {source.name!r} has shape {tuple(value.shape)}, its structure says"
                f" {tensor.shape}; give structure and weights of one network",
                field=SOURCE_FIELD,
            )
        if not value.is_floating_point():
            raise SourceError(
                f"the tensor {name!r} of the source {source.name!r} is {value.dtype}; weights must be floating point:"
                " give the network before it was quantised",
                field=SOURCE_FIELD,
            )


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Step:
    """How one target tensor is made.

    Attributes:
        source: The source's tensor, None where values follow from the architecture.
        mode: As in ``alignment``.
        role: Of the tensor in its layer.
        layers: The target's layer and the source's.
    """

    target: Tensor
    source: Tensor | None
    mode: Mode
    role: str
    layers: tuple[Layer, Layer | None]


@dataclass(eq=False, slots=True)
class _Work:
    """What ``apply`` needs of a plan."""

    network: Network
    given: Network
    steps: list[_Step]
    relations: Relations

    def apply(self, values: Mapping[str, torch.Tensor], plan: TransferPlan, generator: torch.Generator) -> Transfer:
        changed = {a: b for a, b in self.relations.of.items() if a.size != b.size}
        groups = {b for b in changed.values() if b.size > 1}
        ranks = rank_channels(self.given.layers, values, groups) if groups else {}
        maps = {a: make_map(a, b, ranks.get(b), generator=generator) for a, b in changed.items()}
        tensors: dict[str, torch.Tensor] = {}
        statistics: dict[str, torch.Tensor] = {}
        for step in self.steps:
            value = _make_tensor(step, values, self.relations, maps)
            (statistics if step.target.kind == "statistic" else tensors)[step.target.name] = value
        origins = {name: plan.origins[name] for name in (*tensors, *statistics)}
        return Transfer(tensors, statistics, origins, plan, plan.warnings)


def _plan(target: Network, given: Network, head: Head) -> TransferPlan:
    alignment = align(target, given)
    classes, known = _class_groups(target), _class_groups(given)
    relations = Relations()
    steps = _steps(alignment)
    reasons: dict[str, str] = {}
    for late in (False, True):
        for step in steps:
            if step.source is not None and len(step.target.shape) == len(step.source.shape):
                for mine, theirs in zip(step.target.axes, step.source.axes, strict=True):
                    relations.relate(mine, theirs, late=late)
        for step in steps:  # what passes its input on has the same channels on both sides
            if step.mode == "dirac" and step.role == "weight":
                _relate_passing(step.target, step.layers[0], relations)
    scales = attention_scales(target), attention_scales(given)
    relations.gains = gains(*scales, relations.of)
    untied = _feed_tables(target, steps, relations)
    is_reset = head == "reset" or [dim.size for dim in classes] != [dim.size for dim in known]
    stem = [leaf for axis in (target.values[target.input].axes or ())[1:2] for leaf in axis.leaves()]
    kept: list[_Step] = []
    origins: dict[str, Origin] = {}
    for step in steps:
        reason = _refusal(step, relations, classes if is_reset else [], stem)
        if reason:
            reasons[step.target.name] = reason
        else:
            kept.append(step)
            origins[step.target.name] = _origin(step, relations)
    if head == "keep" and is_reset:
        sizes = [[dim.size for dim in dims] for dims in (classes, known)]
        raise SourceError(
            f"the class layers differ: the target has {sizes[0]} classes, the source {sizes[1]}", field="head"
        )
    if not any(step.source is not None for step in kept):
        raise SourceError(
            "the source has nothing in common with the target: no layer of one fits a layer of the other",
            field=SOURCE_FIELD,
        )
    for layer in target.layers:
        for tensor in layer.tensors.values():
            if tensor.name not in origins:
                origins[tensor.name] = "none"
                reasons.setdefault(tensor.name, "the source has no layer in this place")
    copied = {
        step.target.name: step.source.name
        for step in kept
        if step.source is not None and step.mode == "copy" and origins[step.target.name] != "cut"
    }
    ends = (_class_layer_input(target, classes), _class_layer_input(given, known)) if is_reset else None
    differences = find_differences(target, given, alignment, relations, copied, scales, ends)
    differences += untied
    contains_source = not differences
    if is_reset:
        differences.insert(0, "the class layer is not the source's")
    cut = _cut_groups(kept, relations)
    return TransferPlan(
        origins=origins,
        sources={step.target.name: step.source.name if step.source else "" for step in kept},
        similarity=alignment.score,
        is_exact=not differences,
        contains_source=contains_source,
        cut_groups=cut,
        left_out=tuple(dict.fromkeys(layer.label for layer in alignment.left_out)),
        reasons=reasons,
        warnings=tuple(differences[:_MAX_LISTED]),
        _work=_Work(target, given, kept, relations),
    )


def _class_groups(network: Network) -> list[Dim]:
    """Groups of the first output's last axis that no layer reads: classes; pinned, since each has a meaning."""
    name = next((name for name in network.file.outputs if network.values[name].is_data), "")
    axes = network.values[name].axes or []
    read = {
        leaf for tensor in network.tensors.values() for axis in tensor.contracted for leaf in tensor.axes[axis].leaves()
    }
    leaves = [leaf for axis in axes for leaf in axis.leaves() if not ("position" in leaf.flags)]
    if any(leaf in read for leaf in leaves):
        return []
    for leaf in leaves:
        leaf.flags.add("pinned")
    return leaves


def _feed_tables(target: Network, steps: list[_Step], relations: Relations) -> list[str]:
    """Tables that are looked up and multiplied with too (tied embeddings): their copies are made good before them.

    Returns:
        Why that could not be done, in sentences.
    """
    makers = {layer.output: layer for layer in target.layers}
    problems = []
    for step in steps:
        tensor = step.target
        if not tensor.is_looked_up or not tensor.contracted or step.source is None:
            continue
        leaves = [leaf for axis in tensor.contracted for leaf in tensor.axes[axis].leaves()]
        copies = math.prod(leaf.size / max(relations.of.get(leaf, leaf).size, 1) for leaf in leaves)
        for name in tensor.fed_by if copies > 1 else ():
            alone = len(target.consumers[name]) == 1
            while name not in makers and alone and (node := target.file.producers.get(name)) and node.op_type in VIEWS:
                name = node.inputs[0]
                alone = len(target.consumers[name]) == 1
            layer = makers.get(name)
            if layer is None or layer.kind not in ("layer_norm", "scale", "linear") or not alone:
                problems.append(f"the table {tensor.name!r} is read and multiplied with, which wider channels change")
            else:
                relations.factors.update((item.name, 1 / copies) for item in layer.tensors.values())
    return problems


def _steps(alignment: Alignment) -> list[_Step]:
    """One step per target tensor; a tensor that several layers share gets its first."""
    steps: dict[str, _Step] = {}
    for layer, other, mode in alignment.pairs:
        for role, tensor in layer.tensors.items():
            partner = other.tensors.get(role) if other is not None else None
            if partner is None and mode == "copy":
                continue
            if mode == "zero" and role in ("mean", "var") and partner is None:
                continue
            steps.setdefault(tensor.name, _Step(tensor, partner, mode, role, (layer, other)))
    return list(steps.values())


def _relate_passing(tensor: Tensor, layer: Layer, relations: Relations) -> None:
    (axis,) = tensor.contracted or {1}
    out = 1 - axis if layer.kind == "linear" else 0
    mine, theirs = tensor.axes[out].factors(), tensor.axes[axis].factors()
    for a, b in zip(mine, theirs, strict=False) if len(mine) == len(theirs) else ():
        if a.kind == b.kind == "leaf":
            if b in relations.of:
                relations._bind(a, relations.of[b])
            elif a in relations.of:
                relations._bind(b, relations.of[a])


def _class_layer_input(network: Network, classes: list[Dim]) -> str:
    """What the layer that makes the classes reads; "" if there is none."""
    for layer in network.layers:
        leaves = (leaf for tensor in layer.tensors.values() for axis in tensor.axes for leaf in axis.leaves())
        if any(leaf in classes for leaf in leaves):
            return network.file.nodes[layer.index].inputs[0]
    return ""


def _refusal(step: _Step, relations: Relations, classes: list[Dim], stem: list[Dim]) -> str:
    """Why a tensor cannot be mapped; "" if it can."""
    mine, source = step.target, step.source
    if any(leaf in classes for axis in mine.axes for leaf in axis.leaves()):
        return "the class layer is not kept"
    if step.mode == "zero":
        return ""
    if source is None:
        leaves = [leaf for axis in mine.axes for leaf in axis.leaves() if not ("position" in leaf.flags)]
        related = step.role != "weight" or len(mine.axes) < 2 or all(leaf in relations.of for leaf in leaves)
        same = step.mode != "dirac" or step.role != "weight" or _passes(mine, step.layers[0], relations)
        return "" if related and same else "the layer's channels could not be told from the layers around it"
    if len(mine.axes) != len(source.axes):
        return f"the tensor has {len(mine.axes)} axes, the source's {len(source.axes)}"
    for position, (a, b) in enumerate(zip(mine.axes, source.axes, strict=True)):
        if _is_positions(a) and _is_positions(b):
            continue
        is_rows = any(("rows" in leaf.flags) for leaf in a.leaves())
        if not relations.relate(a, b, late=True):
            return f"the channels of axis {position} are arranged differently from the source's"
        for leaf in a.leaves():
            other = relations.of.get(leaf)
            if other is None or ("position" in leaf.flags):
                continue
            is_stem = step.layers[0].kind == "conv" and position == 1 and leaf in stem and a.root() is leaf
            if kind_of_map(leaf, other) == "blocked" and not is_rows and not is_stem:
                return f"{other.size} channels of axis {position} became {leaf.size} where they must not change"
    return ""


def _passes(tensor: Tensor, layer: Layer, relations: Relations) -> bool:
    if step_axes := sorted(tensor.contracted):
        out = 1 - step_axes[0] if layer.kind == "linear" else 0
        one = [relations.of.get(leaf) for leaf in tensor.axes[out].leaves()]
        return one == [relations.of.get(leaf) for leaf in tensor.axes[step_axes[0]].leaves()]
    return False


def _is_positions(axis: Dim) -> bool:
    return all(("position" in leaf.flags) for leaf in axis.leaves())


def _origin(step: _Step, relations: Relations) -> Origin:
    if step.source is None or step.mode != "copy":
        return "grown"
    kinds = {
        kind_of_map(leaf, relations.of[leaf])
        for axis in step.target.axes
        for leaf in axis.leaves()
        if leaf in relations.of and not ("position" in leaf.flags)
    }
    lost = any(leaf in relations.lost for axis in step.source.axes for leaf in axis.leaves())
    if lost or kinds & {"cut", "blocked"}:
        return "cut"
    if step.layers[0].kind == "conv" and step.role == "weight" and step.layers[1] is not None:
        room = _offsets(step.layers[0], step.layers[1])
        if room is None or any(before < 0 or after < 0 for before, after in room):
            return "cut"
    elif step.target.shape != step.source.shape and any(
        _is_positions(a) and a.size != b.size for a, b in zip(step.target.axes, step.source.axes, strict=True)
    ):
        return "grown" if any(("rows" in leaf.flags) for axis in step.target.axes for leaf in axis.leaves()) else "cut"
    return "exact" if step.target.shape == step.source.shape and kinds <= {"equal"} else "grown"


def _cut_groups(steps: list[_Step], relations: Relations) -> tuple[str, ...]:
    """Narrower groups, by the layers that write them."""
    names: dict[Dim, list[str]] = {}
    for step in steps:
        for position, axis in enumerate(step.target.axes):
            for leaf in axis.leaves():
                other = relations.of.get(leaf)
                if other is not None and other.size > leaf.size > 0 and position not in step.target.contracted:
                    names.setdefault(leaf, []).append(step.layers[0].label)
    return tuple(
        f"{', '.join(dict.fromkeys(labels))} ({relations.of[leaf].size} to {leaf.size})"
        for leaf, labels in names.items()
    )


# ---- values ---------------------------------------------------------------------------------------------------------


def _make_tensor(
    step: _Step, values: Mapping[str, torch.Tensor], relations: Relations, maps: Mapping[Dim, ChannelMap | None]
) -> torch.Tensor:
    """The values of one target tensor."""
    target, mode = step.target, step.mode
    if mode == "zero":  # statistics of another stage's block need not fit
        return torch.full(target.shape, 1.0 if step.role == "var" else 0.0)
    if step.source is None:
        return _passing_values(step, relations, maps)
    value = original = values[step.source.name]
    for position, (mine, theirs) in enumerate(zip(target.axes, step.source.axes, strict=True)):
        if _is_positions(mine):
            continue
        leaves = mine.leaves()
        if len(leaves) == 1 and "pinned" in leaves[0].flags and mine.size != theirs.size:
            value = _adapt_inputs(value, position, mine.size) if step.layers[0].kind == "conv" else value
            continue
        found = axis_map(mine, theirs, relations, maps)
        if found is None:
            continue
        value = value.index_select(position, found.index.clamp_min(0).to(value.device))
        is_shared = position in target.contracted and not target.is_looked_up
        shares = found.shares if is_shared else (found.index >= 0).double()
        if not bool((shares == 1).all()):
            shape = [-1 if i == position else 1 for i in range(value.ndim)]
            value = value.float() if value.element_size() < 4 else value  # shares rounded to half no longer add to one
            value *= shares.to(value.device, value.dtype).view(shape)
            free = (found.index < 0).to(value.device)
            if position not in target.contracted and bool(free.any()) and step.role in ("var", "weight"):
                value.movedim(position, 0)[free] = 1.0
    value = _apply_gains(value, step, relations)
    if step.layers[0].kind == "conv" and step.role == "weight" and step.layers[1] is not None:
        value = _place_kernel(value, step.layers[0], step.layers[1])
    elif tuple(value.shape) != target.shape:
        value = _resize_positions(value, target)
    first, second = step.layers
    if step.role == "var" and second is not None and first.epsilon != second.epsilon:
        value = (value.double() + (second.epsilon - first.epsilon)).clamp_min(0).to(original.dtype)
    assert tuple(value.shape) == target.shape, (target.name, value.shape, target.shape)
    return value if value is original else value.contiguous()


def _apply_gains(value: torch.Tensor, step: _Step, relations: Relations) -> torch.Tensor:
    """Queries and keys with the gain of their group; what reads values of the same group divides by it."""
    factor = relations.factors.get(step.target.name, 1.0)
    if factor != 1.0:
        value = value * factor
    for position, axis in enumerate(step.target.axes):
        if any(relations.gains.get(leaf, 1.0) != 1.0 for leaf in axis.leaves()):
            gain = _axis_gain(axis, relations.gains)
            gain = 1 / gain if position in step.target.contracted else gain
            value = value * gain.to(value.device, value.dtype).view(
                [-1 if i == position else 1 for i in range(value.ndim)]
            )
    return value


def _axis_gain(axis: Dim, gains_of: Mapping[Dim, float]) -> torch.Tensor:
    """The gain of every entry of an axis, float64."""
    result = torch.ones(1, dtype=torch.float64)
    for factor in axis.factors():
        if factor.kind == "leaf":
            part = torch.full((factor.size,), gains_of.get(factor, 1.0), dtype=torch.float64)
        else:
            part = torch.cat([_axis_gain(item, gains_of) for item in factor.parts])
        result = (result[:, None] * part[None, :]).flatten()
    return result


def _passing_values(step: _Step, relations: Relations, maps: Mapping[Dim, ChannelMap | None]) -> torch.Tensor:
    """A layer that passes its input on: a Dirac kernel, an identity matrix, a norm that changes nothing."""
    target, layer = step.target, step.layers[0]
    if step.mode == "identity":
        constant = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - layer.epsilon}[step.role]
        return torch.full(target.shape, constant)
    value = torch.zeros(target.shape)
    if step.role != "weight":
        return value
    (axis,) = target.contracted
    out = 1 - axis if layer.kind == "linear" else 0
    related = relations.of[target.axes[out].leaves()[0]]
    identity = torch.arange(related.size)
    ones = torch.ones(related.size, dtype=torch.float64)
    rows = axis_map(target.axes[out], _source_axis(target.axes[out], relations), relations, maps) or ChannelMap(
        identity, ones
    )
    columns = axis_map(target.axes[axis], _source_axis(target.axes[axis], relations), relations, maps) or ChannelMap(
        identity, ones
    )
    same = (rows.index[:, None] == columns.index[None, :]).float() * columns.shares[None, :].float()
    same = same if axis > out else same.T
    if layer.kind == "linear":
        return same.reshape(target.shape)
    pixel = value
    for _, _, dilation, before in layer.placement:
        pixel = pixel.select(2, before // dilation)
    pixel.copy_(same)
    return value


def _source_axis(axis: Dim, relations: Relations) -> Dim:
    (leaf,) = axis.leaves()
    return relations.of[leaf]


def _adapt_inputs(value: torch.Tensor, axis: int, channels: int) -> torch.Tensor:
    """A stem for another number of input channels, as timm does it: grey is the sum, more are repeated and scaled."""
    if channels == 1:
        return value.sum(dim=axis, keepdim=True)
    index = torch.arange(channels) % value.shape[axis]
    return value.index_select(axis, index.to(value.device)) * (value.shape[axis] / channels)


def _offsets(target: Layer, source: Layer) -> list[tuple[int, int]] | None:
    """Per spatial axis, the columns to add before and after the source's kernel; None where pixels do not meet."""
    result = []
    for (mine, _, dilation, before), (theirs, _, other, pads) in zip(target.placement, source.placement, strict=True):
        if (dilation != other and theirs > 1 and mine > 1) or (before - pads) % dilation:
            return None
        shift = (before - pads) // dilation
        result.append((shift, mine - theirs - shift))
    return result


def _place_kernel(value: torch.Tensor, target: Layer, source: Layer) -> torch.Tensor:
    """The kernel where the pads of both say, so that the same pixels meet the same weights; a patch is resized."""
    shape = target.tensors["weight"].shape
    if tuple(value.shape) == shape and target.placement == source.placement:
        return value
    strides = [item[1] for item in target.placement] == [item[1] for item in source.placement]
    room = _offsets(target, source)
    if room is None or not strides:
        is_patch = all(kernel == stride for kernel, stride, _, _ in (*target.placement, *source.placement))
        if is_patch and value.ndim == 4:
            resized = functional.interpolate(value.float(), shape[2:], mode="bicubic", antialias=True)
            return (resized * (math.prod(value.shape[2:]) / math.prod(shape[2:]))).to(value.dtype)
        room = []
        for mine, theirs in zip(shape[2:], value.shape[2:], strict=True):
            before = (mine - theirs) // 2
            room.append((before, mine - theirs - before))
    if all(pair == (0, 0) for pair in room):
        return value
    return functional.pad(value, [amount for pair in reversed(room) for amount in pair])


def _resize_positions(value: torch.Tensor, target: Tensor) -> torch.Tensor:
    """A table of positions for another number of them: first rows kept, or a square grid interpolated."""
    axis = next(i for i, (a, b) in enumerate(zip(value.shape, target.shape, strict=True)) if a != b)
    moved = value.movedim(axis, 0)
    given, wanted = moved.shape[0], target.shape[axis]
    flat = moved.reshape(given, -1)
    dim = target.axes[axis].root()
    prefix = sum(part.size for part in dim.parts if part.size == 1) if dim.kind == "concat" else 0
    sides = math.isqrt(given - prefix), math.isqrt(wanted - prefix)
    is_grid = sides[0] ** 2 == given - prefix and sides[1] ** 2 == wanted - prefix
    is_learned_order = any(("rows" in leaf.flags) for leaf in target.axes[axis].leaves()) and value.ndim == 2
    if is_grid and not (is_learned_order and (sides[0] % 2 == 0 or sides[1] % 2 == 0)):
        grid = flat[prefix:].T.reshape(1, -1, sides[0], sides[0]).float()
        grid = functional.interpolate(grid, (sides[1], sides[1]), mode="bicubic", antialias=True)
        flat = torch.cat([flat[:prefix], grid.reshape(-1, wanted - prefix).T.to(flat.dtype)])
    elif wanted <= given:
        flat = flat[:wanted]
    else:
        flat = torch.cat([flat, flat[-1:].expand(wanted - given, -1)])
    return flat.reshape(wanted, *moved.shape[1:]).movedim(0, axis)
