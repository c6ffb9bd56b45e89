"""What the user should know about a reading: what the file no longer holds, and what was not understood."""

from __future__ import annotations

from collections.abc import Iterator

from ghn_service.graph.onnx.context import ReadContext

_MAX_LISTED = 10
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sum", "Concat", "Where", "MatMul", "Einsum"})
_EXPORT_INSTEAD = (
    "export without optimisation (torch.onnx.export(model.train(), args, dynamo=True, optimize=False), or"
    " do_constant_folding=False for the older exporter), or use ghn_client.export_architecture"
)


def reading_warnings(context: ReadContext) -> Iterator[str]:
    """The warnings of a graph whose tensors are settled, one sentence or two each."""
    if context.folded:
        yield (
            f"{len(context.folded)} convolutions have a batch normalization folded into them"
            f" ({_listed(context.folded)}): its weights are not in this file, so the network is served without them,"
            f" as convolutions with a bias. To get all weights, {_EXPORT_INSTEAD}"
        )
    uses = [use for source in context.sources for use in source.uses]
    recovered = [f"{use.torch_name} as {use.source.name!r}" for use in uses if use.parameter_shape]
    if recovered:
        names = list(dict.fromkeys(recovered))
        yield (
            f"{len(names)} parameters are in this file only as what the exporter computed from them"
            f" ({_listed(names)}); they are given under their own names and in their own shapes, which were told from"
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
                f" and get no values: {_listed(lost)}. What was computed ({_listed(computed)}) is initialised by a"
                f" rule where it acts as a weight. To get all weights, {_EXPORT_INSTEAD}"
            )
    yield from _about_undeclared(context)
    if context.unknown_operators:
        names = [f"{name} ({count})" for name, count in sorted(context.unknown_operators.items())]
        yield f"not understood, so data passes through as if element-wise: {_listed(names)}"
    if context.restored:
        yield (
            f"{len(context.restored)} biases were dropped by the exporter because they were zero, and are predicted"
            f" all the same under their torch names: {_listed(context.restored)}"
        )


def _about_undeclared(context: ReadContext) -> Iterator[str]:
    """Tensors that an exporter computed without saying from what."""
    if context.file.is_torch and context.file.kinds:  # a file that declares its parameters
        undeclared = [source for source in context.sources if not source.kind and source.folded is None]
        names = [source.name for source in undeclared if any(not use.torch_name for use in source.uses)]
        if names:
            yield (
                f"{len(names)} tensors were computed from parameters by the exporter ({_listed(names)}); they are"
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
        if any(value.flow for value in values):
            views = (view for value in values if not value.flow for view in value.views)
            met.update((view.source.name, None) for view in views if view.source.name in hiding)
    if met:
        yield (
            f"{len(met)} constants were computed by the exporter, which does not say from what ({_listed(list(met))});"
            f" they keep their values. If parameters went into them, these get none: {_EXPORT_INSTEAD}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
