"""An exported program as ONNX, operator by operator, through the translation library of torch's own exporter.

``torch.onnx.export`` traces the program a second time to decompose it, and prepares its whole library for every
call; both take longer than the export itself. Most operators that vision networks use have a direct translation, so
here the program is translated as it is. What has none is refused, and ``export`` takes the long way round.

ONNX changes nothing in place. ``run_decompositions`` gets rid of in-place operators by a second trace too; here each
becomes its functional twin, and what shows the changed memory and is read later is replaced: the same view by the
result, the tensor that a slice was taken from by one with the slice put back. Groups of constants that are filled
through views (the window masks of Swin) are computed right away. The rest is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy
import onnx
import onnx_ir
import torch
from onnxscript import opset18 as op
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

_ASSERTIONS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size")
MAX_CONSTANT_ELEMENTS = 1 << 22
"""Scalars of constants that may be computed here, all together."""

_LIKE = {"aten::new_zeros": 0, "aten::new_ones": 1, "aten::zeros_like": 0, "aten::ones_like": 1}
_RENAMED = {("bernoulli_", "float"): ("bernoulli", "p"), ("normal_", "default"): ("normal_functional", "default")}
_SCATTERS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""For each operator that shows a part, the one that puts such a part back."""

Groups = dict[int, set[Node]]
"""Nodes that show the same memory, by the storage that torch traced them with."""


class NotTranslatableError(Exception):
    """The program holds something that has no direct translation."""


def translate(program: torch.export.ExportedProgram) -> onnx_ir.Model:
    """The program as ONNX, with parameters and buffers under their names in the module's ``state_dict``.

    The graph of ``program`` is changed.

    Raises:
        NotTranslatableError: An operator has no direct translation, or changes memory in a way that ONNX cannot say.
    """
    from torch.onnx._internal.exporter import _core, _fx_passes

    module, graph = program.graph_module, program.graph_module.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise NotTranslatableError("the program has subgraphs")
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0] in _ASSERTIONS:
            graph.erase_node(node)
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    tensors = {name: program.constants[target] for name, target in lifted.items()}
    has_values = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not isinstance(tensor, FakeTensor)
    }
    _make_functional(module, has_values)
    registry, needs_promotion = _registry(), False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            rewrite = _SIMPLER.get(node.target._schema.name.removeprefix("aten::"))
            if rewrite is not None:
                node.target, node.args, node.kwargs = rewrite(node)
            if not registry.is_registered(node.target):
                raise NotTranslatableError(f"{node.target} has no translation")
        values = [item.meta.get("val") for item in (node, *node.all_input_nodes)]
        needs_promotion |= len({value.dtype for value in values if isinstance(value, torch.Tensor)}) > 1
    if needs_promotion:  # an operator mixes element types, which torch converts silently and ONNX does not
        _fx_passes.insert_type_promotion_nodes(module)
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, Node):  # the exporter reads the outputs there, and what is returned may have been replaced
            spec.arg.name = node.name
    return _core._exported_program_to_onnx_program(program, registry=registry).model


# ---- in-place operators ----------------------------------------------------------------------------------------------


def _make_functional(module: GraphModule, constants: dict[str, torch.Tensor]) -> None:
    """Rewrites the graph of ``module`` without in-place operators; ``constants`` are values of its placeholders."""
    graph = module.graph
    groups: Groups = defaultdict(set)
    for node in graph.nodes:
        if _storage(node):
            groups[_storage(node)].add(node)
    inplace = [node for node in graph.nodes if _is_inplace(node)]
    filled = {_storage(node) for node in inplace if any(not _same_view(x, node) for x in _read_later(node, groups))}
    if filled:
        fixed = _constant_nodes(graph, groups, constants)
        folded = {node for storage in filled if groups[storage] <= fixed for node in groups[storage]}
        _compute_constants(module, folded, constants)
    for node in list(graph.nodes):
        if _is_inplace(node):
            _rewrite(graph, node, groups)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _storage(node: Node) -> int:
    """Identifier of a node's storage; 0 if it is no tensor."""
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def _same_view(node: Node, other: Node) -> bool:
    """Whether two nodes that share memory show the same elements in the same way."""
    views = (node.meta["val"], other.meta["val"])
    return len({(x.dtype, x.shape, x.stride(), x.storage_offset()) for x in views}) == 1


def _is_inplace(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and _storage(node) != 0


def _nodes_after(node: Node) -> set[Node]:
    found = set()
    while (node := node.next).op != "root":
        found.add(node)
    return found


def _read_later(node: Node, groups: Groups) -> list[Node]:
    """Earlier nodes that show the memory which ``node`` changes, and are read after it."""
    later = _nodes_after(node)
    group = groups[_storage(node)]
    return [other for other in group if other is not node and other not in later and not later.isdisjoint(other.users)]


def _rewrite(graph: Graph, node: Node, groups: Groups) -> None:
    """Replaces an in-place operator by its functional twin, and what is read later by what it has become."""
    assert isinstance(node.target, torch._ops.OpOverload)
    namespace, _, name = node.target._schema.name.partition("::")
    overload = node.target._overloadname
    name, overload = _RENAMED.get((name, overload), (name.removesuffix("_"), overload))
    twin = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(twin, torch._ops.OpOverload) or twin._schema.is_mutable:
        raise NotTranslatableError(f"{node.target} has no functional twin")
    view, result, node.target = node.args[0], node, twin
    stale, later = _read_later(node, groups), _nodes_after(node)
    while True:
        for other in [other for other in stale if _same_view(other, result)]:
            other.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)
            stale.remove(other)
        if not stale:
            return
        scatter = _SCATTERS.get(view.target) if isinstance(view, Node) and callable(view.target) else None
        if scatter is None or not isinstance(view, Node) or not isinstance(view.args[0], Node):
            raise NotTranslatableError(f"{view} is changed, and {stale[0]} shows the same memory")
        base = view.args[0]
        with graph.inserting_after(result):
            result = graph.call_function(scatter, (base, result, *view.args[1:]), dict(view.kwargs))
        result.meta = dict(base.meta)
        groups[_storage(base)].add(result)
        view = base


# ---- constants: what depends on neither inputs, weights nor chance ---------------------------------------------------


def _constant_nodes(graph: Graph, groups: Groups, constants: Mapping[str, torch.Tensor]) -> set[Node]:
    found = {node for node in graph.nodes if node.op == "placeholder" and node.name in constants}
    for node in graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and not is_random:
            found.add(node)
    while True:  # what reads, or shows the memory of, something else is none
        tainted = {
            node
            for node in found
            if not groups.get(_storage(node), {node}) <= found or not set(_read_values(node)) <= found
        }
        if not tainted:
            return found
        found -= tainted


def _fill_value(node: Node) -> int | None:
    """What an operator fills a new tensor with that takes no more than a shape from its input."""
    return _LIKE.get(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else None


def _read_values(node: Node) -> list[Node]:
    return node.all_input_nodes if _fill_value(node) is None else []


def _compute_constants(module: GraphModule, wanted: set[Node], constants: Mapping[str, torch.Tensor]) -> None:
    """Computes the nodes ``wanted`` and all that they need, and puts their values into the graph."""
    needed, stack = set[Node](), list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(_read_values(node))
    if sum(node.meta["val"].numel() for node in needed if _storage(node)) > MAX_CONSTANT_ELEMENTS:
        raise NotTranslatableError("the constants of the program are too large to be computed while it is exported")
    values: dict[Node, Any] = {}
    for node in (order := [node for node in module.graph.nodes if node in needed]):
        values[node] = constants[node.name] if node.op == "placeholder" else _evaluate(node, values)
    for node in order:  # now that all is computed, what is filled in place has its last value
        if node.op != "placeholder" and any(user not in needed for user in node.users):
            name = f"constant_{node.name}"
            module.register_buffer(name, values[node].clone(), persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.create_node("get_attr", name, name=name)
            constant.meta = {**node.meta, "val": getattr(module, name)}
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in needed)
    for node in reversed(order):
        if node.op != "placeholder" and not node.users:
            module.graph.erase_node(node)


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    fill, example = _fill_value(node), node.meta["val"]
    if fill is not None:
        return torch.full(tuple(example.shape), fill, dtype=example.dtype)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: values[item])
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert callable(node.target)
    return node.target(*args, **kwargs)


# ---- composite operators by simpler ones, since their decomposition would need another trace -------------------------

Call = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


def _with_own_shape(target: torch._ops.OpOverload) -> Callable[[Node], Call]:
    return lambda node: (target, (node.args[0], list(node.meta["val"].shape)), {})


def _as_cast(node: Node) -> Call:
    return torch.ops.aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}


def _reversed_axes(node: Node) -> list[int]:
    return list(reversed(range(node.meta["val"].dim())))


_SIMPLER: dict[str, Callable[[Node], Call]] = {
    **dict.fromkeys(("to", "type_as"), _as_cast),
    **dict.fromkeys(("reshape_as", "view_as"), _with_own_shape(torch.ops.aten.reshape.default)),
    **dict.fromkeys(
        ("swapaxes", "swapdims"), lambda node: (torch.ops.aten.transpose.int, node.args, dict(node.kwargs))
    ),
    "numpy_T": lambda node: (torch.ops.aten.permute.default, (node.args[0], _reversed_axes(node)), {}),
    "expand_as": _with_own_shape(torch.ops.aten.expand.default),
    "zero": lambda node: (torch.ops.aten.full_like.default, (node.args[0], 0), {}),
}

# ---- translations that torch's library lacks ------------------------------------------------------------------------


def _batch_norm(
    input: Any,  # noqa: A002
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """``aten::batch_norm`` with running statistics."""
    if running_mean is None or training:
        raise NotTranslatableError("a batch normalisation without running statistics has no direct translation")

    def repeated(value: float) -> Any:
        array = numpy.full(int(input.shape[1]), value, dtype=numpy.float32)
        constant: Any = op.Constant(value=onnx.numpy_helper.from_array(array))
        return op.CastLike(constant, input)

    weight = repeated(1.0) if weight is None else weight
    bias = repeated(0.0) if bias is None else bias
    return op.BatchNormalization(input, weight, bias, running_mean, running_var, epsilon=eps, momentum=1.0 - momentum)


def _convolution(
    input: Any,  # noqa: A002
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """``aten::conv1d`` to ``conv3d``; torch's own translation gives a layer without bias a computed bias of zeros."""
    axes = len(weight.shape) - 2

    def per_axis(values: Sequence[int]) -> list[int]:
        return list(values) * axes if len(values) == 1 else list(values)

    attributes: dict[str, Any] = {"strides": per_axis(stride), "dilations": per_axis(dilation), "group": groups}
    if padding == "same":  # in numbers, since onnxruntime refuses auto_pad beside dilations; the odd one comes last
        totals = [step * (int(size) - 1) for step, size in zip(attributes["dilations"], weight.shape[2:], strict=True)]
        attributes["pads"] = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    else:
        attributes["pads"] = [0] * (2 * axes) if padding == "valid" else per_axis(padding) * 2  # type: ignore[arg-type]
    return op.Conv(input, weight, bias, **attributes) if bias is not None else op.Conv(input, weight, **attributes)


def _adaptive_average(input: Any, output_size: Sequence[int]) -> Any:  # noqa: A002
    """``aten::adaptive_avg_pool1d`` to ``3d``, where the windows are equal."""
    sizes = [int(size) for size in input.shape[-len(output_size) :]]
    if all(size == 1 for size in output_size):
        return op.GlobalAveragePool(input)
    if any(size % wanted for size, wanted in zip(sizes, output_size, strict=True)):
        raise NotTranslatableError("an adaptive pooling with unequal windows has no direct translation")
    kernel = [size // wanted for size, wanted in zip(sizes, output_size, strict=True)]
    return op.AveragePool(input, kernel_shape=kernel, strides=kernel)


@cache
def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    aten = torch.ops.aten
    pools = (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)
    convolutions = (aten.conv1d, aten.conv2d, aten.conv3d)
    extra: dict[torch._ops.OpOverload, Callable[..., Any]] = {
        aten.batch_norm.default: _batch_norm,
        **{target: _convolution for one in convolutions for target in (one.default, one.padding)},
        **{one.default: _adaptive_average for one in pools},
    }
    registry = _registration.ONNXRegistry.from_torchlib()
    for target, function in extra.items():
        options: Any = {"signature": None, "is_custom": True, "skip_signature_inference": True}
        registry._register(target, _registration.OnnxDecompMeta(onnx_function=function, fx_target=target, **options))
    return registry
