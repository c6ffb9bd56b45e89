"""What each tensor of the file is called, and where it belongs: a node, a fallback rule, or the buffers.

One initializer may be read in several places. Places that read the same weight (same key, see ``TensorUse``) share one
spec; places that an exporter merged because the values were equal get a spec each. ``reading_warnings`` tells the user
what the file no longer holds, and what was not understood.
"""

from __future__ import annotations

from collections.abc import Iterator

from ghn_client.errors import listed
from ghn_service.graph.architecture import BufferSpec, ParameterSpec, ParameterUse
from ghn_service.graph.onnx.values import ReadContext
from ghn_service.graph.passes import Skeleton
from ghn_service.graph.raw_graph import Source, TensorUse

_STATISTICS = {3: "running_mean", 4: "running_var"}
_WEIGHT_OF_BIAS = {"bias": "weight", "in_proj_bias": "in_proj_weight"}
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sum", "Concat", "Where", "MatMul", "Einsum"})
_EXPORT_INSTEAD = (
    "export without optimisation (torch.onnx.export(model.train(), args, dynamo=True, optimize=False), or"
    " do_constant_folding=False for the older exporter), or use ghn_client.export_architecture"
)


def settle_tensors(context: ReadContext, skeleton: Skeleton) -> tuple[list[ParameterSpec], list[BufferSpec]]:
    """Gives every trainable tensor its name and its one place: its uses get their specs.

    Returns:
        Specs of the tensors that no kept node stands for, and the tensors that are no weights.
    """
    for node in context.graph.nodes:  # a layer's weight is called after its bias where only the bias's name is known
        bias, weight = context.graph.nodes[node.bias].weight if node.bias >= 0 else None, node.weight
        if weight is not None and bias is not None and not weight.token and weight.source.kind == "CONSTANT":
            stem, dot, leaf = bias.torch_name.rpartition(".")
            if leaf in _WEIGHT_OF_BIAS:
                weight.torch_name = f"{stem}{dot}{_WEIGHT_OF_BIAS[leaf]}"
    kept = set()
    for index in skeleton.order:
        kept |= {id(context.graph.nodes[index].weight), id(context.graph.nodes[index].norm_bias)}
    others: list[ParameterSpec] = []
    buffers: list[BufferSpec] = []
    taken: dict[str, int] = {}
    aliased = {source.initializer for source in context.sources if source.uses and source.name != source.initializer}
    for source in context.sources:
        context.graph.spend(len(source.uses))
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
            if kept.isdisjoint(map(id, group)):
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


def _spec(
    source: Source, use: TensorUse, group: list[TensorUse], taken: dict[str, int], *, is_shared: bool
) -> ParameterSpec:
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


def _unique(name: str, taken: dict[str, int]) -> str:
    """The name, with a number where it is taken; ``taken`` holds for each name how often it was asked for, at least."""
    candidate, count = name, taken.get(name, 1)
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken[name] = count
    taken[candidate] = max(taken.get(candidate, 1), 1)
    return candidate


def reading_warnings(context: ReadContext) -> Iterator[str]:
    """The warnings of a graph whose tensors are settled, one sentence or two each."""
    if context.folded:
        yield (
            f"{len(context.folded)} convolutions have a batch normalization folded into them"
            f" ({listed(context.folded)}): its weights are not in this file, so the network is served without them,"
            f" as convolutions with a bias. To get all weights, {_EXPORT_INSTEAD}"
        )
    uses = [use for source in context.sources for use in source.uses]
    recovered = [f"{use.torch_name} as {use.source.name!r}" for use in uses if use.parameter_shape]
    if recovered:
        names = list(dict.fromkeys(recovered))
        yield (
            f"{len(names)} parameters are in this file only as what the exporter computed from them"
            f" ({listed(names)}); they are given under their own names and in their own shapes, which were told from"
            " how they are used"
        )
    origins = {source.name: source.folded for source in context.sources if source.folded}
    if origins:
        known = {use.spec.torch_name for use in uses if use.spec} | {source.name for source in context.sources}
        lost = list(dict.fromkeys(name for names in origins.values() for name in names if name not in known))
        computed = [name for name, names in origins.items() if not known.issuperset(names)]
        if lost:
            yield (
                f"{len(lost)} parameters are not in this file, because the exporter computed other tensors from them,"
                f" and get no values: {listed(lost)}. What was computed ({listed(computed)}) is initialised by a"
                f" rule where it acts as a weight. To get all weights, {_EXPORT_INSTEAD}"
            )
    # Tensors that an exporter computed without saying from what.
    if context.file.is_torch and context.file.kinds:  # a file that declares its parameters
        undeclared = [source for source in context.sources if not source.kind and source.folded is None]
        names = [source.name for source in undeclared if any(not use.torch_name for use in source.uses)]
        if names:
            yield (
                f"{len(names)} tensors were computed from parameters by the exporter ({listed(names)}); they are"
                " initialised by a rule under their own names, and the parameters themselves are not in this file:"
                f" {_EXPORT_INSTEAD}"
            )
    hiding = {
        source.name
        for source in context.sources
        if source.kind == "CONSTANT" and not source.uses and source.folded is None and context.is_computed(source)
        if source.num_elements > 1
    }
    met: dict[str, None] = {}  # those of them that arithmetic combines with the network's data
    for node in context.file.nodes if hiding else ():
        values = [context.values[name] for name in node.inputs] if node.op_type in _ARITHMETIC else []
        context.graph.spend(len(values))
        if any(value.flow for value in values):
            views = (view for value in values if not value.flow for view in value.views)
            met.update((view.source.name, None) for view in views if view.source.name in hiding)
    if met:
        yield (
            f"{len(met)} constants were computed by the exporter, which does not say from what ({listed(list(met))});"
            f" they keep their values. If parameters went into them, these get none: {_EXPORT_INSTEAD}"
        )
    if context.unknown_operators:
        names = [f"{name} ({count})" for name, count in sorted(context.unknown_operators.items())]
        yield f"not understood, so data passes through as if element-wise: {listed(names)}"
    if context.restored:
        yield (
            f"{len(context.restored)} biases were dropped by the exporter because they were zero, and are predicted"
            f" all the same under their torch names: {listed(context.restored)}"
        )
