"""Controls of the same size as norm-only: would any other few parameters do as well?

``random_per_channel`` is the control of arXiv:2003.00152 (two random weights per channel, as many as gamma and beta).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ghn_client.batchnorm import UPDATE, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.layers import matrix_layers, resolve_head
from ghn_client.finetune.reparametrize import attach_update, update_lifecycle


def all_parameters(module: nn.Module, *, statistics: str = UPDATE) -> FineTuneHandle:
    """Tunes every parameter: the ceiling.

    Args:
        module: Any network.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.
    """
    names = [name for name, _ in module.named_parameters()]
    return _plain("all", module, {"all": names}, {"statistics": statistics}, statistics)


def head_only(
    module: nn.Module, *, head: bool | str | Sequence[str] = True, statistics: str = UPDATE
) -> FineTuneHandle:
    """Tunes the classifier alone: the floor.

    Args:
        module: Any network.
        head: ``True`` for the last linear layer, or dotted paths.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.

    Raises:
        UnsupportedModuleError: ``head`` is ``False`` or empty.
    """
    names = resolve_head(module, head)
    under = [f"{name}.{local}" for name in names for local, _ in module.get_submodule(name).named_parameters()]
    return _plain("head_only", module, {"head": under}, {"head": list(names), "statistics": statistics}, statistics)


def bias_only(
    module: nn.Module, *, head: bool | str | Sequence[str] = False, statistics: str = UPDATE
) -> FineTuneHandle:
    """Tunes all biases, those of norm layers included (BitFit, arXiv:2106.10199).

    Args:
        module: Any network.
        head: Also tune the whole classifier.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.

    Raises:
        UnsupportedModuleError: The network has no bias.
    """
    head_names = resolve_head(module, head)
    biases = [name for name, _ in module.named_parameters() if name.rpartition(".")[2].endswith("bias")]
    if not biases:
        raise UnsupportedModuleError(f"{type(module).__name__} has no bias")
    config = {"head": list(head_names), "statistics": statistics}
    return _plain("bias_only", module, _with_head(module, "bias", biases, head_names), config, statistics)


class SparseUpdate(nn.Module):
    """The parametrization that replaces ``k`` chosen entries of every row of a weight by trainable values.

    Args:
        weight: The base weight, (C, ...).
        indices: Which entries of each flattened row, (C, k), distinct within a row.
    """

    indices: torch.Tensor

    def __init__(self, weight: torch.Tensor, indices: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(weight.detach().flatten(1).gather(1, indices))
        self.active = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the chosen entries replaced."""
        if not self.active:
            return weight
        return weight.flatten(1).scatter(1, self.indices, self.values).view_as(weight)


def random_per_channel(
    module: nn.Module,
    *,
    count: int = 2,
    head: bool | str | Sequence[str] = False,
    statistics: str = UPDATE,
    seed: int = 0,
) -> FineTuneHandle:
    """Tunes ``count`` randomly chosen weights of every output channel of every matrix layer but the head.

    Really so many numbers are trained and stored; the rest of each weight is a frozen tensor.

    Args:
        module: Any network.
        count: Weights per channel; 2 is as many as a norm layer has.
        head: Also tune the classifier.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.
        seed: Of the choice.

    Raises:
        InvalidOptionError: ``count`` is below 1.
        UnsupportedModuleError: There is no matrix layer.
    """
    if count < 1:
        raise InvalidOptionError(f"count must be at least 1, got {count}")
    layers, head_names = matrix_layers(module), resolve_head(module, head)
    classifier = resolve_head(module, True)
    chosen = [name for name in layers if name not in classifier and name not in head_names]
    if not chosen:
        raise UnsupportedModuleError(f"{type(module).__name__} has no matrix layer besides its head")
    generator = torch.Generator().manual_seed(seed)
    updates = {name: _attach(layers[name], count, generator) for name in chosen}
    names = [f"{name}.parametrizations.weight.0.values" for name in chosen]
    config = {"count": count, "head": list(head_names), "statistics": statistics, "seed": seed}
    groups = _with_head(module, "random", names, head_names)
    indices = [name.replace(".values", ".indices") for name in names]
    buffers = [*indices, *travelling_statistics(module, statistics)]
    part = Part("random_per_channel", config, module, groups, buffers)
    return FineTuneHandle(part, statistics=statistics, lifecycle=update_lifecycle(module, updates))


def _plain(
    strategy: str, module: nn.Module, groups: dict[str, list[str]], config: dict[str, Any], statistics: str
) -> FineTuneHandle:
    part = Part(strategy, config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, statistics=statistics)


def _with_head(module: nn.Module, group: str, names: list[str], head: Sequence[str]) -> dict[str, list[str]]:
    under = [f"{name}.{local}" for name in head for local, _ in module.get_submodule(name).named_parameters()]
    under = [name for name in under if name not in names]
    return {group: names, **({"head": under} if under else {})}


def _attach(layer: nn.Module, count: int, generator: torch.Generator) -> SparseUpdate:
    weight = layer.get_parameter("weight")
    fan_in = weight[0].numel()
    scores = torch.rand(weight.shape[0], fan_in, generator=generator)
    indices = scores.topk(min(count, fan_in), dim=1).indices.to(weight.device)
    update = SparseUpdate(weight, indices)
    attach_update(layer, update)
    return update
