"""What operators with windows do with axes: convolutions, pooling, pads. Handlers as in ``operators``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.transfer.axes import Dim, concatenation, reshaped, unify
from ghn_service.transfer.network import Network, NotUnderstoodError, Value, listed_axes, weight_operand


def convolve(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """``Conv``: a layer with its windows, the zeros of a Pad before it included."""
    weight, bias = weight_operand(operands, 1), weight_operand(operands, 2)
    data, kernel, groups = operands[0].dims, operands[1].dims, node.integer("group", 1)
    if weight is None or operands[1].axis_of != list(range(len(kernel))):
        for axis in kernel:
            axis.mark("pinned")
    if data[1].size != groups * kernel[1].size:
        raise NotUnderstoodError
    channels = reshaped([data[1]], [groups, kernel[1].size])
    rows = reshaped([kernel[0]], [groups, kernel[0].size // groups])
    unify(channels[0], rows[0])
    unify(channels[1], kernel[1])
    if len(operands) > 2 and operands[2].axes:
        unify(operands[2].axes[0], kernel[0])
    for axis in kernel[2:]:
        axis.flags.add("position")
    windows = _windows(node, data[2:], [axis.size for axis in kernel[2:]])
    if weight is not None:
        padding = [(0, 0)] * len(windows)
        if operands[0].padding and len(network.consumers[node.inputs[0]]) == 1:
            padding = operands[0].padding
            network.merged_pads.add(node.inputs[0])
        placement, surplus = [], []
        for (size, stride, dilation, before, after), more in zip(windows, padding, strict=True):
            placement.append((size, stride, dilation, before + more[0]))
            surplus.append(before + after + sum(more) - dilation * (size - 1))
        weight.contracted.add(1)
        windows_of = {"groups": groups, "placement": tuple(placement), "surplus": tuple(surplus)}
        network.add_layer(node, "conv", {"weight": weight, "bias": bias}, **windows_of)
    return [Value([data[0], kernel[0], *_slid(node, data[2:], windows)])]


def _windows(node: OnnxNode, axes: Sequence[Dim], kernel: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """Per spatial axis: kernel, stride, dilation, padding before and after."""
    count = len(kernel)
    strides = node.integers("strides") or (1,) * count
    dilations = node.integers("dilations") or (1,) * count
    pads = node.integers("pads") or (0,) * (2 * count)
    if min(*strides, *dilations, 1) < 1:
        raise NotUnderstoodError
    mode = node.text("auto_pad")
    result = []
    for i, size in enumerate(axis.size for axis in axes):
        before, after = pads[i], pads[i + count]
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            reach = dilations[i] * (kernel[i] - 1) + 1
            total = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
            after = total - before
        elif mode == "VALID":
            before = after = 0
        result.append((kernel[i], strides[i], dilations[i], before, after))
    return result


def _moved(axis: Dim, size: int) -> Dim:
    """What an axis became whose entries took other places; channels have none, so their number must not change."""
    if axis.is_positions:
        return Dim(size, "position")
    axis.mark("pinned")
    return Dim(size, "pinned")


def _slid(node: OnnxNode, axes: Sequence[Dim], windows: Sequence[tuple[int, int, int, int, int]]) -> list[Dim]:
    """Spatial axes after a window slid over them."""
    is_up = node.integer("ceil_mode", 0)
    result = []
    for axis, (kernel, stride, dilation, before, after) in zip(axes, windows, strict=True):
        room = axis.size + before + after - dilation * (kernel - 1) - 1
        result.append(_moved(axis, max((room + (stride - 1 if is_up else 0)) // stride + 1, 1)))
    return result


def pool(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """Pooling over windows or whole images."""
    axes = operands[0].dims
    if node.op_type.startswith("Global"):
        return [Value([*axes[:2], *(Dim(1) for _ in axes[2:])])]
    return [Value([*axes[:2], *_slid(node, axes[2:], _windows(node, axes[2:], node.integers("kernel_shape")))])]


def pad(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """``Pad`` of pixels, tokens or channels."""
    axes = list(operands[0].dims)
    pads = list(node.integers("pads")) or operands[1].integers
    chosen = listed_axes(node, operands, len(axes), position=3)
    padding = [(0, 0)] * len(axes)
    for i, position in enumerate(chosen):
        axis, before, after = axes[position], pads[i], pads[i + len(chosen)]
        padding[position] = (before, after)
        if not before and not after:
            continue
        if min(before, after) < 0 or axis.is_positions:
            axes[position] = _moved(axis, axis.size + before + after)
        else:
            parts = [Dim(before), axis, Dim(after)]
            axes[position] = concatenation([part for part in parts if part.size])
    is_image = operands[0].is_data and axes[:2] == operands[0].dims[:2]
    adds_zeros = _has_zeros(network, node) and min(map(min, padding), default=0) >= 0
    return [Value(axes, padding=padding[2:] if adds_zeros and is_image else [])]


def _has_zeros(network: Network, node: OnnxNode) -> bool:
    """Whether a Pad is known to add zeros."""
    if node.text("mode") not in ("", "constant") or ("value" in node.attributes and node.attributes["value"].f != 0):
        return False
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    number = network.values[name].number
    is_told = number is None and name in network.file.initializers
    return not name or number == 0 or (is_told and network.file.content(name) == "all 0")


def convolve_transposed(network: Network, node: OnnxNode, operands: list[Value]) -> list[Value]:
    """``ConvTranspose``, whose kernels stay as they are."""
    weight, bias = weight_operand(operands, 1), weight_operand(operands, 2)
    data, kernel = operands[0].dims, operands[1].dims
    if node.integer("group", 1) != 1:
        raise NotUnderstoodError
    unify(data[1], kernel[0])
    for axis in kernel[2:]:
        axis.flags.update(("position", "pinned"))
    if len(operands) > 2 and operands[2].axes:
        unify(operands[2].axes[0], kernel[1])
    if weight is not None:
        weight.contracted.add(0)
        network.add_layer(node, "deconv", {"weight": weight, "bias": bias})
    shape = network.file.value_shape(node.outputs[0])
    spatial = shape[2:] if shape is not None else [1] * len(kernel[2:])
    places = [_moved(axis, max(size, 1)) for axis, size in zip(data[2:], spatial, strict=True)]
    return [Value([data[0], kernel[1], *places])]
