"""Running statistics of batch normalisation: measured on data, held while one tunes, or left out.

They are no weights, so that nobody predicts them; without them a network gives chance accuracy in evaluation mode.
While one tunes, what happens to them is a choice:

| choice | normalises in train mode with | running statistics |
|---|---|---|
| ``update`` | the batch | follow the batches (torch's default; the protocol of arXiv:2003.00152) |
| ``keep`` | the batch | stay as they are |
| ``freeze`` | the running statistics | stay as they are; the layer is the same affine map in train and eval mode |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_client.errors import InvalidOptionError

UPDATE, KEEP, FREEZE = STATISTICS = ("update", "keep", "freeze")


def recalibrate_batchnorm(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    device: torch.device | str | None = None,
    layers: Sequence[_BatchNorm] | None = None,
) -> int:
    """Measures the running statistics of every batch normalisation anew, as a plain mean over batches.

    Only these layers run in training mode meanwhile, so that dropout is off; they do so also where the statistics are
    frozen while one tunes. Modes and momenta are put back, and after an error the statistics too.

    Args:
        module: The network.
        loader: Batches: tensors, (inputs, ...) tuples or lists, or dicts of keyword arguments.
        num_batches: Batches to use at most; None for all.
        device: Where to put the inputs; None for the device of the module's parameters.
        layers: The layers to measure; None for all that keep running statistics.

    Returns:
        How many batches were used; 0 if the module has no such layer.

    Raises:
        InvalidOptionError: The loader gives no batch, or ``num_batches`` is less than 1.
    """
    if layers is None:
        layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not layers:
        return 0
    if num_batches is not None and num_batches < 1:
        raise InvalidOptionError(f"expected num_batches of at least 1, got {num_batches}", field="num_batches")
    batches = itertools.islice(loader, num_batches)
    first = next(batches, None)
    if first is None:
        raise InvalidOptionError("expected at least one batch, got an empty loader", field="loader")
    before = [(layer, layer.momentum, [value.clone() for value in layer.buffers(recurse=False)]) for layer in layers]
    hooks = [layer.register_forward_pre_hook(_train) for layer in layers]  # after the one that freezes statistics
    used = 0
    try:
        with evaluation_mode(module), torch.no_grad():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's cumulative average
            for batch in itertools.chain([first], batches):
                used += 1
                run_batch(module, batch, device)
    except BaseException:
        for layer, _, values in before:
            for value, old in zip(layer.buffers(recurse=False), values, strict=True):
                value.copy_(old)
        raise
    finally:
        for layer, momentum, _ in before:
            layer.momentum = momentum
        for hook in hooks:
            hook.remove()
    return used


def _train(layer: nn.Module, _inputs: Any) -> None:
    layer.training = True


def run_batch(module: nn.Module, batch: Any, device: torch.device | str | None = None) -> Any:
    """What ``module`` makes of a batch: a tensor, (inputs, ...), or keyword arguments; ``device`` None for its own."""
    if device is None:
        device = next((item.device for item in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if isinstance(batch, dict):
        return module(**{key: _moved(value, device) for key, value in batch.items()})
    return module(_moved(batch[0] if isinstance(batch, list | tuple) else batch, device))


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Within the block ``module`` is in evaluation mode; afterwards each of its parts is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, training in modes:
            part.training = training


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Makes every batch normalisation of ``module`` use the batch's own statistics, in every mode; returns it."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def check_statistics(choice: str) -> None:
    """Refuses what is none of ``update``, ``keep`` and ``freeze``."""
    if choice not in STATISTICS:
        raise InvalidOptionError(f"statistics must be one of {', '.join(STATISTICS)}, got {choice!r}")


def hold_statistics(module: nn.Module, choice: str) -> Callable[[], None]:
    """Makes all layers of ``module`` with running statistics follow ``choice`` until the returned function is called.

    Layers of other libraries count too, by their ``running_mean``. An unknown choice is an ``InvalidOptionError``.
    """
    check_statistics(choice)
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "running_mean", None) is not None]
    momenta = [(layer, layer.momentum) for layer in layers if choice == KEEP and hasattr(layer, "momentum")]
    for layer, _ in momenta:
        layer.momentum = 0.0
    hooks = [layer.register_forward_pre_hook(_freeze) for layer in layers if choice == FREEZE]
    hooks += [layer.register_forward_hook(_unfreeze, always_call=True) for layer in layers if choice == FREEZE]

    def let_go() -> None:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta:
            layer.momentum = momentum

    return let_go


def _freeze(layer: Any, _inputs: Any) -> None:
    """Within its forward the layer is in evaluation mode, whatever mode it is in outside."""
    layer.mode_outside, layer.training = layer.training, False


def _unfreeze(layer: Any, _inputs: Any, _output: Any) -> None:
    layer.training = vars(layer).pop("mode_outside", layer.training)


def travelling_statistics(module: nn.Module, choice: str) -> list[str]:
    """Dotted paths of the running statistics that tuning under ``choice`` changes; they travel with tuned values."""
    names = [name for name, _ in module.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")]
    return names if choice == UPDATE else []
