"""What torch's functions do to symbols: one rule for each function that the networks here use.

The rules are those by which ``ghn_service.graph.onnx`` reads files, applied to torch's own functions: convolutions,
linear layers, norms, poolings, attention, gates, sums and concatenations leave nodes; everything else only passes
on where its input came from.

Shapes: B examples (1 while tracing), C channels, H x W positions, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ghn_architectures.tracing.symbol import Symbol, rule
from ghn_service.errors import UnsupportedArchitectureError
from ghn_service.graph.architecture import leaky_relu_name


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _layer(
    x: Symbol, op_type: str, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], **attributes: Any
) -> Symbol:
    """The output, of ``shape``, of a layer with ``weight`` and ``bias``."""
    recorder, level = x.recorder, x.level + 1
    is_linear = weight.dim() == 2
    index = end = recorder.parameter(op_type, level, weight, x.flow, is_linear=is_linear, attributes=attributes)
    if bias is not None:
        end = recorder.graph.nodes[index].bias = recorder.parameter("bias", level, bias, frozenset({index}))
    recorder.multiply_adds += math.prod(shape) * (weight.numel() // int(weight.shape[0]))
    recorder.activation_elements += math.prod(shape)
    return x.result(frozenset({end}), shape)


@rule(F.conv2d)
def conv2d(
    x: Symbol,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Symbol:
    """(B, C, H, W) with weight (C', C / groups, kh, kw) -> (B, C', H', W')."""
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    height, width = (_windows(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    op_type = "conv" if groups == 1 else ("dil_conv" if min(dilation) > 1 else "sep_conv")
    shape = (x.shape[0], int(weight.shape[0]), height, width)
    window = {"stride": stride, "dilations": dilation, "padding": (*padding, *padding)}
    return _layer(x, op_type, weight, bias, shape, groups=groups, positions=height * width, **window)


@rule(F.linear)
def linear(x: Symbol, weight: Tensor, bias: Tensor | None = None) -> Symbol:
    """(..., C) with weight (C', C) -> (..., C')."""
    shape = (*x.shape[:-1], int(weight.shape[0]))
    return _layer(x, "conv", weight, bias, shape, positions=math.prod(shape[:-1]))


def _norm(x: Symbol, op_type: str, weight: Tensor, bias: Tensor | None) -> Symbol:
    norm_bias = x.recorder.use(bias, x.level + 1) if bias is not None else None
    index = x.recorder.parameter(op_type, x.level + 1, weight, x.flow, norm_bias=norm_bias)
    x.recorder.activation_elements += math.prod(x.shape)
    return x.result(frozenset({index}))


@rule(F.batch_norm)
def batch_norm(
    x: Symbol, running_mean: Any, running_var: Any, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> Symbol:
    """Batch normalisation over the channels of (B, C, H, W)."""
    return _norm(x, "bn", weight, bias)


@rule(F.layer_norm)
def layer_norm(
    x: Symbol, normalized_shape: Sequence[int], weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> Symbol:
    """Layer normalisation over the last axis of (..., C)."""
    return _norm(x, "ln", weight, bias)


def _pool(x: Symbol, op_type: str, kernel_size: Any, stride: Any, padding: Any, *, ceil_mode: bool) -> Symbol:
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride = _pair(stride) if stride else kernel
    places = []
    for size, window, step, pad in zip(x.shape[2:], kernel, stride, padding, strict=True):
        count = _windows(size + (step - 1 if ceil_mode else 0), window, step, pad)
        starts_outside = (count - 1) * step >= size + pad  # torch drops a last window that holds padding alone
        places.append(count - starts_outside)
    height, width = places
    x.recorder.activation_elements += x.shape[1] * height * width
    flow = x.recorder.operation(op_type, x.level + 1, x.flow, window=kernel, from_adaptive=False)
    return x.result(flow, (x.shape[0], x.shape[1], height, width))


@rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    x: Symbol,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **_: Any,
) -> Symbol:
    """(B, C, H, W) -> (B, C, H', W')."""
    return _pool(x, "max_pool", kernel_size, stride, padding, ceil_mode=ceil_mode)


@rule(F.avg_pool2d)
def avg_pool2d(
    x: Symbol, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, *_: Any, **__: Any
) -> Symbol:
    """(B, C, H, W) -> (B, C, H', W')."""
    return _pool(x, "avg_pool", kernel_size, stride, padding, ceil_mode=ceil_mode)


@rule(torch.mean)
def mean(x: Symbol, dim: Any, keepdim: bool = False) -> Symbol:
    """Mean over all positions of (B, C, H, W) or all tokens of (B, T, C)."""
    axes = {axis % len(x.shape) for axis in ((dim,) if isinstance(dim, int) else dim)}
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes)
    return x.result(x.recorder.operation("glob_avg", x.level + 1, x.flow), shape)


def _activated(x: Symbol, name: str) -> Symbol:
    x.recorder.graph.note_activation(x.flow, x.level + 1, name)
    x.recorder.activation_elements += math.prod(x.shape)
    gate = x.gate or name in ("sigmoid", "hardsigmoid")
    return Symbol(x.recorder, x.shape, x.flow, x.level + 1, gate, x.attention)


for _name, _functions in {
    "relu": (F.relu, torch.relu, torch.relu_),
    "relu6": (F.relu6, F.hardtanh),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "tanh": (torch.tanh,),
    "sigmoid": (torch.sigmoid,),
    "hardsigmoid": (F.hardsigmoid,),
}.items():
    rule(*_functions)(lambda x, *_, name=_name, **__: _activated(x, name))


@rule(F.leaky_relu)
def _leaky_relu(x: Symbol, negative_slope: float = 0.01, *_: Any, **__: Any) -> Symbol:
    return _activated(x, leaky_relu_name(negative_slope))


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(x: Any, y: Any) -> Any:
    """Sum of two branches, of a branch and a position embedding, or of a branch and something that does not count."""
    if not isinstance(x, Symbol):
        x, y = y, x
    if isinstance(y, nn.Parameter):
        embedding = x.recorder.parameter("pos_enc", x.level + 1, y, frozenset())
        return x.result(x.recorder.operation("sum", x.level + 1, x.flow | {embedding}))
    if not isinstance(y, Symbol):
        return x.reshaped(x.shape)
    return _meeting("sum", _broadcast(x.shape, y.shape), (x, y))


def _meeting(op_type: str, shape: tuple[int, ...], branches: Sequence[Symbol]) -> Symbol:
    recorder = branches[0].recorder
    recorder.activation_elements += math.prod(shape)
    level = 1 + max(branch.level for branch in branches)
    flow = frozenset().union(*(branch.flow for branch in branches))
    if any(branch.flow != flow for branch in branches):
        flow = recorder.operation(op_type, level, flow)
    return Symbol(recorder, shape, flow, level)


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(x: Any, y: Any) -> Any:
    """Gate of squeeze-and-excitation, layer scale, a product of branches, or a constant factor."""
    if not isinstance(x, Symbol):
        x, y = y, x
    if isinstance(y, nn.Parameter):
        x.recorder.use(y, x.level + 1, fallback="layer_scale")
    if not isinstance(y, Symbol):
        return x.reshaped(x.shape)
    level, flow = 1 + max(x.level, y.level), x.flow | y.flow
    shape = _broadcast(x.shape, y.shape)
    x.recorder.activation_elements += math.prod(shape)
    if (x.gate or y.gate) and x.flow != y.flow:
        gate, feature = (x, y) if x.gate else (y, x)
        flow = x.recorder.operation("cse", level, flow, gate=gate.flow, feature=feature.flow)
    return Symbol(x.recorder, shape, flow, level)


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    if first == second:
        return first
    rank = max(len(first), len(second))
    padded = ((1,) * (rank - len(shape)) + shape for shape in (first, second))
    pairs = list(zip(*padded, strict=True))
    if any(1 not in sizes and sizes[0] != sizes[1] for sizes in pairs):
        raise ValueError(f"branches of the shapes {first} and {second} meet; expected shapes that broadcast")
    return tuple(max(sizes) for sizes in pairs)


@rule(torch.cat, torch.concat)
def cat(tensors: Sequence[Any], dim: int = 0) -> Symbol:
    """Concatenation of branches along an axis; class tokens contribute nothing."""
    symbols = [tensor for tensor in tensors if isinstance(tensor, Symbol)]
    axis = dim % len(symbols[0].shape)
    shape = list(symbols[0].shape)
    shape[axis] = sum(int(tensor.shape[axis]) for tensor in tensors)
    return _meeting("concat", tuple(shape), symbols)


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def matmul(x: Symbol, y: Symbol) -> Symbol:
    """(..., T, D) @ (..., D, E) -> (..., T, E) of two computed tensors, as in attention."""
    shape = (*x.shape[:-1], y.shape[-1])
    x.recorder.multiply_adds += math.prod(shape) * x.shape[-1]
    x.recorder.activation_elements += math.prod(shape)
    level = 1 + max(x.level, y.level)
    for index in x.attention:
        softmax_node = x.recorder.graph.nodes[index]
        softmax_node.is_attention = True
        softmax_node.values = y.flow
        softmax_node.predecessors |= y.flow - x.flow
    return Symbol(x.recorder, shape, x.flow if x.attention else x.flow | y.flow, level)


@rule(torch.softmax, F.softmax, torch.Tensor.softmax)
def softmax(x: Symbol, dim: int, *_: Any, **__: Any) -> Symbol:
    """The weights of self-attention."""
    x.recorder.activation_elements += math.prod(x.shape)
    heads = x.shape[-3] if len(x.shape) > 3 else 0
    flow = x.recorder.operation("msa", x.level + 1, x.flow, heads=heads)
    return Symbol(x.recorder, x.shape, flow, x.level + 1, attention=flow)


@rule(F.scaled_dot_product_attention)
def attention(query: Symbol, key: Symbol, value: Symbol, attn_mask: Any = None, **_: Any) -> Symbol:
    """softmax(Q K^T / sqrt(D)) V over (..., heads, T, D); its values reach the next layer through the softmax only."""
    recorder = query.recorder
    level = 1 + max(query.level, key.level, value.level)
    flow = recorder.operation(
        *("msa", level, query.flow | key.flow | value.flow),
        is_attention=True,
        heads=query.shape[-3] if len(query.shape) > 3 else 0,
        values=value.flow,
    )
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    recorder.multiply_adds += scores * (query.shape[-1] + value.shape[-1])
    recorder.activation_elements += 2 * scores + math.prod(query.shape)
    return Symbol(recorder, (*query.shape[:-1], value.shape[-1]), flow, level)


@rule(torch.flatten)
def flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    """Joins the axes from ``start_dim`` to ``end_dim``."""
    start, end = start_dim % len(x.shape), end_dim % len(x.shape)
    return x.reshaped((*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


@rule(torch.unflatten)
def unflatten(x: Symbol, dim: int, sizes: Sequence[int]) -> Symbol:
    """Splits one axis into several; one of them may be -1."""
    axis = dim % len(x.shape)
    return x.reshaped((*x.shape[:axis], *_resolve(sizes, x.shape[axis]), *x.shape[axis + 1 :]))


@rule(torch.reshape)
def reshape(x: Symbol, *shape: Any) -> Symbol:
    """The same elements in another shape; one size may be -1."""
    return x.reshaped(_resolve(_listed(shape), math.prod(x.shape)))


def _listed(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes or axes that a call may give one by one or as one sequence."""
    return sizes if len(sizes) != 1 or isinstance(sizes[0], int) else tuple(sizes[0])


def _resolve(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    known = math.prod(size for size in sizes if size != -1)
    return tuple(total // known if size == -1 else int(size) for size in sizes)


@rule(torch.permute)
def permute(x: Symbol, *dims: Any) -> Symbol:
    """Axes in another order."""
    return x.reshaped(tuple(x.shape[axis] for axis in _listed(dims)))


@rule(torch.transpose)
def transpose(x: Symbol, first: int, second: int) -> Symbol:
    """Two axes exchanged."""
    shape = list(x.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return x.reshaped(tuple(shape))


@rule(torch.chunk)
def chunk(x: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    """Equal parts along an axis."""
    axis = dim % len(x.shape)
    if x.shape[axis] % chunks:
        raise UnsupportedArchitectureError(f"expected an axis that {chunks} divides, got {x.shape[axis]} in {x.shape}")
    part = x.reshaped((*x.shape[:axis], x.shape[axis] // chunks, *x.shape[axis + 1 :]))
    return (part,) * chunks


@rule(torch.unbind)
def unbind(x: Symbol, dim: int = 0) -> tuple[Symbol, ...]:
    """The slices along an axis, which disappears."""
    axis = dim % len(x.shape)
    return (x.reshaped((*x.shape[:axis], *x.shape[axis + 1 :])),) * x.shape[axis]


@rule(torch.Tensor.__getitem__)
def getitem(x: Symbol, key: Any) -> Symbol:
    """Indexing with integers and slices."""
    keys = key if isinstance(key, tuple) else (key,)
    shape: list[int] = []
    for axis, size in enumerate(x.shape):
        item = keys[axis] if axis < len(keys) else slice(None)
        if isinstance(item, slice):
            shape.append(len(range(*item.indices(size))))
    return x.reshaped(tuple(shape))


@rule(F.dropout, F.dropout2d, torch.roll)
def unchanged(x: Symbol, *_: Any, **__: Any) -> Symbol:
    """Dropout, and positions shifted in a circle, leave no trace."""
    return x


@rule(F.pad)
def pad(x: Symbol, pad: Sequence[int], *_: Any, **__: Any) -> Symbol:
    """Constant borders; ``pad`` lists (before, after) from the last axis on."""
    shape = list(x.shape)
    for place in range(len(pad) // 2):
        shape[-1 - place] += pad[2 * place] + pad[2 * place + 1]
    return x.reshaped(tuple(shape))
