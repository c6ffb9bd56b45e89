"""``FineTuneHandle``: what a strategy returns - the module to train, its parameter groups, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghn_client.batchnorm import UPDATE, hold_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError


@dataclass(frozen=True, eq=False)
class Part:
    """What one strategy did to a module, enough to do it again (see ``delta.py``)."""

    strategy: str  # name in ``STRATEGIES``
    config: Mapping[str, Any]  # options in JSON types with which the strategy rebuilds the same structure
    module: nn.Module  # the module that the names below belong to
    # group name to the dotted paths of its parameters, such as ``{"norm": [...], "head": [...]}``
    groups: Mapping[str, Sequence[str]]
    # dotted paths of buffers that travel with the tuned parameters (updated running statistics)
    buffers: Sequence[str] = ()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The tuned parameters by dotted path."""
        return {name: self.module.get_parameter(name) for names in self.groups.values() for name in names}

    def state(self) -> dict[str, torch.Tensor]:
        """Tuned parameters and travelling buffers, by dotted path."""
        buffers = {name: self.module.get_buffer(name) for name in self.buffers}
        return {**{name: value.detach() for name, value in self.named_parameters().items()}, **buffers}


def nothing(*_arguments: object) -> None:
    """The step of a strategy that has nothing to do there."""


@dataclass(frozen=True, eq=False)
class Lifecycle:
    """How a strategy undoes or makes permanent what it changed besides values: structure, flags, hooks."""

    # makes the tuned (``True``) or the base behaviour active; the tuned values stay in memory
    switch: Callable[[bool], object] = nothing
    restore: Callable[[], object] = nothing  # takes the structural changes back
    merge: Callable[[], object] = nothing  # makes them permanent
    fold: Callable[[], object] = nothing  # makes permanent what needs plain weights: after every part has merged


class FineTuneHandle:
    """A module made ready for tuning: everything is frozen except the tuned parameters.

    The base values of the tuned parameters are kept, so that ``disabled()``, ``restore()`` and the delta file are
    exact.

    Attributes:
        module: The module to train and evaluate. Strategies that add a network return a new module here.
        base: The module that was given; its weights are the base of a delta.
        parts: What was done, one entry per composed strategy.
        penalty: A regulariser to add to the loss (Frobenius decay), or ``None``.
    """

    def __init__(
        self,
        part: Part,
        *,
        base: nn.Module | None = None,
        statistics: str = UPDATE,
        lifecycle: Lifecycle | None = None,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self.module = part.module
        self.base = base if base is not None else part.module
        self.parts: tuple[Part, ...] = (part,)
        self.penalty = penalty
        if not part.named_parameters():
            kind = type(self.base).__name__
            raise UnsupportedModuleError(f"strategy {part.strategy!r} found no parameter to tune in {kind}")
        self._aside = ({name: tensor.clone() for name, tensor in part.state().items()},)
        self._flags = tuple((parameter, parameter.requires_grad) for parameter in self.module.parameters())
        counting: list[Any] = [
            layer for layer in self.base.modules() if getattr(layer, "num_batches_tracked", None) is not None
        ]
        counts = [layer.num_batches_tracked.clone() for layer in counting]
        let_go = hold_statistics(self.base, statistics)

        def restore_statistics() -> None:
            let_go()
            for layer, count in zip(counting, counts, strict=True):
                layer.num_batches_tracked.copy_(count)

        self._lifecycles = (lifecycle or Lifecycle(), Lifecycle(restore=restore_statistics, merge=let_go))
        self._open, self._enabled = True, True
        self.freeze_rest()

    @property
    def strategy(self) -> str:
        """Name of the strategy, or several joined by ``+``."""
        return "+".join(part.strategy for part in self.parts)

    @property
    def num_trainable(self) -> int:
        """Number of tuned numbers."""
        return sum(parameter.numel() for parameter in self._tuned().values())

    @property
    def num_total(self) -> int:
        """Number of parameters of the module, tuned or frozen."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def parameters(self, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer, dictionaries with ``params``, ``weight_decay`` and ``name``.

        There is no decay by default, since decay pulls gammas to zero and switches channels off.
        """
        seen: set[int] = set()
        groups = []
        for part in self.parts:
            for group, names in part.groups.items():
                fresh = [part.module.get_parameter(name) for name in names]
                fresh = [parameter for parameter in fresh if id(parameter) not in seen]
                seen.update(id(parameter) for parameter in fresh)
                if fresh:
                    groups.append({"params": fresh, "weight_decay": weight_decay, "name": group})
        return groups

    def _tuned(self) -> dict[int, nn.Parameter]:
        return {id(value): value for part in self.parts for value in part.named_parameters().values()}

    def state(self) -> dict[str, torch.Tensor]:
        """What is tuned and what travels with it, of all parts, named ``<part>/<path>``; these are no copies."""
        return {f"{i}/{name}": value for i, part in enumerate(self.parts) for name, value in part.state().items()}

    def freeze_rest(self) -> None:
        """Sets ``requires_grad`` on the tuned parameters and clears it on all others."""
        tuned = self._tuned()
        for parameter in self.module.parameters():
            parameter.requires_grad_(id(parameter) in tuned)

    def loss_penalty(self) -> torch.Tensor | float:
        """The regulariser of this handle, zero where there is none: ``loss = task + handle.loss_penalty()``."""
        return 0.0 if self.penalty is None else self.penalty()

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within the block the module computes the base function; afterwards again what it did before."""
        before = self._enabled
        self.disable()
        try:
            yield self.module
        finally:
            self._switch(before)

    def disable(self) -> None:
        """Switches the module to its base function; the tuned values are kept aside."""
        self._switch(False)

    def enable(self) -> None:
        """Switches the module back to its tuned function."""
        self._switch(True)

    @torch.no_grad()
    def _switch(self, active: bool) -> None:
        """Exchanges the values in the module with those kept aside, and the behaviour with them."""
        self._require_open()
        if active == self._enabled:
            return
        exchanged = list(zip(self.parts, self._aside, strict=True))
        for part, aside in exchanged if active else reversed(exchanged):  # parts may share tensors: last in, first out
            for name, current in part.state().items():
                other, aside[name] = aside[name], current.clone()
                current.copy_(other)
        for lifecycle in self._lifecycles if active else reversed(self._lifecycles):
            lifecycle.switch(active)
        self._enabled = active

    def restore(self) -> nn.Module:
        """Puts the base back exactly - values, structure, flags - closes the handle, and returns the given module."""
        self.disable()
        for lifecycle in reversed(self._lifecycles):
            lifecycle.restore()
        self._close()
        return self.base

    def merge(self) -> nn.Module:
        """Makes the tuned function permanent, closes the handle, and returns the module, as plain as can be."""
        self.enable()
        for lifecycle in reversed(self._lifecycles):
            lifecycle.merge()
        for lifecycle in reversed(self._lifecycles):
            lifecycle.fold()
        self._close()
        return self.module

    def require_enabled(self) -> None:
        """Raises ``InvalidOptionError`` unless the module computes the tuned function of this handle."""
        self._require_open()
        if not self._enabled:
            raise InvalidOptionError("expected a handle that is enabled, this one is disabled; call enable() first")

    def _require_open(self) -> None:
        if not self._open:
            raise InvalidOptionError("this handle was merged or restored; prepare the module again to tune it further")

    def _close(self) -> None:
        for parameter, flag in reversed(self._flags):
            parameter.requires_grad_(flag)
        self._open = False

    def __repr__(self) -> str:
        share = self.num_trainable / max(self.num_total, 1)
        return f"FineTuneHandle({self.strategy}: {self.num_trainable:,} of {self.num_total:,} parameters, {share:.3%})"


def combine(*handles: FineTuneHandle) -> FineTuneHandle:
    """One handle that tunes everything that ``handles`` tune, such as norm-only and an additive network on top.

    They come in the order in which they were made, each later one on the module of the earlier ones.

    Raises:
        InvalidOptionError: The module of a later handle does not contain that of an earlier one or what it tunes, or a
            handle is closed or disabled.
    """
    if not handles:
        raise InvalidOptionError("combine needs at least one handle")
    for handle in handles:
        handle.require_enabled()
        try:
            handle.state()
        except AttributeError as error:
            raise InvalidOptionError(
                f"what handle {handle.strategy!r} tunes has become a computed weight ({error}): prepare low_rank_update"
                " before it, or leave such layers out of layers="
            ) from error
    inside = {id(module) for module in handles[-1].module.modules()}
    for handle in handles:
        if id(handle.module) not in inside:
            raise InvalidOptionError(
                f"handle {handle.strategy!r} tunes another module than {handles[-1].strategy!r};"
                " prepare each strategy on the module of the one before"
            )
    merged = copy.copy(handles[-1])
    merged.base = handles[0].base
    for name in ("parts", "_lifecycles", "_aside", "_flags"):
        setattr(merged, name, tuple(item for handle in handles for item in getattr(handle, name)))
    penalties = [handle.penalty for handle in handles if handle.penalty is not None]
    merged.penalty = (lambda: torch.stack([penalty() for penalty in penalties]).sum()) if penalties else None
    merged.freeze_rest()
    return merged
