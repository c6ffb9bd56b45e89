"""``low_rank_update``: trains a rank-r change of matrix layers, as LoRA does (arXiv:2106.09685).

Every base weight stays where it is and ``B A`` is added to it through torch's own parametrizations: no wrapper modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ghn_client.batchnorm import UPDATE, check_statistics, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.handle import FineTuneHandle, Lifecycle, Part
from ghn_client.finetune.matrix_layers import (
    find_head,
    matrix_layers,
    parameter_groups,
    remove_parametrization,
    resolve_head,
    shared_parameters,
)


class LowRankUpdate(nn.Module):
    """The parametrization ``W -> W + (alpha / rank) B A``; zero at the start, since B is, while A is Gaussian.

    Of the base weight (out, ...) only shape, dtype and device are read.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, *, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape[0], weight[0].numel()
        start = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scale = alpha / rank
        self.active = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, of the shape of ``weight``."""
        if not self.active:
            return weight
        return weight + self.scale * (self.b @ self.a).view_as(weight)


def low_rank_update(
    module: nn.Module,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    layers: Sequence[str] | None = None,
    head: bool | str | Sequence[str] = True,
    seed: int = 0,
    statistics: str = UPDATE,
) -> FineTuneHandle:
    """Adds a trainable rank-``rank`` change to matrix layers; base weights are never touched.

    Args:
        module: Any network.
        rank: Inner width, for all layers or by dotted path; capped at the full rank of each layer.
        alpha: The change is scaled by ``alpha / rank``; default ``rank``.
        layers: Dotted paths of the layers to change; default all matrix layers but the head.
        head: Also tune the classifier, dense.
        seed: Of the Gaussian start.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.

    Raises:
        UnsupportedModuleError: There is no layer to change, or the weight of one is computed already.
        InvalidOptionError: An option is impossible; nothing has been changed then.
    """
    check_statistics(statistics)
    if min([rank] if isinstance(rank, int) else rank.values(), default=0) < 1:
        raise InvalidOptionError(f"rank must be at least 1, got {rank}")
    known, head_names = matrix_layers(module), resolve_head(module, head)
    if not known:
        raise UnsupportedModuleError(f"{type(module).__name__} has no linear or convolutional layer")
    default = [name for name in known if name != find_head(module) and name not in head_names]
    chosen = default if layers is None else list(dict.fromkeys(layers))
    for name in chosen:
        if name not in known:
            raise InvalidOptionError(f"{name!r} is no linear or convolutional layer; known ones are {list(known)[:20]}")
        if not isinstance(known[name]._parameters.get("weight"), nn.Parameter):
            raise UnsupportedModuleError(
                f"the weight of {name!r} is computed already (weight_norm, an earlier low_rank_update): merge that"
                " first, or leave the layer out of layers="
            )
    generator = torch.Generator().manual_seed(seed)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(chosen, rank)
    alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(chosen, alpha)
    if set(chosen) - set(ranks) or set(chosen) - set(alphas):
        raise InvalidOptionError(
            f"rank and alpha by layer must name all of {chosen}, got {list(ranks)}, {list(alphas)}"
        )
    updates = {}
    for name in chosen:
        weight = known[name].get_parameter("weight")
        fitting, wanted = min(ranks[name], weight.shape[0], weight[0].numel()), alphas[name]
        updates[name] = LowRankUpdate(
            weight, fitting, float(fitting) if wanted is None else wanted, generator=generator
        )
        parametrize.register_parametrization(known[name], "weight", updates[name], unsafe=True)
    names = [f"{name}.parametrizations.weight.0.{local}" for name in chosen for local in ("a", "b")]
    groups = parameter_groups(module, "low_rank", names, head_names)
    config = {
        "rank": ranks,
        "alpha": alphas if any(value is not None for value in alphas.values()) else None,
        "layers": chosen,
        "head": list(head_names),
        "seed": seed,
        "statistics": statistics,
    }
    part = Part("low_rank_update", config, module, groups, travelling_statistics(module, statistics))
    lifecycle = Lifecycle(
        switch=partial(_set_active, updates),
        restore=partial(_detach, module, tuple(updates), False),
        merge=partial(_detach, module, tuple(updates), True),
    )
    return FineTuneHandle(part, statistics=statistics, lifecycle=lifecycle)


def _set_active(updates: Mapping[str, LowRankUpdate], active: bool) -> None:
    for update in updates.values():
        update.active = active


@torch.no_grad()
def _detach(module: nn.Module, names: Sequence[str], keep: bool) -> None:
    """Takes the updates off; tied weights come apart where theirs are kept, since each layer has its own."""
    layers: list[Any] = [module.get_submodule(name) for name in names]
    shared = shared_parameters(module)
    for layer in layers:
        layer.parametrizations.weight[0].active = keep
        own = layer.weight.clone() if keep and id(layer.parametrizations.weight.original) in shared else None
        remove_parametrization(layer, "weight", keep=keep and own is None)
        if own is not None:
            layer.weight = nn.Parameter(own)
