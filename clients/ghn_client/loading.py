"""Puts weights into a torch module: everything is checked before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.modules.batchnorm import _NormBase

from ghn_client.errors import LoadError, listed
from ghn_client.info import Trust

_Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Expected and given shape."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every tensor.

    Attributes:
        loaded: Parameters that got a value, each tied name included.
        missing: Parameters that got none and are as they were.
        unexpected: Tensors that the module has no parameter for.
        fallback: The loaded parameters that a rule initialised instead of the hypernetwork.
        mismatched: Expected and given shape, of parameters whose shape differs.
        reset_buffers: Buffers of the meta device that got their initial values (running statistics).
        statistics: Running statistics that came with the weights of a source.
        trust: How much to expect of the weights, where they are a prediction's.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    mismatched: Mapping[str, _Shapes] = field(default_factory=dict)
    reset_buffers: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    trust: Trust | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every parameter got a value, and every tensor went somewhere."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} parameters loaded, {len(self.fallback)} of them by a fallback rule"]
        if self.statistics:
            parts.append(f"{len(self.statistics)} running statistics loaded")
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {what}: {listed(names)}")
        if self.mismatched:
            shapes = [f"{name} {given} for {expected}" for name, (expected, given) in self.mismatched.items()]
            parts.append(f"{len(shapes)} of another shape: {listed(shapes)}")
        if self.trust is not None:
            parts.append(f"trust: {self.trust}")
        return "; ".join(parts)


def load_parameters(
    module: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    assign: bool = False,
    origins: Mapping[str, str] | None = None,
    statistics: Mapping[str, torch.Tensor] | None = None,
    trust: Trust | None = None,
) -> LoadReport:
    """Puts ``parameters`` into ``module``.

    Tied parameters stay tied: a value for any of their names is enough. Values are copied into the module's own
    memory, device and element type, unless ``assign``. A module on the meta device gets memory of its own, and its
    running statistics start at mean 0 and variance 1.

    Args:
        module: The network.
        parameters: Tensors by name in ``named_parameters``, in torch's layout.
        strict: Whether every parameter must get a value, and every tensor must be used.
        assign: Make the given tensors the module's parameters instead of copying them; saves memory, and the module
            shares it with ``parameters``.
        origins: ``predicted``, ``tiled``, ``fallback:<rule>`` or ``source:<name> (<how>)`` by name, for the report.
        statistics: Running means and variances by name in ``named_buffers``, which come with the weights of a source.
        trust: How much to expect of them, for the report.

    Raises:
        LoadError: They do not fit, and ``strict``; or a buffer of the meta device has no known value. The module is
            unchanged then.
    """
    owned = dict(module.named_parameters(remove_duplicate=False))
    ties: dict[int, list[str]] = {}
    for name, parameter in owned.items():
        ties.setdefault(id(parameter), []).append(name)
    sources, mismatched = _match(owned, ties.values(), parameters)
    on_meta, unknown = _meta_buffers(module)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    measured = {name: value for name, value in (statistics or {}).items() if name in buffers}
    for name, value in measured.items():
        if value.shape != buffers[name].shape:
            mismatched[name] = (tuple(buffers[name].shape), tuple(value.shape))
    report = LoadReport(
        loaded=tuple(name for name in owned if name in sources),
        missing=tuple(name for name in owned if name not in sources and name not in mismatched),
        unexpected=(
            *(name for name in parameters if name not in owned),
            *(name for name in statistics or {} if name not in measured),
        ),
        fallback=tuple(name for name in owned if (origins or {}).get(sources.get(name, ""), "").startswith("fallback")),
        mismatched=mismatched,
        reset_buffers=tuple(name for name in on_meta if name not in measured),
        statistics=tuple(name for name in measured if name not in mismatched),
    )
    if strict and not report.is_complete:
        raise LoadError(
            f"the weights do not fit {type(module).__name__}: {report}. "
            "Nothing was loaded; strict=False loads what fits"
        )
    if unknown:
        raise LoadError(
            f"the buffers {listed(unknown)} are on the meta device, and their values cannot be told; "
            "build the module so that buffers have memory (only the parameters on meta), or without the meta device"
        )
    for names in ties.values():
        if names[0] in sources:
            _put(module, names, owned[names[0]], parameters[sources[names[0]]], assign=assign)
    for layer in dict.fromkeys(on_meta.values()):
        _give_memory(layer)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name in report.statistics:
        buffers[name].copy_(measured[name])
    return dataclasses.replace(report, trust=trust)


def _match(
    owned: Mapping[str, torch.nn.Parameter], ties: Iterable[list[str]], parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, _Shapes]]:
    """The name in ``parameters`` that each name of the module gets its value from, and what has another shape."""
    sources: dict[str, str] = {}
    mismatched: dict[str, _Shapes] = {}
    for names in ties:
        given = [name for name in names if name in parameters]
        fitting = [name for name in given if _fits(parameters[name].shape, owned[name].shape)]
        if fitting:
            sources |= dict.fromkeys(names, fitting[0])
        for name in given:
            if name not in fitting:
                mismatched[name] = (tuple(owned[name].shape), tuple(parameters[name].shape))
    return sources, mismatched


def _fits(given: torch.Size, expected: torch.Size) -> bool:
    """Whether shapes are equal; exporters store a scale per channel (C,) as (1, C, 1, 1), say, which is the same."""
    if given == expected or given.numel() != expected.numel():
        return given == expected
    return sum(size > 1 for size in given) == sum(size > 1 for size in expected) == 1


def _put(
    module: torch.nn.Module, names: list[str], old: torch.nn.Parameter, value: torch.Tensor, *, assign: bool
) -> None:
    """Gives ``value`` to the parameter ``old``, which has these names."""
    value = value.detach().reshape(old.shape)
    if not assign and not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
        return
    new = value if assign else value.to(dtype=old.dtype, copy=True)
    parameter = torch.nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, parameter)


def _give_memory(layer: _NormBase) -> None:
    """Running statistics of the meta device get memory beside the layer's parameters, and their initial values."""
    devices = (item.device for item in layer.parameters(recurse=False) if not item.is_meta)
    device = next(devices, torch.device("cpu"))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        layer.register_buffer(name, torch.empty_like(buffer, device=device))
    layer.reset_running_stats()


def _meta_buffers(module: torch.nn.Module) -> tuple[dict[str, _NormBase], list[str]]:
    """Buffers on the meta device: running statistics with their layers, and the names of those of unknown value."""
    statistics: dict[str, _NormBase] = {}
    unknown: list[str] = []
    for path, part in module.named_modules():
        for leaf, buffer in part.named_buffers(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if buffer.is_meta and isinstance(part, _NormBase) and part.track_running_stats:
                statistics[name] = part
            elif buffer.is_meta:
                unknown.append(name)
    return statistics, unknown
