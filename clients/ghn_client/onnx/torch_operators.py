"""ONNX operators that calculate or move elements, in terms of torch functions.

An operator gets the builder, its inputs (``None`` where an optional one is left out) and its attributes, and returns
its outputs. One input at least is traced: what follows from constants alone, ``torch_module`` computes with ONNX's own
reference. Sizes, axes and indices have to be constants, which they are once the example is known; so the functions
that end up in the graph get plain numbers, and only the batch stays free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ghn_client.errors import UnsupportedModuleError
from ghn_client.onnx.edit import TORCH_DTYPES
from ghn_client.onnx.torch_builder import Builder, Traced, Value, batch_position, example_of

Inputs = Sequence[Any]
Attributes = Mapping[str, Any]
Operator = Callable[[Builder, Inputs, Attributes], Any]


def numbers(value: Value | None, what: str) -> list[Any]:
    """A constant as a list of numbers; what depends on the input is refused."""
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModuleError(f"expected {what} to be constant for inputs of one size, it depends on the input")
    return list(value.reshape(-1).tolist())


def _option(inputs: Inputs, index: int, attributes: Attributes, name: str) -> list[Any] | None:
    """Numbers that are an attribute in older opsets and an input in newer ones; ``None`` where they are left out."""
    if index < len(inputs) and inputs[index] is not None:
        return numbers(inputs[index], f"the {name}")
    value = attributes.get(name)
    return list(value) if isinstance(value, list | tuple) else None if value is None else [value]


def _sizes(value: Value) -> list[int]:
    """The shape on the example."""
    return list(example_of(value).shape)


# ---- element by element, and reductions ------------------------------------------------------------------------------


def _unary(function: Callable[..., Any], b: Builder, inputs: Inputs, _: Attributes) -> Any:
    return b.call(function, inputs[0])


def _binary(function: Callable[..., Any], b: Builder, inputs: Inputs, _: Attributes) -> Any:
    """Two inputs that broadcast; more than two are taken one after the other."""
    result = inputs[0]
    for other in inputs[1:]:
        pair = [result, other]
        for place, value in enumerate(pair):  # constants of one element become numbers, which not all functions take
            wants_tensor = place == 0 or function in TENSORS_ONLY
            if wants_tensor and isinstance(value, torch.Tensor) and value.dim() == 0:
                pair[place] = value.reshape(1)
        result = b.call(function, *_with_equal_batches(b, pair))
    return result


def _repeat_like(part: torch.Tensor, whole: torch.Tensor, axis: int) -> torch.Tensor:
    """Repeats a tensor along an axis until it is as long there as another one."""
    counts = [1] * part.dim()
    counts[axis] = whole.shape[axis] // part.shape[axis]
    return part.repeat(counts)


def _with_equal_batches(b: Builder, pair: list[Value]) -> list[Value]:
    """Repeats what is the same for every sample where the other has all samples in one axis (biases of windows)."""
    ranks = [example_of(value).dim() for value in pair]
    for axis in range(-min(ranks), 0):
        lengths = [(value.several if isinstance(value, Traced) else value).shape[axis] for value in pair]
        if lengths[0] == lengths[1] or 1 in lengths or _sizes(pair[0])[axis] != _sizes(pair[1])[axis]:
            continue
        larger = lengths.index(max(lengths))
        whole = pair[larger]
        before = math.prod(_sizes(whole)[:axis])
        if b.batch_size == 1 and isinstance(whole, Traced) and batch_position(whole) == before:
            pair[1 - larger] = b.call(_repeat_like, pair[1 - larger], whole, axis)
    return pair


def _reduce(function: Callable[..., Any], b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axes = _option(inputs, 1, attributes, "axes")
    if not axes:
        if attributes.get("noop_with_empty_axes"):
            return inputs[0]
        axes = list(range(len(_sizes(inputs[0]))))
    return b.call(function, inputs[0], dim=tuple(axes), keepdim=bool(attributes.get("keepdims", 1)))


def _divide(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if example_of(inputs[0]).is_floating_point():
        return _binary(torch.div, b, inputs, attributes)
    return b.call(torch.div, inputs[0], inputs[1], rounding_mode="trunc")


def _clip(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    low, high = _option(inputs, 1, attributes, "min"), _option(inputs, 2, attributes, "max")
    return b.call(torch.clamp, inputs[0], low[0] if low else None, high[0] if high else None)


def _hard_sigmoid(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return b.call(functional.hardsigmoid, inputs[0])
    return b.call(torch.clamp, b.call(torch.add, b.call(torch.mul, inputs[0], alpha), beta), 0.0, 1.0)


def _to(b: Builder, value: Value, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        raise UnsupportedModuleError("a cast to an element type that torch has not is not supported")
    return value if example_of(value).dtype == dtype else b.call(torch.Tensor.to, value, dtype)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _shape(_b: Builder, inputs: Inputs, attributes: Attributes) -> torch.Tensor:
    sizes = _sizes(inputs[0])
    return torch.tensor(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], dtype=torch.int64)


def _reshape(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    shape, sizes = numbers(inputs[1], "the shape"), _sizes(inputs[0])
    if not attributes.get("allowzero"):
        shape = [sizes[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return b.reshape(inputs[0], shape)


def _flatten(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axis, sizes = attributes.get("axis", 1), _sizes(inputs[0])
    if axis == 1 and len(sizes) > 1:
        return b.call(torch.flatten, inputs[0], 1)
    return b.reshape(inputs[0], [math.prod(sizes[:axis]), math.prod(sizes[axis:])])


def _transpose(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value = inputs[0]
    order = tuple(attributes.get("perm", range(len(_sizes(value)))[::-1]))
    result = b.call(torch.permute, value, order)
    if value.parameter and order == (1, 0):
        return Traced(result.node, result.single, result.several, transposed=value.parameter)
    return result


def _squeeze(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axes = _option(inputs, 1, attributes, "axes")
    if axes is None:
        axes = [axis for axis, size in enumerate(_sizes(inputs[0])) if size == 1]
    return b.call(torch.squeeze, inputs[0], tuple(axes))


def _unsqueeze(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axes = _option(inputs, 1, attributes, "axes") or []
    rank, result = len(_sizes(inputs[0])) + len(axes), inputs[0]
    for axis in sorted(axis % rank for axis in axes):
        result = b.call(torch.unsqueeze, result, axis)
    return result


def concatenate(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Concatenates; parts that do not depend on the input (class tokens) are repeated along the batch."""
    sizes = [max(lengths) for lengths in zip(*(part.shape for part in parts), strict=True)]
    sizes[axis] = -1
    return torch.cat([part.expand(sizes) for part in parts], axis)


def _concat(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axis = attributes["axis"]
    sizes = [list((part.several if isinstance(part, Traced) else part).shape) for part in inputs]
    for one in sizes:
        one[axis] = 0
    return b.call(torch.cat if all(one == sizes[0] for one in sizes) else concatenate, list(inputs), axis)


def _split(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    axis, lengths = attributes.get("axis", 0), _option(inputs, 1, attributes, "split")
    if lengths is None:
        size = _sizes(inputs[0])[axis]
        lengths = _chunks(size, -(-size // attributes["num_outputs"]))
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    pieces = zip(starts, lengths, strict=True)
    return tuple(b.call(torch.narrow, inputs[0], axis, start, length) for start, length in pieces)


def _chunks(size: int, length: int) -> list[int]:
    return [min(length, size - start) for start in range(0, size, length)]


def _split_to_sequence(b: Builder, inputs: Inputs, attributes: Attributes) -> list[Any]:
    """A list, which stands for a sequence; only SequenceAt reads it."""
    axis, asked = attributes.get("axis", 0), _option(inputs, 1, attributes, "split")
    size = _sizes(inputs[0])[axis]
    is_length = asked is not None and inputs[1].dim() == 0
    lengths = _chunks(size, asked[0] if asked else 1) if is_length or asked is None else asked
    parts = _split(b, [inputs[0], torch.tensor(lengths)], {"axis": axis})
    drop = asked is None and not attributes.get("keepdims", 1)
    return [b.call(torch.squeeze, part, axis) if drop else part for part in parts]


def _slice(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    result = inputs[0]
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (_option(inputs, index, attributes, name) for index, name in enumerate(names, 1))
    assert starts is not None
    assert ends is not None
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        sizes = _sizes(result)
        size = sizes[axis]
        if step < 0:
            first = min(start if start >= 0 else start + size, size - 1)
            indices = torch.arange(first, max(end + size if end < 0 else end, -1), step)
            result = b.call(torch.index_select, result, axis, indices)
        elif start != 0 or end < size or step != 1:
            index: list[Any] = [slice(None)] * len(sizes)
            index[axis] = slice(max(start, -size), min(end, size), step)
            result = b.call(operator.getitem, result, tuple(index))
    return result


def _gather(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    value, indices, axis, sizes = inputs[0], inputs[1], attributes.get("axis", 0), _sizes(inputs[0])
    if isinstance(indices, Traced):
        if axis == 0 and len(sizes) == 2:
            return b.call(functional.embedding, indices, value)
        raise UnsupportedModuleError("Gather with indices that depend on the input is supported for embeddings only")
    axis %= len(sizes)
    indices = torch.where(indices < 0, indices + sizes[axis], indices)
    shape = [*sizes[:axis], *indices.shape, *sizes[axis + 1 :]]
    if isinstance(value, Traced) and value.several.shape[axis] != sizes[axis]:
        # The batch is in this axis, merged with others; the indices are those of one sample.
        if b.batch_size != 1 or batch_position(value) != math.prod(sizes[:axis]):
            raise UnsupportedModuleError(
                f"{value.node.name}: indices into the batch need a file exported with batch size 1"
            )
        value, axis = b.reshape(value, [*sizes[:axis], 1, *sizes[axis:]]), axis + 1
    elif indices.dim() == 0:
        return b.call(torch.select, value, axis, int(indices))
    flat = b.call(torch.index_select, value, axis, indices.flatten())
    return flat if _sizes(flat) == shape else b.reshape(flat, shape)


def nd_items(value: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor | None = None) -> torch.Tensor:
    """The items at ``indices``, or ``value`` with others in their place: ONNX GatherND and ScatterND."""
    places = tuple(indices.movedim(-1, 0))
    return value[places] if updates is None else value.index_put(places, updates)


def _nd_items(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    if attributes.get("batch_dims") or attributes.get("reduction", "none") != "none":
        raise UnsupportedModuleError("GatherND with batch_dims and ScatterND with a reduction are not supported")
    return b.call(nd_items, *inputs)


_PADDING = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    pads, axes = _option(inputs, 1, attributes, "pads"), _option(inputs, 3, {}, "axes")
    rank, mode = len(_sizes(inputs[0])), _PADDING[attributes.get("mode", "constant")]
    assert pads is not None
    axes = axes or list(range(rank))
    flat = [0] * 2 * rank  # pairs of before and after, the last axis first
    for index, axis in enumerate(axes):
        place = 2 * (rank - 1 - axis % rank)
        flat[place : place + 2] = pads[index], pads[index + len(axes)]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    options = {"value": (_option(inputs, 2, attributes, "value") or [0.0])[0]} if mode == "constant" else {}
    return b.call(functional.pad, inputs[0], tuple(flat), mode=mode, **options) if any(flat) else inputs[0]


def _triangle(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    diagonal = (_option(inputs, 1, {}, "diagonal") or [0])[0]
    return b.call(torch.triu if attributes.get("upper", 1) else torch.tril, inputs[0], int(diagonal))


def _resize(b: Builder, inputs: Inputs, attributes: Attributes) -> Any:
    sizes = _option(inputs, 3, {}, "size")
    if sizes is None:
        scales = numbers(inputs[2], "the scales")
        sizes = [int(size * scale) for size, scale in zip(_sizes(inputs[0]), scales, strict=True)]
    mode = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[attributes.get("mode", "nearest")]
    aligned = attributes.get("coordinate_transformation_mode") == "align_corners"
    options = {} if mode == "nearest" else {"align_corners": aligned}
    return b.call(functional.interpolate, inputs[0], size=tuple(sizes[2:]), mode=mode, **options)


#: One input, no attributes; torch's name is that of ONNX in lower case.
UNARY = (
    "Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round",
    "Reciprocal", "Sin", "Cos", "IsNaN",
)  # fmt: skip
UNARY_FUNCTIONAL = ("Softplus", "Softsign", "Mish", "HardSwish", "Selu")
#: Inputs that broadcast, no attributes.
BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
TENSORS_ONLY = (torch.maximum, torch.minimum, torch.logical_and, torch.logical_or, torch.logical_xor)
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
OPERATORS: dict[str, Operator] = {
    **{name: partial(_unary, getattr(torch, name.lower())) for name in UNARY},
    **{name: partial(_unary, getattr(functional, name.lower())) for name in UNARY_FUNCTIONAL},
    **{name: partial(_binary, function) for name, function in BINARY.items()},
    **{name: partial(_reduce, function) for name, function in REDUCTIONS.items()},
    "Div": _divide,
    "Mod": lambda b, i, a: _binary(torch.fmod if a.get("fmod") else torch.remainder, b, i, a),
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": lambda b, i, a: b.call(functional.gelu, i[0], approximate=a.get("approximate", "none")),
    "Softmax": lambda b, i, a: b.call(torch.softmax, i[0], dim=a.get("axis", -1)),
    "LogSoftmax": lambda b, i, a: b.call(torch.log_softmax, i[0], dim=a.get("axis", -1)),
    "LeakyRelu": lambda b, i, a: b.call(functional.leaky_relu, i[0], a.get("alpha", 0.01)),
    "Elu": lambda b, i, a: b.call(functional.elu, i[0], a.get("alpha", 1.0)),
    "Where": lambda b, i, _: b.call(torch.where, *i),
    "Identity": lambda _b, i, _: i[0],
    "Einsum": lambda b, i, a: b.call(torch.einsum, a["equation"], *i),
    "Cast": lambda b, i, a: _to(b, i[0], TORCH_DTYPES.get(a["to"])),
    "CastLike": lambda b, i, _: _to(b, i[0], example_of(i[1]).dtype),
    "Shape": _shape,
    "Size": lambda _b, i, _: torch.tensor(math.prod(_sizes(i[0]))),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": lambda b, i, _: b.expand(i[0], numbers(i[1], "the shape")),
    "Concat": _concat,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": lambda _b, i, _: i[0][int(numbers(i[1], "the place")[0])],
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda b, i, a: b.call(torch.gather, i[0], a.get("axis", 0), i[1]),
    "GatherND": _nd_items,
    "ScatterND": _nd_items,
    "Tile": lambda b, i, _: b.call(torch.Tensor.repeat, i[0], tuple(numbers(i[1], "the repeats"))),
    "Pad": _pad,
    "Trilu": _triangle,
    "Resize": _resize,
}
