"""Running statistics for predicted weights: they are no weights, so they are measured on data.

Without them a network with batch normalisation gives chance accuracy in evaluation mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_client.errors import InvalidOptionError


def recalibrate_batchnorm(
    module: torch.nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    device: torch.device | str | None = None,
) -> int:
    """Resets the running statistics of every batch normalisation and measures them again, as a plain mean over batches.

    Only these layers run in training mode meanwhile, so dropout stays as it was. Modes and momenta are restored.

    Args:
        module: The network.
        loader: Batches: tensors, (inputs, ...) tuples or lists, or dicts of keyword arguments.
        num_batches: Batches to use at most; None for all.
        device: Where to put the inputs; None for the device of the module's parameters.

    Returns:
        How many batches were used; 0 if the module has no such layer.

    Raises:
        InvalidOptionError: The loader gives no batch, or ``num_batches`` is less than 1.
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not layers:
        return 0
    if num_batches is not None and num_batches < 1:
        raise InvalidOptionError(f"expected num_batches of at least 1, got {num_batches}", field="num_batches")
    batches = itertools.islice(loader, num_batches)
    first = next(batches, None)
    if first is None:
        raise InvalidOptionError("expected at least one batch, got an empty loader", field="loader")
    if device is None:
        device = next((item.device for item in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's cumulative average
            layer.train()
        used = _run(module, itertools.chain([first], batches), torch.device(device))
    finally:
        for part, training in modes:
            part.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return used


def _run(module: torch.nn.Module, batches: Iterable[Any], device: torch.device) -> int:
    used = 0
    with torch.no_grad():
        for batch in batches:
            if isinstance(batch, dict):
                module(**{key: _moved(value, device) for key, value in batch.items()})
            else:
                inputs = batch[0] if isinstance(batch, list | tuple) else batch
                module(_moved(inputs, device))
            used += 1
    return used


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
