"""``STRATEGIES``: every way to tune a module, by the name that the command line and delta files use.

Here are also the plain ones that the others are measured against: everything, the biases, the classifier. Their
``statistics`` says what happens to running statistics, see ``ghn_client.batchnorm``; ``head`` is ``True`` for the last
linear layer, ``False``, or dotted paths.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from ghn_client.batchnorm import UPDATE, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.factored import low_rank
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.matrix_layers import parameter_groups, resolve_head
from ghn_client.finetune.norm_only import norm_only


def all_parameters(module: nn.Module, *, statistics: str = UPDATE) -> FineTuneHandle:
    """Tunes every parameter: the ceiling."""
    return _plain("all", module, [name for name, _ in module.named_parameters()], (), {}, statistics)


def head_only(
    module: nn.Module, *, head: bool | str | Sequence[str] = True, statistics: str = UPDATE
) -> FineTuneHandle:
    """Tunes the classifier alone: the floor.

    Raises:
        UnsupportedModuleError: ``head`` is ``False`` or empty.
    """
    names = resolve_head(module, head)
    return _plain("head_only", module, [], names, {"head": list(names)}, statistics)


def bias_only(
    module: nn.Module, *, head: bool | str | Sequence[str] = False, statistics: str = UPDATE
) -> FineTuneHandle:
    """Tunes all biases, those of norm layers included (BitFit, arXiv:2106.10199).

    Raises:
        UnsupportedModuleError: The network has no bias.
    """
    names = resolve_head(module, head)
    biases = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    if not biases:
        raise UnsupportedModuleError(f"{type(module).__name__} has no bias")
    return _plain("bias_only", module, biases, names, {"head": list(names)}, statistics)


def _plain(
    strategy: str, module: nn.Module, tuned: list[str], head: Sequence[str], config: dict[str, Any], statistics: str
) -> FineTuneHandle:
    """A handle for parameters that are there already."""
    groups = parameter_groups(module, strategy.removesuffix("_only"), tuned, head)
    config = {**config, "statistics": statistics}
    part = Part(strategy, config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, statistics=statistics)


#: What makes a module ready for tuning under the options of the strategy; the base values are never changed.
STRATEGIES: dict[str, Callable[..., FineTuneHandle]] = {
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
        InvalidOptionError: No strategy has this name, it knows no such option, or an option is of another type.
    """
    return strategy_of(strategy, options)(module, **options)


def strategy_of(strategy: str, options: Mapping[str, Any] | None = None) -> Callable[..., FineTuneHandle]:
    """The strategy of this name; hyphens and underscores mean the same.

    Raises:
        InvalidOptionError: No strategy has this name, it knows no such option, or an option is of another type.
    """
    found = STRATEGIES.get(strategy.replace("-", "_"))
    if found is None:
        raise InvalidOptionError(f"unknown strategy {strategy!r}; known ones are {', '.join(STRATEGIES)}")
    parameters, hints = inspect.signature(found).parameters, get_type_hints(found)
    known = list(parameters)[1:]
    for name, value in (options or {}).items():
        if name not in known:
            raise InvalidOptionError(f"{strategy} has no option {name!r}; it knows {', '.join(known)}")
        if not _is_a(value, hints[name]):
            raise InvalidOptionError(
                f"{name} of {strategy} must be {parameters[name].annotation}, got {value!r}", field=name
            )
    return found


def _is_a(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` of an option says; items are not read where only ``Iterable``.

    An int is a float, but no bool is a number, and text is no sequence of texts.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(_is_a(value, argument) for argument in arguments)
    if kind is None:
        accepted = (int, float) if hint is float else hint
        return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if not isinstance(value, kind) or isinstance(value, str):
        return False
    if kind is Mapping:
        return all(_is_a(key, arguments[0]) and _is_a(item, arguments[1]) for key, item in value.items())
    return kind is not Sequence or all(_is_a(item, arguments[0]) for item in value)
