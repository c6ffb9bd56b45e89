"""What happens to BatchNorm's running statistics while one tunes: an explicit choice instead of an accident.

| choice | normalises in train mode with | running statistics |
|---|---|---|
| ``update`` | the batch | follow the batches (torch's default; the protocol of arXiv:2003.00152) |
| ``keep`` | the batch | stay as they are |
| ``freeze`` | the running statistics | stay as they are; the layer is the same affine map in train and eval mode |
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ghn_client.finetune.errors import InvalidOptionError
from ghn_client.finetune.handle import Lifecycle

UPDATE, KEEP, FREEZE = "update", "keep", "freeze"
STATISTICS = (UPDATE, KEEP, FREEZE)


def check_statistics(choice: str) -> str:
    """``choice`` if it is one of ``update``, ``keep``, ``freeze``.

    Raises:
        InvalidOptionError: It is not.
    """
    if choice not in STATISTICS:
        raise InvalidOptionError(f"statistics must be one of {', '.join(STATISTICS)}, got {choice!r}")
    return choice


def apply_statistics(layers: Iterable[nn.Module], choice: str) -> Lifecycle:
    """Makes the layers follow ``choice`` until the returned lifecycle ends.

    Args:
        layers: Norm layers with running statistics.
        choice: ``update``, ``keep`` or ``freeze``.

    Raises:
        InvalidOptionError: ``choice`` is unknown.
    """
    layers = tuple(layers)
    if check_statistics(choice) == UPDATE:
        return Lifecycle()
    if choice == KEEP:
        old = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 0.0  # type: ignore[assignment]
        undo = partial(_set_momentum, layers, old)
        return Lifecycle(restore=(undo,), merge=(undo,))
    hooks = [layer.register_forward_pre_hook(_use_running_statistics) for layer in layers]
    undo = partial(_remove, hooks)
    return Lifecycle(restore=(undo,), merge=(undo,))


def running_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that keep running statistics."""
    return [layer for layer in module.modules() if getattr(layer, "running_mean", None) is not None]


def statistics_buffers(module: nn.Module, choice: str) -> list[str]:
    """Dotted paths of the running statistics that tuning will change, so that they travel with the tuned values."""
    if choice != UPDATE:
        return []
    return [name for name, _ in module.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")]


def _use_running_statistics(layer: nn.Module, _inputs: Any) -> None:
    layer.training = False


def _set_momentum(layers: Iterable[nn.Module], values: Iterable[Any]) -> None:
    for layer, value in zip(layers, values, strict=True):
        layer.momentum = value


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
