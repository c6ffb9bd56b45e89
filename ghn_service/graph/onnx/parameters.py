"""What each tensor of the file is called, and where it belongs: a node, a fallback rule, or the buffers.

One initializer may be read in several places. Places that read the same weight (same key, see ``TensorUse``) share one
spec; places that an exporter merged because the values were equal get a spec each.
"""

from __future__ import annotations

from ghn_service.graph.architecture import BufferSpec, ParameterSpec, ParameterUse
from ghn_service.graph.onnx.context import ReadContext
from ghn_service.graph.onnx.names import sibling_name
from ghn_service.graph.passes import Skeleton
from ghn_service.graph.raw_graph import Source, TensorUse

_STATISTICS = {3: "running_mean", 4: "running_var"}


def settle_tensors(context: ReadContext, skeleton: Skeleton) -> tuple[list[ParameterSpec], list[BufferSpec]]:
    """Gives every trainable tensor its name and its one place: its uses get their specs.

    Returns:
        Specs of the tensors that no kept node stands for, and the tensors that are no weights.
    """
    _name_siblings(context)
    raws = [context.graph.nodes[index] for index in skeleton.order]
    kept = {id(use) for raw in raws for use in (raw.weight, raw.norm_bias) if use is not None}
    others: list[ParameterSpec] = []
    buffers: list[BufferSpec] = []
    taken: set[str] = set()
    aliased = {source.initializer for source in context.sources if source.uses and source.name != source.initializer}
    for source in context.sources:
        groups = _groups(source)
        for group in groups:
            use = min(
                group, key=lambda item: (id(item) not in kept, item.role != "node", item.role == "buffer", item.level)
            )
            if use.role == "buffer":
                name = _unique(use.torch_name or source.name, taken)
                buffers.append(BufferSpec(name, source.shape, _STATISTICS.get(use.input_index, "constant")))
                continue
            spec = _spec(source, use, group, taken, is_shared=len(groups) > 1)
            for item in group:
                item.spec = spec
            if not any(id(item) in kept for item in group):
                others.append(spec)
        if groups or (source.name in aliased and source.name == source.initializer):
            continue
        if source.kind == "BUFFER":
            buffers.append(BufferSpec(_unique(source.name, taken), source.shape, "constant"))
        elif source.kind != "CONSTANT" and source.folded is None:
            others.append(
                ParameterSpec(
                    name=_unique(source.name, taken),
                    shape=source.shape,
                    initializer=source.initializer,
                    torch_name=source.name if source.kind == "PARAMETER" else "",
                    fallback="zeros" if source.is_vector else "kaiming_normal",
                )
            )
    return others, buffers


def _groups(source: Source) -> list[list[TensorUse]]:
    """Uses of a tensor that read the same weight; a matrix that a node stands for is one weight everywhere."""
    uses = source.uses
    if len(uses) > 1 and not source.is_vector and any(use.role == "node" for use in uses):
        return [uses]
    groups: dict[str, list[TensorUse]] = {}
    for use in uses:
        groups.setdefault(use.token, []).append(use)
    return list(groups.values())


def _spec(source: Source, use: TensorUse, group: list[TensorUse], taken: set[str], *, is_shared: bool) -> ParameterSpec:
    """The parameter that ``group`` reads, described by its main ``use``."""
    name = use.torch_name or f"{source.name}@{use.node}" if is_shared or use.parameter_shape else source.name
    fallback = use.role
    if use.role == "node":  # what torch would do in most modules with such a parameter
        fallback = "kaiming_normal" if not source.is_vector else "ones" if use.is_scale else "zeros"
    is_split = is_shared or source.name != source.initializer
    return ParameterSpec(
        name=_unique(name, taken),
        shape=use.parameter_shape or source.shape,
        permutation=use.permutation,
        initializer=source.initializer,
        torch_name=use.torch_name,
        fallback=fallback,
        uses=tuple(ParameterUse(item.node, item.input_index) for item in group) if is_split else (),
    )


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _name_siblings(context: ReadContext) -> None:
    """Names a layer's weight after its bias where only the bias's name is known."""
    for node in context.graph.nodes:
        bias = context.graph.nodes[node.bias].weight if node.bias >= 0 else None
        weight = node.weight
        if weight is None or bias is None or weight.token or weight.source.kind != "CONSTANT" or not bias.torch_name:
            continue
        weight.torch_name = sibling_name(bias.torch_name) or weight.torch_name
