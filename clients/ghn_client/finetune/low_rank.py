"""``low_rank``: train the factors of factored layers with Frobenius decay; ``low_rank_update``: train a rank-r change.

The first tunes networks whose layers are already products (see ``factored.py``). The second leaves every base weight
where it is and adds ``B A`` to it, as LoRA does (arXiv:2106.09685), through torch's own parametrizations: no wrapper
modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ghn_client.batchnorm import UPDATE, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.factored import (
    factor_parameters,
    factored_modules,
    factored_weights,
    frobenius_norm_squared,
)
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.layers import find_head, matrix_layers, resolve_head
from ghn_client.finetune.reparametrize import attach_update, update_lifecycle


def low_rank(
    module: nn.Module,
    *,
    head: bool | str | Sequence[str] = True,
    frobenius_decay: float = 1e-4,
    statistics: str = UPDATE,
) -> FineTuneHandle:
    """Trains the factors (and their biases) of every factored layer and freezes the rest.

    Args:
        module: Network with factored layers, for example from ``ghn_client.low_rank.factorize_module``.
        head: As in ``norm_only``.
        frobenius_decay: Weight of ``1/2 ||U V||_F^2``, added to the loss by ``handle.loss_penalty()``; 0 for none.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.

    Raises:
        UnsupportedModuleError: No layer is factored.
        InvalidOptionError: The decay is negative.
    """
    if frobenius_decay < 0:
        raise InvalidOptionError(f"frobenius_decay must not be negative, got {frobenius_decay}")
    pairs = factor_parameters(module)
    if not pairs:
        raise UnsupportedModuleError(
            f"{type(module).__name__} has no factored layer; factorize it first, or use low_rank_update (LoRA)"
        )
    head_names = resolve_head(module, head)
    factors = [f"{name}.{local}" for name, pair in factored_modules(module) for local, _ in pair.named_parameters()]
    factors += [name for names in factored_weights(module) for name in names]
    heads = [f"{name}.{local}" for name in head_names for local, _ in module.get_submodule(name).named_parameters()]
    heads = [name for name in heads if name not in factors]
    groups = {"factors": factors, **({"head": heads} if heads else {})}
    config = {"head": list(head_names), "frobenius_decay": frobenius_decay, "statistics": statistics}
    penalty = partial(_decay, pairs, frobenius_decay) if frobenius_decay else None
    part = Part("low_rank", config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, penalty=penalty, statistics=statistics)


class LowRankUpdate(nn.Module):
    """The parametrization ``W -> W + (alpha / rank) B A``; zero at the start, since B is.

    Args:
        weight: The base weight, (out, ...); only its shape, dtype and device are read.
        rank: Inner width R.
        alpha: Scale numerator.
        generator: Source of the Gaussian start of A.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, *, generator: torch.Generator | None) -> None:
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
        UnsupportedModuleError: There is no layer to change.
        InvalidOptionError: A path is no matrix layer.
        InvalidOptionError: The rank is below 1.
    """
    if min([rank] if isinstance(rank, int) else rank.values(), default=0) < 1:
        raise InvalidOptionError(f"rank must be at least 1, got {rank}")
    known, head_names = matrix_layers(module), resolve_head(module, head)
    if not known:
        raise UnsupportedModuleError(f"{type(module).__name__} has no linear or convolutional layer")
    chosen = (
        list(layers) if layers is not None else [n for n in known if n != find_head(module) and n not in head_names]
    )
    for name in chosen:
        if name not in known:
            raise InvalidOptionError(f"{name!r} is no linear or convolutional layer; known ones are {list(known)[:20]}")
    generator = torch.Generator().manual_seed(seed)
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(chosen, rank)
    alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(chosen, alpha)
    if set(chosen) - set(ranks) or set(chosen) - set(alphas):
        raise InvalidOptionError(
            f"rank and alpha by layer must name all of {chosen}, got {list(ranks)}, {list(alphas)}"
        )
    updates = {name: _attach(known[name], ranks[name], alphas[name], generator) for name in chosen}
    names = [f"{name}.parametrizations.weight.0.{local}" for name in chosen for local in ("a", "b")]
    heads = [f"{name}.{local}" for name in head_names for local, _ in module.get_submodule(name).named_parameters()]
    groups = {"low_rank": names, **({"head": heads} if heads else {})}
    config = {
        "rank": ranks,
        "alpha": alphas if any(value is not None for value in alphas.values()) else None,
        "layers": chosen,
        "head": list(head_names),
        "seed": seed,
        "statistics": statistics,
    }
    part = Part("low_rank_update", config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, statistics=statistics, lifecycle=update_lifecycle(module, updates))


def _attach(layer: nn.Module, rank: int, alpha: float | None, generator: torch.Generator) -> LowRankUpdate:
    weight = layer.get_parameter("weight")
    fitting = min(rank, weight.shape[0], weight[0].numel())
    update = LowRankUpdate(weight, fitting, float(fitting) if alpha is None else alpha, generator=generator)
    attach_update(layer, update)
    return update


def _decay(pairs: list[tuple[nn.Parameter, nn.Parameter]], factor: float) -> torch.Tensor:
    return 0.5 * factor * torch.stack([frobenius_norm_squared(u, v) for u, v in pairs]).sum()
