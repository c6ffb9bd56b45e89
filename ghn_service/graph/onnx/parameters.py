"""What each tensor of the file is called, and where it belongs: a node, a fallback rule, or the buffers.

One initializer may be read in several places. Places that read the same weight (same key, see ``TensorUse``) share one
spec; places that an exporter merged because the values were equal get a spec each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ghn_service.graph.architecture import BufferSpec, ParameterSpec, ParameterUse
from ghn_service.graph.onnx.context import ReadContext
from ghn_service.graph.onnx.names import sibling_name
from ghn_service.graph.passes import Skeleton
from ghn_service.graph.raw_graph import RawNode, Source, TensorUse


@dataclass(slots=True)
class SettledTensors:
    """The specs of all tensors.

    Attributes:
        specs: Spec per ``id`` of a use that a kept node refers to.
        others: Specs of tensors that no kept node stands for.
        buffers: Tensors that are no weights.
    """

    specs: dict[int, ParameterSpec] = field(default_factory=dict)
    others: list[ParameterSpec] = field(default_factory=list)
    buffers: list[BufferSpec] = field(default_factory=list)


def settle_tensors(context: ReadContext, skeleton: Skeleton) -> SettledTensors:
    """Gives every trainable tensor its name and its one place."""
    kept = {
        id(use): context.graph.nodes[index] for index in skeleton.order for use in _uses(context.graph.nodes[index])
    }
    _name_siblings(context)
    settled = SettledTensors()
    taken: set[str] = set()
    initializers = {
        source.initializer for source in context.sources if source.uses and source.name != source.initializer
    }
    for source in context.sources:
        groups = _groups(source)
        for group in groups:
            _settle_group(settled, source, group, kept, taken, is_shared=len(groups) > 1)
        if not groups and not (source.name in initializers and source.name == source.initializer):
            _settle_unused(settled, source, taken)
    return settled


def _uses(node: RawNode) -> list[TensorUse]:
    return [use for use in (node.weight, node.norm_bias) if use is not None]


def _groups(source: Source) -> list[list[TensorUse]]:
    """Uses of a tensor that read the same weight."""
    if not source.uses:
        return []
    if all(use.role == "buffer" for use in source.uses) or len(source.uses) == 1:
        by_token: dict[str, list[TensorUse]] = {}
        for use in source.uses:
            by_token.setdefault(use.token, []).append(use)
        return list(by_token.values())
    main = [use for use in source.uses if use.role == "node"] or source.uses
    if not source.is_vector and main[0].role == "node":
        return [source.uses]
    keyed: dict[str, list[TensorUse]] = {}
    for use in source.uses:
        keyed.setdefault(use.token, []).append(use)
    return list(keyed.values())


def _settle_group(
    settled: SettledTensors,
    source: Source,
    group: list[TensorUse],
    kept: dict[int, RawNode],
    taken: set[str],
    *,
    is_shared: bool,
) -> None:
    use = min(group, key=lambda item: (id(item) not in kept, item.role != "node", item.role == "buffer", item.level))
    if use.role == "buffer":
        name = _unique(use.torch_name or source.name, taken)
        settled.buffers.append(BufferSpec(name, source.shape, _buffer_kind(use)))
        return
    is_split = is_shared or source.name != source.initializer
    is_renamed = is_shared or use.parameter_shape
    name = _unique(use.torch_name or f"{source.name}@{use.node}" if is_renamed else source.name, taken)
    places = tuple(ParameterUse(item.node, item.input_index) for item in group) if is_split else ()
    spec = ParameterSpec(
        name=name,
        shape=use.parameter_shape or source.shape,
        permutation=use.permutation,
        initializer=source.initializer,
        torch_name=use.torch_name,
        fallback=_rule(use),
        uses=places,
    )
    for item in group:
        settled.specs[id(item)] = spec
    if not any(id(item) in kept for item in group):
        settled.others.append(spec)


def _settle_unused(settled: SettledTensors, source: Source, taken: set[str]) -> None:
    if source.kind == "BUFFER":
        settled.buffers.append(BufferSpec(_unique(source.name, taken), source.shape, "constant"))
    elif source.kind != "CONSTANT" and source.folded is None:
        rule = "zeros" if source.is_vector else "kaiming_normal"
        torch_name = source.name if source.kind == "PARAMETER" else ""
        name = _unique(source.name, taken)
        settled.others.append(
            ParameterSpec(name, source.shape, initializer=source.initializer, torch_name=torch_name, fallback=rule)
        )


def _buffer_kind(use: TensorUse) -> str:
    return {3: "running_mean", 4: "running_var"}.get(use.input_index, "constant")


def _rule(use: TensorUse) -> str:
    """The fallback of a tensor: that of its role, or for nodes what torch would do in most such modules."""
    if use.role != "node":
        return use.role
    if not use.source.is_vector:
        return "kaiming_normal"
    return "ones" if use.is_scale else "zeros"


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _name_siblings(context: ReadContext) -> None:
    """Names a layer's weight after its bias, or the bias after the weight, where only one of the names is known."""
    for node in context.graph.nodes:
        if node.weight is None or node.bias < 0:
            continue
        bias = context.graph.nodes[node.bias].weight
        if bias is None:
            continue
        found = sibling_name(bias.torch_name, of_bias=True) if bias.torch_name else ""
        if found and not node.weight.token and node.weight.source.kind == "CONSTANT":
            node.weight.torch_name = found
