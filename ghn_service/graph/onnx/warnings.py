"""What the user should know about a reading: what the file no longer holds, and what was not understood."""

from __future__ import annotations

from ghn_service.graph.onnx.context import ReadContext
from ghn_service.graph.onnx.parameters import SettledTensors
from ghn_service.graph.raw_graph import Source

_MAX_LISTED = 10
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sum", "Concat", "Where", "MatMul", "Einsum"})
_EXPORT_INSTEAD = (
    "export without optimisation (torch.onnx.export(model.train(), args, dynamo=True, optimize=False), or"
    " do_constant_folding=False for the older exporter), or use ghn_client.export_architecture"
)


def reading_warnings(context: ReadContext, tensors: SettledTensors) -> tuple[str, ...]:
    """The warnings of a graph that was read."""
    return tuple(
        sentence
        for sentence in (
            _folded_norms(context),
            _recovered(context),
            _lost(context, tensors),
            _computed(context),
            _not_understood_constants(context),
            _unknown_operators(context),
            _restored(context),
        )
        if sentence
    )


def _folded_norms(context: ReadContext) -> str:
    if not context.folded:
        return ""
    return (
        f"{len(context.folded)} convolutions have a batch normalization folded into them"
        f" ({_listed(context.folded)}): its weights are not in this file, so the network is served without them,"
        f" as convolutions with a bias. To get all weights, {_EXPORT_INSTEAD}"
    )


def _recovered(context: ReadContext) -> str:
    uses = [use for source in context.sources for use in source.uses if use.parameter_shape]
    pairs = dict.fromkeys(f"{use.torch_name} as {use.source.name!r}" for use in uses)
    if not pairs:
        return ""
    return (
        f"{len(pairs)} parameters are in this file only as what the exporter computed from them"
        f" ({_listed(list(pairs))}); they are given under their own names and in their own shapes, which were told from"
        " how they are used"
    )


def _lost(context: ReadContext, tensors: SettledTensors) -> str:
    """Parameters of which nothing can be given."""
    known = {spec.torch_name for spec in (*tensors.specs.values(), *tensors.others)} | {
        source.name for source in context.sources
    }
    lost = dict.fromkeys(name for source in context.sources for name in source.folded or () if name not in known)
    if not lost:
        return ""
    computed = dict.fromkeys(source.name for source in context.sources for name in source.folded or () if name in lost)
    return (
        f"{len(lost)} parameters are not in this file, because the exporter computed other tensors from them, and get"
        f" no values: {_listed(list(lost))}. What was computed ({_listed(list(computed))}) is initialised by a rule"
        f" where it acts as a weight. To get all weights, {_EXPORT_INSTEAD}"
    )


def _computed(context: ReadContext) -> str:
    """The same for a file that declares its parameters, but does not say what it computed from them."""
    if not (context.file.is_torch and context.file.kinds):
        return ""
    names = [
        source.name
        for source in context.sources
        if not source.kind and source.folded is None and any(not use.torch_name for use in source.uses)
    ]
    if not names:
        return ""
    return (
        f"{len(names)} tensors were computed from parameters by the exporter ({_listed(names)}); they are initialised"
        f" by a rule under their own names, and the parameters themselves are not in this file: {_EXPORT_INSTEAD}"
    )


def _not_understood_constants(context: ReadContext) -> str:
    candidates = {source.name for source in context.sources if _may_hide_parameters(context, source)}
    names = [name for name in _met_by_data(context) if name in candidates] if candidates else []
    if not names:
        return ""
    return (
        f"{len(names)} constants were computed by the exporter, which does not say from what ({_listed(names)}); they"
        f" keep their values. If parameters went into them, these get none: {_EXPORT_INSTEAD}"
    )


def _may_hide_parameters(context: ReadContext, source: Source) -> bool:
    is_older = source.folded is None and context.is_computed(source)
    return is_older and not source.uses and source.num_elements > 1


def _met_by_data(context: ReadContext) -> dict[str, None]:
    """Tensors that arithmetic combines with the network's data."""
    met: dict[str, None] = {}
    for node in context.file.nodes:
        values = [context.values[name] for name in node.inputs] if node.op_type in _ARITHMETIC else []
        if any(value.flow for value in values):
            met.update((view.source.name, None) for value in values if not value.flow for view in value.views)
    return met


def _unknown_operators(context: ReadContext) -> str:
    if not context.unknown_operators:
        return ""
    names = [f"{name} ({count})" for name, count in sorted(context.unknown_operators.items())]
    return f"not understood, so data passes through as if element-wise: {_listed(names)}"


def _restored(context: ReadContext) -> str:
    if not context.restored:
        return ""
    return (
        f"{len(context.restored)} biases were dropped by the exporter because they were zero, and are predicted"
        f" all the same under their torch names: {_listed(context.restored)}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
