"""ONNX operators that calculate, in terms of torch functions.

An operator gets the builder, its inputs (``None`` where an optional one is left out) and its attributes, and returns
its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ghn_client.finetune.onnx_builder import Builder, Traced
from ghn_client.finetune.onnx_shapes import (
    SHAPE_OPERATORS,
    Attributes,
    Inputs,
    Operator,
    axes_of,
    given,
    numbers,
    rank_of,
)

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


OPERATORS: dict[str, Operator] = {
    **SHAPE_OPERATORS,
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
}
