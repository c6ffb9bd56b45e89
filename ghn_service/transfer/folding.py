"""Numbers that follow from the file alone: sizes and indices of reshapes, scales of attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy

from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxFile, OnnxNode, constant_number
from ghn_service.transfer.work import spend

Array = numpy.ndarray
MAX_RANK = 16
_MAX_BYTES = 2**20
_MAX_ELEMENTS = 1024
"""Of an array that is computed with, so that two of them broadcast to no more than its square."""


def constant(file: OnnxFile, name: str, shape: tuple[int, ...]) -> Array | None:
    """The numbers of an initializer or Constant node, if they are integers in the file or one float."""
    attributes = file.producers[name].attributes if name in file.producers else {}
    tensor = attributes["value"].t if "value" in attributes else file.tensors.get(name)
    if len(shape) > MAX_RANK:
        return None
    dtype = {7: "<i8", 6: "<i4"}.get(tensor.data_type) if tensor is not None else None  # INT64, INT32
    if tensor is not None and dtype and len(tensor.raw_data) == math.prod(shape) * int(dtype[-1]) <= _MAX_BYTES:
        return numpy.frombuffer(tensor.raw_data, dtype).astype(numpy.int64).reshape(shape)
    integers = file.integers(name)
    if integers is not None and len(integers) == math.prod(shape):
        return numpy.array(integers, dtype=numpy.int64).reshape(shape)
    number = constant_number(file.producers[name]) if name in file.producers else None
    return None if number is None else numpy.full(shape, number)


def fold(node: OnnxNode, operands: list[Array | None]) -> Array | None:
    """What a node computes from these numbers, int64 or float64; None where that is unknown, not finite, or too much.

    Args:
        node: The node.
        operands: Its operands, without those that it leaves out and the type of a CastLike.
    """
    rule = _RULES.get(node.op_type)
    arrays = [item for item in operands if item is not None and item.size <= _MAX_ELEMENTS]
    if rule is None or not arrays or len(arrays) < len(operands):
        return None
    spend(sum(item.size for item in arrays))
    try:
        with numpy.errstate(all="ignore"):
            result = numpy.asarray(rule(node, *arrays))
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    if result.size > _MAX_ELEMENTS or result.ndim > MAX_RANK or not numpy.isfinite(result).all():
        return None
    return result if result.dtype == numpy.float64 else result.astype(numpy.int64)


_Rule = Callable[..., object]


def _by_element(function: _Rule) -> _Rule:
    def fold_elements(node: OnnxNode, *operands: Any) -> object:
        _check_broadcast(operands)
        return functools.reduce(function, operands) if len(operands) > 1 else function(*operands)

    return fold_elements


def _check_size(count: int) -> None:
    if count > _MAX_ELEMENTS:
        raise ValueError("too many")


def _check_broadcast(operands: Iterable[Array]) -> None:
    _check_size(math.prod(max(size, 1) for size in numpy.broadcast_shapes(*(item.shape for item in operands))))


def _where(node: OnnxNode, *operands: Array) -> Array:
    _check_broadcast(operands)
    return numpy.where(*operands)


def _concatenate(node: OnnxNode, *items: Array) -> Array:
    _check_size(sum(item.size for item in items))
    return numpy.concatenate([numpy.atleast_1d(item) for item in items])


def _gather(node: OnnxNode, x: Array, index: Array) -> Array:
    axis = node.integer("axis", 0)
    _check_size(x.size // max(x.shape[axis], 1) * index.size)
    return numpy.take(x, index, axis=axis)


def _cast(node: OnnxNode, x: Array) -> Array:
    return x.astype(numpy.float64 if node.integer("to", 1) in FLOAT_TYPES else numpy.int64)


def _divide(a: Array, b: Array) -> object:
    return a // b if a.dtype == b.dtype == numpy.int64 and b.all() else a / b


def _slice(node: OnnxNode, data: Array, start: Array, end: Array, *axes_and_step: Array) -> Array:
    step = int(axes_and_step[1].item()) if len(axes_and_step) > 1 else 1
    if data.ndim != 1:
        raise ValueError("only lists are cut")
    return data[int(start.item()) : int(end.item()) : step]


def _filled(node: OnnxNode, shape: Array) -> Array:
    sizes = [int(size) for size in shape]
    _check_size(math.prod(sizes))
    return numpy.zeros(sizes, dtype=numpy.int64)


def _range(node: OnnxNode, *bounds: Array) -> Array:
    numbers = range(*(int(item.item()) for item in bounds))
    if len(numbers) > _MAX_ELEMENTS or any(item.dtype != numpy.int64 for item in bounds):
        raise ValueError("too many, or fractions")
    return numpy.array(numbers, dtype=numpy.int64)


_RULES: dict[str, _Rule] = {
    "Identity": lambda node, x: x,
    "CastLike": lambda node, x: x,
    "Cast": _cast,
    "Add": _by_element(numpy.add),
    "Sub": _by_element(numpy.subtract),
    "Mul": _by_element(numpy.multiply),
    "Div": _by_element(_divide),
    "Mod": _by_element(numpy.mod),
    "Pow": _by_element(numpy.power),
    "Neg": _by_element(numpy.negative),
    "Sqrt": _by_element(numpy.sqrt),
    "Reciprocal": lambda node, x: 1 / x,
    "Equal": _by_element(numpy.equal),
    "Max": _by_element(numpy.maximum),
    "Min": _by_element(numpy.minimum),
    "Where": _where,
    "Concat": _concatenate,
    "Gather": _gather,
    "Squeeze": lambda node, x, *axes: x.reshape([size for size in x.shape if size != 1]),
    "Unsqueeze": lambda node, x, *axes: x.reshape([1, *x.shape] if x.ndim < 2 else [-1, -1]),
    "Reshape": lambda node, x, shape: x.reshape([int(size) for size in shape]),
    "Slice": _slice,
    "ConstantOfShape": _filled,
    "Range": _range,
    "ReduceProd": lambda node, x, *axes: x.prod(keepdims=bool(node.integer("keepdims", 1))),
}
