"""From a trained network and a target's structure to the target's weights: the public functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ghn_client.errors import listed
from ghn_service.errors import LimitExceededError, SourceError
from ghn_service.graph.architecture import ParameterSpec
from ghn_service.graph.raw_graph import GraphLimits, never_ends
from ghn_service.transfer.alignment import Alignment, align
from ghn_service.transfer.certificate import find_differences
from ghn_service.transfer.cutting import rank_channels
from ghn_service.transfer.maps import ChannelMaps
from ghn_service.transfer.network import Network
from ghn_service.transfer.reading import read_network
from ghn_service.transfer.relations import Relations
from ghn_service.transfer.scales import attention_scales, gains
from ghn_service.transfer.source import Source
from ghn_service.transfer.steps import (
    Origin,
    Step,
    class_groups,
    class_layer_input,
    describe_cuts,
    feed_tables,
    find_origin,
    find_refusal,
    lost_epsilons,
    make_steps,
    relate_groups,
)
from ghn_service.transfer.units import Unit
from ghn_service.transfer.values import make_tensor
from ghn_service.transfer.work import counted_work

Head = Literal["auto", "keep", "reset"]
"""The class layer: ``keep`` insists that classes are equally many, ``auto`` keeps it if they are, ``reset`` never."""

SOURCE_FIELD = "source"
TARGET_FIELD = "architecture.onnx_model"
_MAX_LISTED = 20


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would do, from structures alone.

    Attributes:
        origins: By target tensor (parameters and BatchNorm statistics, named as in the target's structure).
        similarity: Share of the layers of both networks that the alignment explains, weighted by sizes; 0 to 1.
        is_exact: Whether the target will compute what the source computes; then it must not be recalibrated.
        contains_source: Whether it will up to the class layer, should that be reset.
        cut_groups: Channel groups that are narrower than the source's, by the layers that produce them.
        left_out: Layers of the source that the target has no place for.
        warnings: Why the transfer is not exact, and why tensors are not mapped; sentences.
    """

    origins: Mapping[str, Origin]
    similarity: float
    is_exact: bool
    contains_source: bool = False
    cut_groups: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    _work: _Work | None = field(default=None, repr=False, compare=False)


@dataclass(eq=False, slots=True)
class _Work:
    """What carrying out a plan needs: how each tensor is made, and the source as it was read."""

    steps: list[Step]
    relations: Relations
    given: Network


@dataclass(frozen=True, eq=False)
class Transfer:
    """Weights for a target; tensors with the origin ``none`` are absent, for the hypernetwork to fill.

    Attributes:
        tensors: Parameters by their names in the target's structure; unchanged ones share memory with the source.
        statistics: Running means and variances of BatchNorm, which belong to the source's function.
        plan: What was planned.
    """

    tensors: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    plan: TransferPlan


def plan_transfer(
    source: Source,
    target_structure: bytes,
    *,
    head: Head = "auto",
    limits: GraphLimits | None = None,
    parameters: Sequence[ParameterSpec] = (),
    check: Callable[[], None] = never_ends,
) -> TransferPlan:
    """What ``transfer_weights`` would do, without a weight being read.

    Args:
        source: The trained network; of its tensors only names and shapes matter.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        head: What happens to the class layer.
        limits: The largest model that is read.
        parameters: Those of the target as ``read_onnx`` finds them: ones that an exporter merged are then planned one
            by one, under their own names.
        check: Called every few milliseconds; what it raises ends the planning.

    Raises:
        InvalidArchitectureError: A structure is no well-formed ONNX model.
        UnsupportedArchitectureError: A structure is quantised or too new.
        LimitExceededError: A structure is over a limit, or its channels take too long to tell apart.
        SourceError: The source has no weights, or nothing in common with the target.
    """
    limits = limits or GraphLimits()
    with counted_work(check):
        given = read_network(source.structure, limits, SOURCE_FIELD, check=check)
        target = read_network(target_structure, limits, TARGET_FIELD, parameters, check=check)
        _check_source(source, given)
        try:
            return _plan(target, given, head, parameters)
        except LimitExceededError as error:
            error.field = error.field or TARGET_FIELD
            raise


def transfer_weights(
    source: Source,
    target_structure: bytes,
    plan: TransferPlan | None = None,
    *,
    head: Head = "auto",
    seed: int = 0,
    limits: GraphLimits | None = None,
    check: Callable[[], None] = never_ends,
) -> Transfer:
    """The target's weights as far as the source has them.

    Args:
        source: The trained network.
        target_structure: A serialised ``onnx.ModelProto``, with or without weights.
        plan: What ``plan_transfer`` said for the same arguments; made anew if None.
        head: What happens to the class layer.
        seed: Decides the shares of copied channels.
        limits: The largest model that is read.
        check: Called before every tensor; what it raises ends the transfer.

    Raises:
        InvalidArchitectureError, UnsupportedArchitectureError, LimitExceededError, SourceError: As ``plan_transfer``.
    """
    if plan is None or plan._work is None:
        plan = plan_transfer(source, target_structure, head=head, limits=limits, check=check)
    assert plan._work is not None
    relations, given = plan._work.relations, plan._work.given
    changed = {theirs for mine, theirs in relations.of.items() if mine.size != theirs.size and theirs.size > 1}
    importance = rank_channels(given.layers, source.tensors, changed) if changed else {}
    maps = ChannelMaps(relations, importance, torch.Generator().manual_seed(seed))
    tensors: dict[str, torch.Tensor] = {}
    statistics: dict[str, torch.Tensor] = {}
    for step in plan._work.steps:
        check()
        found = statistics if step.target.kind == "statistic" else tensors
        found[step.target.name] = make_tensor(step, source.tensors, maps, given)
    return Transfer(tensors, statistics, plan)


def _check_source(source: Source, network: Network) -> None:
    """Every parameter of the source has values of the right shape, in floating point."""
    wanted = {tensor.name: tensor for layer in network.layers for tensor in layer.tensors.values()}
    missing = [name for name in wanted if name not in source.tensors]
    problem = ""
    if len(missing) == len(wanted):
        problem = (
            f"has no weights for its {len(wanted)} tensors; give a trained network, an ONNX file with its weights,"
            " or a structure with a .safetensors file"
        )
    elif missing:
        problem = f"has no values for {len(missing)} of its {len(wanted)} tensors, such as {missing[0]!r}; give all"
    for name, tensor in wanted.items() if not missing else ():
        value = source.tensors[name]
        if tuple(value.shape) != tensor.shape:
            problem = (
                f"has the tensor {name!r} of shape {tuple(value.shape)}, its structure says {tensor.shape};"
                " give structure and weights of one network"
            )
        elif not value.is_floating_point():
            problem = f"has the tensor {name!r} as {value.dtype}; give the network before it was quantised"
    if problem:
        raise SourceError(f"the source {source.name!r} {problem}", field=SOURCE_FIELD)


def _plan(target: Network, given: Network, head: Head, parameters: Sequence[ParameterSpec]) -> TransferPlan:
    classes, known = class_groups(target), class_groups(given)
    sizes = [[dim.size for dim in dims] for dims in (classes, known)]
    is_reset = head == "reset" or sizes[0] != sizes[1]
    if head == "keep" and is_reset:
        raise SourceError(
            f"the class layers differ: the target has {sizes[0]} classes, the source {sizes[1]}", field="head"
        )
    alignment = align(target, given)
    steps = make_steps(alignment)
    relations = relate_groups(steps)
    scales = attention_scales(target), attention_scales(given)
    relations.gains = gains(*scales, relations.of)
    differences = feed_tables(target, steps, relations)
    stem = {leaf for axis in target.input_axes[1:2] for leaf in axis.leaves()}
    reset = set(classes if is_reset else [])
    refusals = {step.target.name: find_refusal(step, relations, reset, stem) for step in steps}
    sent = _sent(target, parameters)
    kept = [step for step in steps if not refusals[step.target.name] and step.target.name in sent]
    if not any(step.source is not None for step in kept):
        raise SourceError(
            "the source has nothing in common with the target: no layer of one fits a layer of the other",
            field=SOURCE_FIELD,
        )
    origins = {step.target.name: find_origin(step, relations) for step in kept}
    differences += lost_epsilons(target, kept)
    names = dict.fromkeys(tensor.name for layer in target.layers for tensor in layer.tensors.values())
    missing = [name for name in names if name in sent and name not in origins]
    reasons: dict[str, list[str]] = {}
    for name in missing:
        reasons.setdefault(refusals.get(name, "the source has no layer in this place"), []).append(name)
    unmapped = [f"{reason}: {listed(found, most=4)}" for reason, found in reasons.items()]
    copied = {
        step.target.name: step.source.name
        for step in kept
        if step.source is not None and step.mode == "copy" and origins[step.target.name] != "cut"
    }
    copied |= {step.target.name: "" for step in kept if step.adds_nothing}
    for step in steps:
        if step.source is not None and step.target.name not in sent:  # has the values that its file says
            content = target.file.content(step.target.name)
            is_alike = step.target.shape == step.source.shape or step.layer.kind in ("norm", "layer_norm")
            if is_alike and content and content == given.file.content(step.source.name):
                copied[step.target.name] = step.source.name
    inserted = _inserted(alignment, kept)
    mine, theirs = (
        [
            class_layer_input(network, groups) if is_reset and name == network.output else name
            for name in network.file.outputs
        ]
        for network, groups in ((target, classes), (given, known))
    )
    differences = find_differences(target, given, relations, copied, inserted, scales, (mine, theirs)) + differences
    hidden = [spec.name for spec in parameters if spec.uses and spec.name not in target.tensors]
    if hidden:
        differences.append(
            f"the file has only what an exporter made of {listed(hidden)}, which get no values of their own"
        )
    return TransferPlan(
        origins={**origins, **dict.fromkeys(missing, "none")},
        similarity=alignment.score,
        is_exact=not differences and not is_reset,
        contains_source=not differences,
        cut_groups=describe_cuts(kept, relations),
        left_out=tuple(dict.fromkeys(layer.label for layer in alignment.left_out)),
        warnings=(*differences[:_MAX_LISTED], *unmapped),
        _work=_Work(kept, relations, given),
    )


def _sent(target: Network, parameters: Sequence[ParameterSpec]) -> set[str]:
    """The tensors of a target that a reply carries: its parameters and the running statistics."""
    names = {spec.name for spec in parameters}
    return {
        tensor.name
        for layer in target.layers
        for tensor in layer.tensors.values()
        if tensor.kind == "statistic" or (tensor.name in names if parameters else not tensor.is_buffer)
    }


def _inserted(alignment: Alignment, kept: Sequence[Step]) -> list[Unit]:
    """The units of the target alone that pass their input on, as every tensor of theirs gets the value for it."""
    made = {(step.target.name, step.mode, step.role) for step in kept}
    refused = {
        id(layer)
        for layer, _, mode in alignment.pairs
        for role, tensor in layer.tensors.items()
        if mode == "pass" or (mode == "zero" and role not in ("mean", "var"))
        if (tensor.name, mode, role) not in made
    }
    return [unit for unit in alignment.inserted if refused.isdisjoint(map(id, unit.layers))]
