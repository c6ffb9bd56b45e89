"""``norm_only``: tune the affine parameters of the normalization layers and nothing else.

What it can express: Giannou, Rajput and Papailiopoulos, arXiv:2302.07937 (see ``express.py``); what it reaches when
trained: Frankle, Schwab and Morcos, arXiv:2003.00152; for transformers LN-tuning, arXiv:2312.11420.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ghn_client.batchnorm import UPDATE, check_statistics, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.handle import FineTuneHandle, Lifecycle, Part
from ghn_client.finetune.insertion import (
    add_affine,
    fold_inserted_norms,
    insert_norms,
    layers_without_norm,
    remove_affine,
    remove_inserted_norms,
)
from ghn_client.finetune.layers import resolve_head
from ghn_client.finetune.norm_layers import NormLayer, find_norm_layers

#: What to do about layers without a norm layer, and norm layers without affine parameters.
MISSING = ("ignore", "insert")


def norm_only(
    module: nn.Module,
    *,
    head: bool | str | Sequence[str] = True,
    statistics: str = UPDATE,
    missing: str = "ignore",
    after: Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
) -> FineTuneHandle:
    """Makes the norm layers of ``module`` (and its head) trainable and freezes the rest.

    Finds BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm, also of other libraries.

    Args:
        module: Any network. No wrapper is put around it, and no value changes.
        head: Tune the classifier too: ``True`` for the last linear layer, ``False`` for norm layers alone, or dotted
            paths.
        statistics: ``update``, ``keep`` or ``freeze`` those of BatchNorm; see ``ghn_client.batchnorm``.
        missing: ``insert`` hangs an identity norm layer on every matrix layer without one, and makes norm layers with
            ``affine=False`` affine; the function is unchanged at insertion. ``ignore`` tunes what is there.
        after: With ``insert``, the layers to follow instead of all that lack a norm layer.
        calibration: With ``insert``, batches from which the new layers take their running statistics.

    Returns:
        The handle; ``handle.parameters()`` are ready optimizer groups without weight decay.

    Raises:
        UnsupportedModuleError: There is no norm layer, and none was asked to be inserted.
        InvalidOptionError: An option has an unknown value.
    """
    if missing not in MISSING:
        raise InvalidOptionError(f"missing must be one of {', '.join(MISSING)}, got {missing!r}")
    check_statistics(statistics)
    head_names = resolve_head(module, head)
    base_names = tuple(name for name, _ in module.named_parameters())
    inserted: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    if missing == "insert":
        inserted, affine = _insert(module, after, calibration)
    layers = [layer for layer in find_norm_layers(module) if layer.parameters]
    if not layers:
        raise UnsupportedModuleError(
            f"{type(module).__name__} has no affine norm layer; pass missing='insert' to add identity norm layers"
        )
    config = {
        "head": list(head_names),
        "statistics": statistics,
        "missing": missing,
        "after": [name.rpartition(".")[0] for name in inserted] if inserted else None,
    }
    buffers = set(travelling_statistics(module, statistics))
    buffers |= {f"{name}.{buffer}" for name in inserted for buffer in ("running_mean", "running_var")}
    part = Part("norm_only", config, module, _groups(layers, head_names, module), sorted(buffers))
    handle = FineTuneHandle(part, statistics=statistics, lifecycle=_lifecycle(module, inserted, affine))
    assert inserted or affine or base_names == tuple(name for name, _ in module.named_parameters())
    return handle


def _insert(
    module: nn.Module, after: Sequence[str] | None, calibration: Iterable[Any] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    affine = add_affine(module)
    wanted = layers_without_norm(module) if after is None else tuple(after)
    return (insert_norms(module, after=wanted, calibration=calibration) if wanted else ()), affine


def _groups(layers: Sequence[NormLayer], head: Sequence[str], module: nn.Module) -> dict[str, list[str]]:
    norm = [f"{layer.name}.{local}" if layer.name else local for layer in layers for local in layer.parameters]
    under_head = [
        f"{name}.{local}" for name in head for local, _ in module.get_submodule(name).named_parameters() if name
    ]
    groups = {"norm": norm, "head": [name for name in under_head if name not in norm]}
    return {group: names for group, names in groups.items() if names}


def _lifecycle(module: nn.Module, inserted: Sequence[str], affine: Sequence[str]) -> Lifecycle:
    restore, merge = [], []
    if inserted:
        restore.append(partial(_discard, remove_inserted_norms, module))
        merge.append(partial(_discard, fold_inserted_norms, module))
    if affine:
        restore.append(partial(remove_affine, module, affine))
    return Lifecycle(restore=tuple(restore), merge=tuple(merge))


def _discard(function: Any, module: nn.Module) -> None:
    with torch.no_grad():
        function(module)
