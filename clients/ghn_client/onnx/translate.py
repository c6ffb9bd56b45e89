"""An exported program as ONNX, operator by operator, through the translation library of torch's own exporter.

``torch.onnx.export`` traces the program a second time to decompose it, and prepares its whole library for every
call; both take longer than the export itself. Most operators that vision networks use have a direct translation, so
here the program is translated as it is. What has none is refused, and ``export`` takes the long way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy
import onnx
import onnx_ir
import torch
from onnxscript import opset18 as op
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from ghn_client.onnx.functional import make_functional

_ASSERTIONS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size")


class NotTranslatableError(Exception):
    """The program holds something that has no direct translation."""


def translate(program: torch.export.ExportedProgram) -> onnx_ir.Model:
    """The program as ONNX, with parameters and buffers under their names in the module's ``state_dict``.

    The graph of ``program`` is changed.

    Raises:
        NotTranslatableError: An operator has no direct translation.
        NotFunctionalError: The program changes memory in a way that cannot be written as ONNX.
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
    make_functional(module, {name: tensor for name, tensor in tensors.items() if _has_values(tensor)})
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
    return _core._exported_program_to_onnx_program(program, registry=registry).model


def _has_values(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_meta and not isinstance(tensor, FakeTensor)


# ---- composite operators by simpler ones, since their decomposition would need another trace -------------------------

Call = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


def _as_reshape(node: Node) -> Call:
    return torch.ops.aten.reshape.default, (node.args[0], list(node.meta["val"].shape)), {}


def _as_cast(node: Node) -> Call:
    return torch.ops.aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}


def _as_transpose(node: Node) -> Call:
    return torch.ops.aten.transpose.int, node.args, dict(node.kwargs)


_SIMPLER: dict[str, Callable[[Node], Call]] = {
    "to": _as_cast,
    "type_as": _as_cast,
    "reshape_as": _as_reshape,
    "view_as": _as_reshape,
    "expand_as": lambda node: (torch.ops.aten.expand.default, (node.args[0], list(node.meta["val"].shape)), {}),
    "zero": lambda node: (torch.ops.aten.full_like.default, (node.args[0], 0), {}),
    "swapaxes": _as_transpose,
    "swapdims": _as_transpose,
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
    weight = _repeated(1.0, input) if weight is None else weight
    bias = _repeated(0.0, input) if bias is None else bias
    return op.BatchNormalization(input, weight, bias, running_mean, running_var, epsilon=eps, momentum=1.0 - momentum)


def _repeated(value: float, like: Any) -> Any:
    """A constant vector with one entry per channel of ``like``."""
    array = numpy.full(int(like.shape[1]), value, dtype=numpy.float32)
    constant: Any = op.Constant(value=onnx.numpy_helper.from_array(array))
    vector: Any = op.CastLike(constant, like)
    return vector


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
    attributes: dict[str, Any] = {
        "strides": _per_axis(stride, axes),
        "dilations": _per_axis(dilation, axes),
        "group": groups,
    }
    if isinstance(padding, str):
        attributes["auto_pad"] = "SAME_UPPER" if padding == "same" else "VALID"
    else:
        attributes["pads"] = _per_axis(padding, axes) * 2
    return op.Conv(input, weight, bias, **attributes) if bias is not None else op.Conv(input, weight, **attributes)


def _per_axis(values: Sequence[int], axes: int) -> list[int]:
    return list(values) * axes if len(values) == 1 else list(values)


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
    extra: dict[torch._ops.OpOverload, Callable[..., Any]] = {
        aten.batch_norm.default: _batch_norm,
        **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), _convolution),
        **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), _convolution),
        **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _convolution),
        aten.adaptive_avg_pool1d.default: _adaptive_average,
        aten.adaptive_avg_pool2d.default: _adaptive_average,
        aten.adaptive_avg_pool3d.default: _adaptive_average,
    }
    registry = _registration.ONNXRegistry.from_torchlib()
    for target, function in extra.items():
        registry._register(
            target,
            _registration.OnnxDecompMeta(
                onnx_function=function, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True
            ),
        )
    return registry
