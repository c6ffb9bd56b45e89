"""Gives a network the norm layers that it lacks without changing its function or the names of its weights.

A norm layer is hung on the layer that it follows, as the child ``inserted_norm`` called by a forward hook:
``conv.weight`` keeps its name, and the new parameters are ``conv.inserted_norm.weight`` and ``.bias``. At insertion
the affine part undoes the normalisation exactly, so the network computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ghn_client.batchnorm import recalibrate_batchnorm
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.layers import MatrixLayer, find_head, matrix_layers
from ghn_client.finetune.norm_layers import find_norm_layers

CHILD = "inserted_norm"
_HOOK = "_inserted_norm_hook"


class ChannelNorm(nn.BatchNorm1d):
    """BatchNorm over one axis of a tensor of any rank: axis 1 after convolutions, the last one after linear layers.

    Starts as the identity: zero mean, unit variance, and a weight of ``sqrt(1 + eps)`` that undoes the division.

    Args:
        num_features: Channels C.
        channel_axis: Where they are; 1 or -1.
    """

    def __init__(self, num_features: int, *, channel_axis: int) -> None:
        super().__init__(num_features)
        self.channel_axis = channel_axis
        self.undo_normalisation()

    @torch.no_grad()
    def undo_normalisation(self) -> None:
        """Sets weight and bias so that the layer is the identity under its present running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        self.weight.copy_(torch.sqrt(self.running_var + self.eps))
        self.bias.copy_(self.running_mean)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Normalises ``features`` (..., C) or (B, C, ...) per channel."""
        moved = features.movedim(self.channel_axis, -1)
        flat = super().forward(moved.reshape(-1, self.num_features))
        return flat.reshape(moved.shape).movedim(-1, self.channel_axis)

    def _check_input_dim(self, features: torch.Tensor) -> None:
        pass


def layers_without_norm(module: nn.Module) -> tuple[str, ...]:
    """Matrix layers that no norm layer follows in the order of definition; the head is left out."""
    norms = {layer.name for layer in find_norm_layers(module)}
    owned = tuple(name for name, layer in module.named_modules() if hasattr(layer, CHILD))
    candidates = matrix_layers(module)
    if not candidates:
        return ()
    head, missing, previous = find_head(module), [], ""
    for name in (name for name, _ in module.named_modules() if name in candidates or name in norms):
        if name in candidates:
            if previous:
                missing.append(previous)
            previous = name
        else:
            previous = ""
    return tuple(name for name in [*missing, previous] if name and name != head and name not in owned)


def insert_norms(
    module: nn.Module, *, after: Iterable[str] | None = None, calibration: Iterable[Any] | None = None
) -> tuple[str, ...]:
    """Hangs an identity norm layer on every matrix layer that has none; changes ``module`` in place.

    Args:
        module: The network.
        after: Dotted paths of the layers to follow; default :func:`layers_without_norm`.
        calibration: Batches to take running statistics from (the affine part then undoes those); unit statistics
            without.

    Returns:
        Dotted paths of the new norm layers.

    Raises:
        UnsupportedModuleError: There is no layer to follow.
        InvalidOptionError: A path is no linear or convolutional layer.
    """
    layers = matrix_layers(module)
    names = tuple(layers_without_norm(module) if after is None else after)
    if not names:
        raise UnsupportedModuleError("every matrix layer already has a norm layer behind it; nothing to insert")
    for name in names:
        if name not in layers:
            raise InvalidOptionError(f"no matrix layer {name!r} to insert behind; known ones are {list(layers)[:20]}")
        _attach(layers[name])
    if calibration is not None:
        _calibrate(module, [getattr(layers[name], CHILD) for name in names], calibration)
    return tuple(f"{name}.{CHILD}" for name in names)


def remove_inserted_norms(module: nn.Module) -> int:
    """Takes every inserted norm layer off again, whatever it learned; returns their number."""
    owners = [layer for layer in module.modules() if hasattr(layer, CHILD)]
    for owner in owners:
        getattr(owner, _HOOK).remove()
        delattr(owner, _HOOK)
        delattr(owner, CHILD)
    return len(owners)


@torch.no_grad()
def fold_inserted_norms(module: nn.Module) -> int:
    """Multiplies every inserted norm layer (running statistics) into the layer that it follows; returns their number.

    A bias is created where the layer has none. The function is that of eval mode.
    """
    owners = [layer for layer in matrix_layers(module).values() if hasattr(layer, CHILD)]
    for owner in owners:
        norm = getattr(owner, CHILD)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - scale * norm.running_mean
        _scale_rows(owner, scale, shift)
    return remove_inserted_norms(module)


def affine_layers(module: nn.Module) -> Mapping[str, int]:
    """Norm layers without affine parameters, such as ``BatchNorm2d(affine=False)``, with their number of channels."""
    channels = {}
    for layer in find_norm_layers(module):
        if not layer.parameters and getattr(layer.module, "weight", None) is None:
            count = getattr(layer.module, "num_features", None) or getattr(layer.module, "num_channels", None)
            if count is not None:
                channels[layer.name] = int(count)
    return channels


def add_affine(module: nn.Module) -> tuple[str, ...]:
    """Gives norm layers with ``affine=False`` a weight of one and a bias of zero; returns their names."""
    missing = affine_layers(module)
    for name, channels in missing.items():
        layer = module.get_submodule(name)
        layer.weight = nn.Parameter(torch.ones(channels, device=_device(module)))
        layer.bias = nn.Parameter(torch.zeros(channels, device=_device(module)))
        layer.affine = True  # type: ignore[assignment]
    return tuple(missing)


def remove_affine(module: nn.Module, names: Iterable[str]) -> None:
    """Undoes :func:`add_affine` for the layers ``names``."""
    for name in names:
        layer = module.get_submodule(name)
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", None)
        layer.affine = False  # type: ignore[assignment]


def _attach(layer: MatrixLayer) -> None:
    if isinstance(layer, _ConvNd) and layer.transposed:
        raise UnsupportedModuleError(
            "norm layers are inserted behind Linear and Conv layers, not transposed convolutions"
        )
    channels = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    norm = ChannelNorm(channels, channel_axis=1 if isinstance(layer, _ConvNd) else -1)
    norm.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    setattr(layer, CHILD, norm)
    setattr(layer, _HOOK, layer.register_forward_hook(_call_inserted_norm))


def _call_inserted_norm(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = getattr(layer, CHILD)(output)
    return normalised


def _calibrate(module: nn.Module, norms: list[ChannelNorm], batches: Iterable[Any]) -> None:
    """Statistics of the untouched network: every norm layer measures its input, and passes it on unchanged."""
    hooks = [norm.register_forward_hook(lambda _norm, inputs, _output: inputs[0]) for norm in norms]
    try:
        recalibrate_batchnorm(module, batches, layers=norms)
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        norm.undo_normalisation()


def _scale_rows(layer: MatrixLayer, scale: torch.Tensor, shift: torch.Tensor) -> None:
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.clone())
    else:
        layer.bias.mul_(scale).add_(shift)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
