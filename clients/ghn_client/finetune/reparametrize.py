"""Trainable changes of a frozen weight through torch's parametrizations: switched, merged and taken off here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

from ghn_client.finetune.handle import Lifecycle


class WeightUpdate(Protocol):
    """A parametrization that returns the base weight untouched while ``active`` is false."""

    active: bool


def attach_update(layer: nn.Module, update: nn.Module) -> None:
    """Routes ``layer.weight`` through ``update``; the base weight becomes ``parametrizations.weight.original``."""
    parametrize.register_parametrization(layer, "weight", update, unsafe=True)


def update_lifecycle(module: nn.Module, updates: Mapping[str, WeightUpdate]) -> Lifecycle:
    """How the updates of the layers ``updates`` of ``module`` are switched off, taken off or merged."""
    names = tuple(updates)
    return Lifecycle(
        enable=(partial(_set_active, updates, True),),
        disable=(partial(_set_active, updates, False),),
        restore=(partial(_detach, module, names, False),),
        merge=(partial(_detach, module, names, True),),
    )


def base_name(name: str) -> str:
    """The name that a parameter had before its layer was reparametrized."""
    return name.replace(".parametrizations.weight.original", ".weight")


def _set_active(updates: Mapping[str, WeightUpdate], active: bool) -> None:
    for update in updates.values():
        update.active = active


@torch.no_grad()
def _detach(module: nn.Module, names: Sequence[str], keep: bool) -> None:
    for name in names:
        layer: Any = module.get_submodule(name)
        layer.parametrizations.weight[0].active = keep
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
