"""Gives a network the norm layers that it lacks without changing its function or the names of its weights.

A norm layer is hung on the layer that it follows, as the child ``inserted_norm`` called by a forward hook:
``conv.weight`` keeps its name, and the new parameters are ``conv.inserted_norm.weight`` and ``.bias``. At insertion
the affine part undoes the normalisation exactly, so the network computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ghn_client.batchnorm import recalibrate_batchnorm
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.matrix_layers import MatrixLayer, find_head, matrix_layers, norm_layers, shared_parameters

CHILD = "inserted_norm"
_HOOK = "_inserted_norm_hook"


class ChannelNorm(nn.BatchNorm1d):
    """BatchNorm over one axis of a tensor of any rank: axis 1 after convolutions, the last one after linear layers.

    Starts as the identity: zero mean, unit variance, and a weight of ``sqrt(1 + eps)`` that undoes the division.
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
    candidates, norms = matrix_layers(module), norm_layers(module)
    if not candidates:
        return ()
    missing, previous = [], ""
    for name in (name for name, _ in module.named_modules() if name in candidates or name in norms):
        if name in candidates:
            missing.append(previous)
        previous = name if name in candidates else ""
    head = find_head(module)
    return tuple(n for n in [*missing, previous] if n and n != head and not hasattr(candidates[n], CHILD))


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
        UnsupportedModuleError: There is no layer to follow, or it is a transposed convolution.
        InvalidOptionError: A path is no linear or convolutional layer, or one that has an inserted norm layer already;
            or the calibration is empty. The module is unchanged then.
    """
    layers = matrix_layers(module)
    names = tuple(layers_without_norm(module) if after is None else after)
    if not names:
        raise UnsupportedModuleError("every matrix layer already has a norm layer behind it; nothing to insert")
    for name in names:
        if name not in layers:
            raise InvalidOptionError(f"cannot insert a norm layer behind {name!r}; there are {list(layers)[:20]}")
        if hasattr(layers[name], CHILD):
            raise InvalidOptionError(f"there is an inserted norm layer behind {name!r} already; leave it out of after=")
        if getattr(layers[name], "transposed", False):
            raise UnsupportedModuleError(f"no norm layer can be inserted behind the transposed convolution {name!r}")
    norms = [_attach(layers[name]) for name in names]
    if calibration is not None:
        # Statistics of the untouched network: meanwhile every new layer measures its input, and passes it on unchanged.
        hooks = [norm.register_forward_hook(lambda _norm, inputs, _output: inputs[0]) for norm in norms]
        try:
            recalibrate_batchnorm(module, calibration, layers=norms)
        except Exception:
            remove_inserted_norms([layers[name] for name in names])
            raise
        finally:
            for hook in hooks:
                hook.remove()
        for norm in norms:
            norm.undo_normalisation()
    return tuple(f"{name}.{CHILD}" for name in names)


def _attach(layer: MatrixLayer) -> ChannelNorm:
    norm = ChannelNorm(len(layer.weight), channel_axis=1 if isinstance(layer, _ConvNd) else -1)
    norm.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    setattr(layer, CHILD, norm)
    setattr(layer, _HOOK, layer.register_forward_hook(_call_inserted_norm))
    return norm


def _call_inserted_norm(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = getattr(layer, CHILD)(output)
    return normalised


def remove_inserted_norms(owners: Iterable[nn.Module]) -> None:
    """Takes the norm layers that were inserted behind ``owners`` off again, whatever they learned."""
    for owner in owners:
        getattr(owner, _HOOK).remove()
        delattr(owner, _HOOK)
        delattr(owner, CHILD)


@torch.no_grad()
def fold_inserted_norms(module: nn.Module, names: Iterable[str]) -> None:
    """Multiplies the inserted norm layers at ``names`` (running statistics) into the layers that they follow.

    A bias is created where the layer has none. The function is that of eval mode. A norm layer stays where the weight
    or bias before it is none of the layer's own: computed (``weight_norm``), or shared with another layer.
    """
    shared = shared_parameters(module)
    for owner in (module.get_submodule(name.rpartition(".")[0]) for name in names):
        assert isinstance(owner, MatrixLayer)
        own = owner._parameters
        if own.get("weight") is None or "bias" not in own or {id(own["weight"]), id(own["bias"])} & shared:
            continue
        norm = getattr(owner, CHILD)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - scale * norm.running_mean
        owner.weight.mul_(scale.view(-1, *[1] * (owner.weight.dim() - 1)))
        if owner.bias is None:
            owner.bias = nn.Parameter(shift.clone())
        else:
            owner.bias.mul_(scale).add_(shift)
        remove_inserted_norms([owner])


def add_affine(module: nn.Module) -> tuple[str, ...]:
    """Gives norm layers with ``affine=False`` a weight of one and a bias of zero; returns their names."""
    first = next(module.parameters(), torch.zeros(()))
    changed = []
    for name, layer in norm_layers(module).items():
        channels = getattr(layer, "num_features", None) or getattr(layer, "num_channels", None)
        if channels is not None and getattr(layer, "weight", None) is None:
            statistics: torch.Tensor | None = getattr(layer, "running_mean", None)
            like = first if statistics is None else statistics
            layer.weight = nn.Parameter(like.new_ones(channels))
            layer.bias = nn.Parameter(like.new_zeros(channels))
            layer.affine = True  # type: ignore[assignment]
            changed.append(name)
    return tuple(changed)


def remove_affine(module: nn.Module, names: Iterable[str]) -> None:
    """Undoes :func:`add_affine` for the layers ``names``."""
    for name in names:
        layer = module.get_submodule(name)
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", None)
        layer.affine = False  # type: ignore[assignment]
