"""``STRATEGIES``: every way to tune a module, by the name that the command line and delta files use.

Here are also the plain ones that the others are measured against: everything, the biases, the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ghn_client.batchnorm import UPDATE, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.factored import low_rank
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.layers import resolve_head
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.norm_only import norm_only


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


def _plain(
    strategy: str, module: nn.Module, groups: dict[str, list[str]], config: dict[str, Any], statistics: str
) -> FineTuneHandle:
    part = Part(strategy, config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, statistics=statistics)


def _with_head(module: nn.Module, group: str, names: list[str], head: Sequence[str]) -> dict[str, list[str]]:
    under = [f"{name}.{local}" for name in head for local, _ in module.get_submodule(name).named_parameters()]
    under = [name for name in under if name not in names]
    return {group: names, **({"head": under} if under else {})}


#: Makes a module ready for tuning under the options of the strategy; the base values are never changed.
Strategy = Callable[..., FineTuneHandle]

STRATEGIES: dict[str, Strategy] = {
    "all": all_parameters,
    "norm_only": norm_only,
    "bias_only": bias_only,
    "head_only": head_only,
    "low_rank": low_rank,
    "low_rank_update": low_rank_update,
    "additive": additive,
}


def prepare(module: nn.Module, strategy: str, **options: Any) -> FineTuneHandle:
    """Prepares ``module`` by the name of a strategy; hyphens and underscores mean the same.

    Raises:
        InvalidOptionError: No strategy has this name.
    """
    known = STRATEGIES.get(strategy.replace("-", "_"))
    if known is None:
        raise InvalidOptionError(f"unknown strategy {strategy!r}; known ones are {', '.join(STRATEGIES)}")
    return known(module, **options)
