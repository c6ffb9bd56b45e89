"""The values of target tensors: the source's, with channels mapped, kernels placed and position grids resized."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from ghn_service.transfer.axes import Dim, product
from ghn_service.transfer.cutting import compensate
from ghn_service.transfer.maps import ChannelMap, ChannelMaps
from ghn_service.transfer.network import Layer, Network, Tensor
from ghn_service.transfer.relations import Relations
from ghn_service.transfer.steps import Step, kernel_room


def make_tensor(step: Step, values: Mapping[str, torch.Tensor], maps: ChannelMaps, given: Network) -> torch.Tensor:
    """The values of one target tensor, from those of the network ``given``; its own tensor where nothing changes."""
    if step.mode == "zero":  # statistics of another stage's block need not fit
        return torch.full(step.target.shape, 1.0 if step.role == "var" else 0.0)
    if step.source is None:
        return _passing_values(step, maps)
    original = values[step.source.name]
    value = _apply_gains(_map_channels(step, values, maps, given), step, maps.relations)
    if step.layer.kind == "conv" and step.role == "weight" and step.source_layer is not None:
        value = _place_kernel(value, step.layer, step.source_layer)
    elif tuple(value.shape) != step.target.shape:
        value = _resize_positions(value, step.target)
    assert tuple(value.shape) == step.target.shape, (step.target.name, value.shape, step.target.shape)
    return value if value is original else value.contiguous()


def _map_channels(step: Step, values: Mapping[str, torch.Tensor], maps: ChannelMaps, given: Network) -> torch.Tensor:
    assert step.source is not None
    value, target = _apply_epsilon(step, values), step.target
    for position, (mine, theirs) in enumerate(zip(target.axes, step.source.axes, strict=True)):
        if mine.is_positions or mine.has("rows"):
            continue
        leaves = mine.leaves()
        if len(leaves) == 1 and "pinned" in leaves[0].flags and mine.size != theirs.size:
            value = _adapt_inputs(value, position, mine.size) if step.layer.kind == "conv" else value
            continue
        found = maps.axis(mine, theirs)
        if found is None:
            continue
        is_read = position in target.contracted
        if is_read and step.source_layer is not None and maps.is_cut(mine):
            blend = compensate(given, values, step.source_layer, found.index, theirs.size)
            if blend is not None:
                moved = value.float().movedim(position, -1) @ blend.T.to(value.device, torch.float32)
                value = moved.movedim(-1, position)
                continue
        value = value.index_select(position, found.index.clamp_min(0).to(value.device))
        shares = found.shares if is_read and not target.is_looked_up else (found.index >= 0).double()
        if not bool((shares == 1).all()):
            value = value.float() if value.element_size() < 4 else value  # shares rounded to half no longer add to one
            value = _multiplied(value, shares, position)
            if not is_read and step.role in ("var", "weight"):
                value.movedim(position, 0)[(found.index < 0).to(value.device)] = 1.0
    return value


def _apply_epsilon(step: Step, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The source's tensor; of a BatchNorm with another epsilon, a variance and a weight that make up for it."""
    assert step.source is not None
    value, source = values[step.source.name], step.source_layer
    if source is None or source.kind != "norm" or "var" not in source.tensors or step.layer.epsilon == source.epsilon:
        return value
    wanted = values[source.tensors["var"].name].double() + source.epsilon  # what the target's sum should be
    if step.role == "var":
        return (wanted - step.layer.epsilon).clamp_min(0).to(value.dtype)
    if step.role == "weight" and bool((wanted < step.layer.epsilon).any()):
        return (value.double() * (step.layer.epsilon / wanted).clamp_min(1).sqrt()).to(value.dtype)
    return value


def _multiplied(value: torch.Tensor, factors: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [-1 if i == axis else 1 for i in range(value.ndim)]
    return value * factors.to(value.device, value.dtype).view(shape)


def _apply_gains(value: torch.Tensor, step: Step, relations: Relations) -> torch.Tensor:
    """Queries and keys with the gain of their group; what reads values of the same group divides by it."""
    factor = relations.factors.get(step.target.name, 1.0)
    value = value if factor == 1.0 else value * factor
    for position, axis in enumerate(step.target.axes):
        if any(relations.gains.get(leaf, 1.0) != 1.0 for leaf in axis.leaves()):
            gain = _axis_gain(axis, relations.gains)
            value = _multiplied(value, 1 / gain if position in step.target.contracted else gain, position)
    return value


def _axis_gain(axis: Dim, gains: Mapping[Dim, float]) -> torch.Tensor:
    """The gain of every entry of an axis, float64."""
    result = torch.ones(1, dtype=torch.float64)
    for factor in axis.factors():
        if factor.kind == "leaf":
            part = torch.full((factor.size,), gains.get(factor, 1.0), dtype=torch.float64)
        else:
            part = torch.cat([_axis_gain(item, gains) for item in factor.parts])
        result = torch.kron(result, part)
    return result


def _passing_values(step: Step, maps: ChannelMaps) -> torch.Tensor:
    """A layer that passes its input on: a Dirac kernel, an identity matrix, a norm that changes nothing."""
    target, layer = step.target, step.layer
    if layer.kind == "norm":
        constants = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - layer.epsilon}
        return torch.full(target.shape, constants[step.role])
    value = torch.zeros(target.shape)
    if step.role != "weight":
        return value
    column, row = layer.columns_and_rows
    columns, rows = (_passing_map(target.axes[axis], maps) for axis in (column, row))
    same = (rows.index[:, None] == columns.index[None, :]).float() * columns.shares[None, :].float()
    pixel = value
    for _, _, dilation, before in layer.placement:
        pixel = pixel.select(2, before // dilation)
    pixel.copy_((same if column > row else same.T).reshape(pixel.shape))
    return value


def _passing_map(axis: Dim, maps: ChannelMaps) -> ChannelMap:
    source = product([maps.relations.of[factor] for factor in axis.factors()])
    return maps.axis(axis, source) or ChannelMap.identity(axis.size)


def _adapt_inputs(value: torch.Tensor, axis: int, channels: int) -> torch.Tensor:
    """A stem for another number of input channels, as timm does it: grey is the sum, more are repeated and scaled."""
    if channels == 1:
        return value.sum(dim=axis, keepdim=True)
    index = torch.arange(channels) % value.shape[axis]
    return value.index_select(axis, index.to(value.device)) * (value.shape[axis] / channels)


def _place_kernel(value: torch.Tensor, target: Layer, source: Layer) -> torch.Tensor:
    """The kernel where the pads of both say, so that the same pixels meet the same weights; a patch is resized."""
    shape = target.tensors["weight"].shape
    if tuple(value.shape) == shape and target.placement == source.placement:
        return value
    room = kernel_room(target, source)
    if room is None or [item[1] for item in target.placement] != [item[1] for item in source.placement]:
        is_patch = all(kernel == stride for kernel, stride, _, _ in (*target.placement, *source.placement))
        if is_patch and value.ndim == 4:
            resized = functional.interpolate(value.float(), shape[2:], mode="bicubic", antialias=True)
            return (resized * (math.prod(value.shape[2:]) / math.prod(shape[2:]))).to(value.dtype)
        more = [mine - theirs for mine, theirs in zip(shape[2:], value.shape[2:], strict=True)]
        room = [(amount // 2, amount - amount // 2) for amount in more]
    if all(pair == (0, 0) for pair in room):
        return value
    return functional.pad(value, [amount for pair in reversed(room) for amount in pair])


def _resize_positions(value: torch.Tensor, target: Tensor) -> torch.Tensor:
    """A table of positions for another number of them: a square grid is interpolated, of others the first rows kept."""
    axis = next(i for i, (a, b) in enumerate(zip(value.shape, target.shape, strict=True)) if a != b)
    moved = value.movedim(axis, 0)
    given, wanted = moved.shape[0], target.shape[axis]
    flat = moved.reshape(given, -1)
    dim = target.axes[axis].root()
    prefix = sum(part.size for part in dim.parts if part.size == 1) if dim.kind == "concat" else 0
    prefix = prefix if prefix < min(given, wanted) else 0
    sides = math.isqrt(given - prefix), math.isqrt(wanted - prefix)
    is_square = sides[0] ** 2 == given - prefix and sides[1] ** 2 == wanted - prefix
    if is_square and (target.is_grid or not dim.has("rows")):
        grid = flat[prefix:].T.reshape(1, -1, sides[0], sides[0]).float()
        grid = functional.interpolate(grid, (sides[1], sides[1]), mode="bicubic", antialias=True)
        flat = torch.cat([flat[:prefix], grid.reshape(-1, wanted - prefix).T.to(flat.dtype)])
    else:
        flat = torch.cat([flat[:wanted], flat[-1:].expand(max(wanted - given, 0), -1)])
    return flat.reshape(wanted, *moved.shape[1:]).movedim(0, axis)
