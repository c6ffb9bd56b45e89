"""ONNX operators that calculate, in terms of torch functions.

An operator gets the builder, its inputs (``None`` where an optional one is left out) and its attributes, and returns
its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import onnx
import torch
from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.onnx.edit import TORCH_DTYPES
from ghn_client.onnx.torch_builder import Builder, Traced, Value, batch_position

Inputs = Sequence[Value | None]
Attributes = Mapping[str, Any]
Operator = Callable[[Builder, Inputs, Attributes], Any]


def numbers(value: Value | None, what: str) -> list[Any]:
    """A constant as a list of numbers.

    Raises:
        UnsupportedModuleError: It depends on the input.
    """
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModuleError(f"expected {what} to be constant for inputs of one size, it depends on the input")
    return list(value.reshape(-1).tolist())


def given(inputs: Inputs, index: int) -> Value | None:
    """An optional input."""
    return inputs[index] if index < len(inputs) else None


def axes_of(inputs: Inputs, attributes: Attributes, index: int = 1) -> list[int] | None:
    """Axes, which are an attribute in older opsets and an input in newer ones."""
    value = given(inputs, index)
    if value is not None:
        return numbers(value, "axes")
    return list(attributes["axes"]) if "axes" in attributes else None


def rank_of(value: Value) -> int:
    """Number of dimensions."""
    return int((value.single if isinstance(value, Traced) else value).dim())


def shape_of(value: Value) -> list[int]:
    """Sizes on the example."""
    return list((value.single if isinstance(value, Traced) else value).shape)


#: One input, no attributes.
UNARY: dict[str, Callable[..., Any]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Reciprocal": torch.reciprocal,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Not": torch.logical_not,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Mish": functional.mish,
    "HardSwish": functional.hardswish,
    "Selu": functional.selu,
    "IsNaN": torch.isnan,
}
#: Two inputs that broadcast, no attributes.
BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
#: ``keepdim`` reductions over axes.
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": partial(torch.linalg.vector_norm, ord=1),
    "ReduceL2": torch.linalg.vector_norm,
    "ReduceLogSumExp": torch.logsumexp,
}


def _unary(function: Callable[..., Any], b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return b.call(function, inputs[0])


def _binary(function: Callable[..., Any], b: Builder, inputs: Inputs, _: Attributes) -> Any:
    first, second = inputs[:2]
    if isinstance(first, torch.Tensor) and first.dim() == 0 and isinstance(second, Traced):
        first = first.reshape(1)  # some functions want a tensor first
    return b.call(function, first, second)


def _reduce(function: Callable[..., Any], b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axes = axes_of(inputs, attributes)
    if not axes:
        if attributes.get("noop_with_empty_axes"):
            return inputs[0]
        axes = list(range(rank_of(inputs[0])))  # type: ignore[arg-type]
    return b.call(function, inputs[0], dim=tuple(axes), keepdim=bool(attributes.get("keepdims", 1)))


def _extreme(function: Callable[..., Any], b: Builder, inputs: Inputs, _: Attributes) -> Any:
    result = inputs[0]
    for other in inputs[1:]:
        if isinstance(other, torch.Tensor) and isinstance(result, Traced):
            other = other.reshape(1) if other.dim() == 0 else other
        result = b.call(function, result, other)
    return result


def _divide(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    tensor = inputs[0].single if isinstance(inputs[0], Traced) else inputs[0]
    assert tensor is not None
    if tensor.is_floating_point():
        return _binary(torch.div, b, inputs, attributes)
    return b.call(torch.div, inputs[0], inputs[1], rounding_mode="trunc")


def _modulo(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return _binary(torch.fmod if attributes.get("fmod") else torch.remainder, b, inputs, attributes)


def _clip(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    bounds = []
    for index, name in ((1, "min"), (2, "max")):
        value = given(inputs, index)
        bounds.append(numbers(value, name)[0] if value is not None else attributes.get(name))
    return b.call(torch.clamp, inputs[0], *bounds)


def _hard_sigmoid(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return b.call(functional.hardsigmoid, inputs[0])
    return b.call(torch.clamp, b.call(torch.add, b.call(torch.mul, inputs[0], alpha), beta), 0.0, 1.0)


def _gelu(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(functional.gelu, inputs[0], approximate=attributes.get("approximate", "none"))


def _softmax(function: Callable[..., Any], b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(function, inputs[0], dim=attributes.get("axis", -1))


def _where(b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return b.call(torch.where, *inputs)


def _identity(_b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return inputs[0]


def _einsum(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(torch.einsum, attributes["equation"], *inputs)


def _leaky(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(functional.leaky_relu, inputs[0], attributes.get("alpha", 0.01))


def _elu(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(functional.elu, inputs[0], attributes.get("alpha", 1.0))


# ---- operators that move elements or make constants ------------------------------------------------------------------


def _shape(_b: Builder, inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    sizes = shape_of(inputs[0])  # type: ignore[arg-type]
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _size(_b: Builder, inputs: Inputs, _: Attributes) -> torch.Tensor:
    return torch.tensor(math.prod(shape_of(inputs[0])))  # type: ignore[arg-type]


def _constant(_b: Builder, _inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    ((name, value),) = attributes.items()
    if name == "value":
        assert isinstance(value, torch.Tensor)
        return value
    is_float = name.startswith("value_float")
    return torch.tensor(value, dtype=torch.float32 if is_float else torch.int64)


def _constant_of_shape(_b: Builder, inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    value = attributes.get("value", torch.zeros(1))
    return value.reshape(1).repeat(math.prod(sizes := numbers(inputs[0], "the shape"))).reshape(sizes)  # type: ignore[no-any-return]


def _range(_b: Builder, inputs: Inputs, _: Attributes) -> torch.Tensor:
    start, limit, step = (numbers(value, "the range")[0] for value in inputs[:3])
    return torch.arange(start, limit, step)


def _cast(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return _to(b, inputs[0], _dtype(attributes["to"]))


def _cast_like(b: Builder, inputs: Inputs, _: Attributes) -> Any:
    like = inputs[1].single if isinstance(inputs[1], Traced) else inputs[1]
    assert like is not None
    return _to(b, inputs[0], like.dtype)


def _to(b: Builder, value: Value | None, dtype: torch.dtype) -> Any:
    tensor = value.single if isinstance(value, Traced) else value
    return value if tensor is not None and tensor.dtype == dtype else b.call(torch.Tensor.to, value, dtype)


def _dtype(number: int) -> torch.dtype:
    if number not in TORCH_DTYPES:
        raise UnsupportedModuleError(f"the element type {onnx.helper.tensor_dtype_to_string(number)} is not supported")
    return TORCH_DTYPES[number]


def _reshape(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    shape, sizes = numbers(inputs[1], "the shape"), shape_of(inputs[0])  # type: ignore[arg-type]
    if not attributes.get("allowzero"):
        shape = [sizes[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return b.reshape(inputs[0], shape)  # type: ignore[arg-type]


def _flatten(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axis = attributes.get("axis", 1)
    if axis == 1 and rank_of(inputs[0]) > 1:  # type: ignore[arg-type]
        return b.call(torch.flatten, inputs[0], 1)
    sizes = shape_of(inputs[0])  # type: ignore[arg-type]
    return b.reshape(inputs[0], [math.prod(sizes[:axis]), math.prod(sizes[axis:])])  # type: ignore[arg-type]


def _transpose(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value = inputs[0]
    assert value is not None
    order = tuple(attributes.get("perm", range(rank_of(value))[::-1]))
    result = b.call(torch.permute, value, order)
    if isinstance(value, Traced) and value.parameter and order == (1, 0):
        return Traced(result.node, result.single, result.several, transposed=value.parameter)
    return result


def _squeeze(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    sizes = shape_of(inputs[0])  # type: ignore[arg-type]
    axes = axes_of(inputs, attributes)
    if axes is None:
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
    return b.call(torch.squeeze, inputs[0], tuple(axes))


def _unsqueeze(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axes = axes_of(inputs, attributes) or []
    rank, result = rank_of(inputs[0]) + len(axes), inputs[0]  # type: ignore[arg-type]
    for axis in sorted(axis % rank for axis in axes):
        result = b.call(torch.unsqueeze, result, axis)
    return result


def _expand(b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return b.expand(inputs[0], numbers(inputs[1], "the shape"))  # type: ignore[arg-type]


def concatenate(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Concatenates; parts that do not depend on the input (class tokens) are repeated along the batch."""
    rank = parts[0].dim()
    sizes = [max(part.shape[k] for part in parts) for k in range(rank)]
    sizes[axis % rank] = -1
    return torch.cat([part.expand(sizes) for part in parts], axis)


def _concat(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    parts, axis = list(inputs), attributes["axis"]
    if not any(isinstance(part, Traced) for part in parts):
        return torch.cat(parts, axis)  # type: ignore[arg-type]
    sizes = [list(part.several.shape if isinstance(part, Traced) else part.shape) for part in parts]  # type: ignore[union-attr]
    for one in sizes:
        one[axis] = 0
    same = all(one == sizes[0] for one in sizes)
    parts = [part.reshape(1) if isinstance(part, torch.Tensor) and part.dim() == 0 else part for part in parts]
    return b.call(torch.cat, parts, axis) if same else b.call(concatenate, parts, axis)


def _split(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axis, size = attributes.get("axis", 0), None
    lengths = numbers(inputs[1], "the split") if given(inputs, 1) is not None else attributes.get("split")
    if lengths is None:
        size = shape_of(inputs[0])[axis]  # type: ignore[arg-type]
        chunk = -(-size // attributes["num_outputs"])
        lengths = [min(chunk, size - start) for start in range(0, size, chunk)]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return tuple(
        b.call(torch.narrow, inputs[0], axis, start, length) for start, length in zip(starts, lengths, strict=True)
    )


def _split_to_sequence(b: Builder, inputs: Inputs, attributes: Attributes) -> list[Any]:
    """A list, which stands for a sequence; only SequenceAt reads it."""
    axis = attributes.get("axis", 0)
    total = shape_of(inputs[0])[axis]  # type: ignore[arg-type]
    lengths: list[int] = [1] * total
    if given(inputs, 1) is not None:
        asked = numbers(inputs[1], "the split")
        size = asked[0]
        is_size = isinstance(inputs[1], torch.Tensor) and inputs[1].dim() == 0
        lengths = [min(size, total - start) for start in range(0, total, size)] if is_size else asked
    parts = _split(b, [inputs[0], torch.tensor(lengths)], {"axis": axis})
    drop = given(inputs, 1) is None and not attributes.get("keepdims", 1)
    return [b.call(torch.squeeze, part, axis) if drop else part for part in parts]


def _sequence_at(_b: Builder, inputs: Inputs, _: Attributes) -> Any:
    sequence: Any = inputs[0]
    return sequence[int(numbers(inputs[1], "the place")[0])]


def _slice(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value = inputs[0]
    assert value is not None
    if len(inputs) > 1:
        starts, ends = numbers(inputs[1], "a slice"), numbers(inputs[2], "a slice")
        axes = numbers(inputs[3], "axes") if given(inputs, 3) is not None else list(range(len(starts)))
        steps = numbers(inputs[4], "steps") if given(inputs, 4) is not None else [1] * len(starts)
    else:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        whole = start == 0 and end >= shape_of(value)[axis] and step == 1
        if not whole:
            value = _sliced(b, value, axis, start, end, step)
    return value


def take_slice(value: torch.Tensor, axis: int, start: int | None, end: int | None, step: int) -> torch.Tensor:
    """``value[start:end:step]`` along one axis."""
    index = [slice(None)] * value.dim()
    index[axis] = slice(start, end, step)
    return value[tuple(index)]


def _sliced(b: Builder, value: Value, axis: int, start: int, end: int, step: int) -> Value:
    size = shape_of(value)[axis]
    if step > 0:
        return b.call(take_slice, value, axis, start, min(end, size), step)  # type: ignore[no-any-return]
    first = min(start if start >= 0 else start + size, size - 1)
    last = max(end + size if end < 0 else end, -1)
    indices = torch.arange(first, last, step)
    return b.call(torch.index_select, value, axis, indices)  # type: ignore[no-any-return]


def _gather(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, indices, axis = inputs[0], inputs[1], attributes.get("axis", 0)
    if not isinstance(indices, torch.Tensor):
        if isinstance(indices, Traced) and axis == 0 and rank_of(value) == 2:  # type: ignore[arg-type]
            return b.call(functional.embedding, indices, value)
        raise UnsupportedModuleError("Gather with indices that depend on the input is supported for embeddings only")
    axis %= rank_of(value)  # type: ignore[arg-type]
    size = shape_of(value)[axis]  # type: ignore[arg-type]
    indices = torch.where(indices < 0, indices + size, indices)
    if isinstance(value, Traced) and value.several.shape[axis] != size:
        return _gather_samples(b, value, indices, axis)
    if indices.dim() == 0:
        return b.call(torch.select, value, axis, int(indices))
    flat = b.call(torch.index_select, value, axis, indices.flatten())
    if indices.dim() == 1:
        return flat
    sizes = shape_of(value)  # type: ignore[arg-type]
    return b.reshape(flat, [*sizes[:axis], *indices.shape, *sizes[axis + 1 :]])


def _gather_samples(b: Builder, value: Traced, indices: torch.Tensor, axis: int) -> Any:
    """Gathers from an axis in which the batch is, merged with others; the indices are those of one sample."""
    sizes = shape_of(value)
    if b.batch_size != 1 or batch_position(value) != math.prod(sizes[:axis]):
        raise UnsupportedModuleError(
            f"{value.node.name}: indices into the batch need a file exported with batch size 1"
        )
    apart = b.reshape(value, [*sizes[:axis], 1, *sizes[axis:]])
    chosen = b.call(torch.index_select, apart, axis + 1, indices.flatten())
    return b.reshape(chosen, [*sizes[:axis], *indices.shape, *sizes[axis + 1 :]])


def _gather_elements(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    return b.call(torch.gather, inputs[0], attributes.get("axis", 0), inputs[1])


def gather_nd(value: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """ONNX GatherND without batch axes."""
    return value[tuple(indices.movedim(-1, 0))]


def _gather_nd(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if attributes.get("batch_dims"):
        raise UnsupportedModuleError("GatherND with batch_dims is not supported")
    return b.call(gather_nd, inputs[0], inputs[1])


def scatter_nd(value: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """ONNX ScatterND that replaces."""
    result = value.clone()
    result[tuple(indices.movedim(-1, 0))] = updates
    return result


def _scatter_nd(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if attributes.get("reduction", "none") != "none":
        raise UnsupportedModuleError("ScatterND with a reduction is not supported")
    return b.call(scatter_nd, *inputs)


def _tile(b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return b.call(torch.Tensor.repeat, inputs[0], tuple(numbers(inputs[1], "the repeats")))


def _pad(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    pads = numbers(inputs[1], "the padding") if given(inputs, 1) is not None else list(attributes["pads"])
    rank = rank_of(inputs[0])  # type: ignore[arg-type]
    axes = numbers(inputs[3], "axes") if given(inputs, 3) is not None else list(range(rank))
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        before[axis], after[axis] = pads[index], pads[index + len(axes)]
    flat = [size for axis in reversed(range(rank)) for size in (before[axis], after[axis])]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        attributes.get("mode", "constant")
    ]
    value = numbers(inputs[2], "the value")[0] if given(inputs, 2) is not None else attributes.get("value", 0.0)
    options = {"value": value} if mode == "constant" else {}
    return b.call(functional.pad, inputs[0], tuple(flat), mode=mode, **options) if any(flat) else inputs[0]


def _triangle(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    diagonal = int(numbers(inputs[1], "the diagonal")[0]) if given(inputs, 1) is not None else 0
    return b.call(torch.triu if attributes.get("upper", 1) else torch.tril, inputs[0], diagonal)


def _resize(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    sizes = given(inputs, 3)
    before = shape_of(inputs[0])  # type: ignore[arg-type]
    if sizes is not None:
        target = numbers(sizes, "the size")[2:]
    else:
        target = [int(size * scale) for size, scale in zip(before, numbers(inputs[2], "scales"), strict=True)][2:]
    mode = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[attributes.get("mode", "nearest")]
    aligned = attributes.get("coordinate_transformation_mode") == "align_corners"
    options = {} if mode == "nearest" else {"align_corners": aligned}
    return b.call(functional.interpolate, inputs[0], size=tuple(target), mode=mode, **options)


OPERATORS: dict[str, Operator] = {
    **{name: partial(_unary, function) for name, function in UNARY.items()},
    **{name: partial(_binary, function) for name, function in BINARY.items()},
    **{name: partial(_reduce, function) for name, function in REDUCTIONS.items()},
    "Max": partial(_extreme, torch.maximum),
    "Min": partial(_extreme, torch.minimum),
    "Div": _divide,
    "Mod": _modulo,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Softmax": partial(_softmax, torch.softmax),
    "LogSoftmax": partial(_softmax, torch.log_softmax),
    "LeakyRelu": _leaky,
    "Elu": _elu,
    "Where": _where,
    "Identity": _identity,
    "Einsum": _einsum,
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Tile": _tile,
    "Pad": _pad,
    "Trilu": _triangle,
    "Resize": _resize,
}
