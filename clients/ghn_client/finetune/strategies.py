"""``STRATEGIES``: every way to tune a module, by the name that the command line and delta files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.controls import all_parameters, bias_only, head_only, random_per_channel
from ghn_client.finetune.handle import FineTuneHandle
from ghn_client.finetune.low_rank import low_rank, low_rank_update
from ghn_client.finetune.norm_only import norm_only

#: Makes a module ready for tuning under the options of the strategy; the base values are never changed.
Strategy = Callable[..., FineTuneHandle]

STRATEGIES: dict[str, Strategy] = {
    "all": all_parameters,
    "norm_only": norm_only,
    "random_per_channel": random_per_channel,
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
