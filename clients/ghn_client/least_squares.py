"""Least squares, layer by layer, after a transfer that cut channels: from a few hundred images, without labels.

He et al. (arXiv:1707.06168) reconstruct a pruned layer's output from the channels that are left. Here, as there, layers
are refitted in the order in which they run, each on what the refitted ones before it feed it, so that errors do not add
up. Shapes: I images, R rows (a position of an image each), K inputs of a layer (channels x kernel), C of its outputs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_client.batchnorm import evaluation_mode, run_batch
from ghn_client.errors import InvalidOptionError

_IMAGES_AT_ONCE, _ROWS_PER_INPUT, _RIDGE = 16, 32, 1e-3


class _LayerReached(Exception):  # noqa: N818 - it is no error
    """A layer has run; what comes after it is not needed."""


@dataclass(frozen=True, eq=False, slots=True)
class _Pair:
    """A layer and its normalisation, and the source's layer; ``rows`` of one are the outputs ``given`` of the other."""

    name: str
    layer: nn.Conv2d | nn.Linear
    norm: _BatchNorm | None
    source: nn.Module
    rows: torch.Tensor  # (C,)
    given: torch.Tensor  # (C,)


def refit(module: nn.Module, source: nn.Module, loader: Iterable[Any], *, num_images: int = 512) -> tuple[str, ...]:
    """Refits the layers of a network that was cut from a trained one, so that each computes what the source's does.

    Example::

        client.predict(module, images, source=trained).load_into(module)
        refit(module, trained, loader)

    To be called with the weights as they were loaded: a layer and its source are told by the values of their BatchNorm,
    or of their biases, which a transfer does not change. Convolutions and linear layers are refitted; grouped ones and
    what has neither BatchNorm nor bias stay. Running statistics stay the source's, shifted to fit, and need not be
    measured anew. A network that was not cut stays as it is, but for rounding.

    Args:
        module: The network; changed in place.
        source: The trained network that its weights are from.
        loader: Batches as for ``recalibrate_batchnorm``, normalised as the source's images were; labels are not read.
        num_images: Images to use, to the next whole batch.

    Returns:
        Names of the layers that were refitted.

    Raises:
        InvalidOptionError: The loader gives no batch, or no layer has anything in common with the source.
    """
    batches, count = [], 0
    for batch in loader:
        batches.append(batch)
        inputs = next(iter(batch.values())) if isinstance(batch, dict) else batch
        count += len(inputs[0] if isinstance(inputs, list | tuple) else inputs)
        if count >= num_images:
            break
    if not batches:
        raise InvalidOptionError("expected at least one batch, got an empty loader", field="loader")
    with evaluation_mode(module), evaluation_mode(source), torch.no_grad():
        pairs = _pair_layers(module, source, batches[0])
        if not pairs:
            raise InvalidOptionError(
                "no layer has the BatchNorm or the biases of the source's; refit a network right after the weights of "
                "this source were loaded into it",
                field="source",
            )
        for pair in pairs:
            _fit(pair, module, source, batches, count)
    return tuple(pair.name for pair in pairs)


def _layers(network: nn.Module, batch: Any) -> dict[str, tuple[nn.Conv2d | nn.Linear, _BatchNorm | None]]:
    """Convolutions and linear layers in the order in which they run, with the BatchNorm that reads their output."""
    names = {part: name for name, part in network.named_modules()}
    ran: list[tuple[nn.Conv2d | nn.Linear, Any]] = []
    norms: dict[int, _BatchNorm] = {}
    seen: list[Any] = []  # an id means nothing once its tensor is gone

    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(inputs)
        if isinstance(part, _BatchNorm):
            norms[id(inputs[0])] = part
        elif isinstance(part, nn.Conv2d | nn.Linear):
            ran.append((part, output))

    hooks = [part.register_forward_hook(note) for part in names]
    try:
        run_batch(network, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[layer]: (layer, norms.get(id(output))) for layer, output in ran}


def _signature(layer: nn.Conv2d | nn.Linear, norm: _BatchNorm | None) -> list[tuple[float, ...]]:
    """What each output of a layer is known by, however many of them are left; empty where there is nothing."""
    values = [norm.weight, norm.bias, norm.running_mean, norm.running_var] if norm is not None else [layer.bias]
    known = [value.detach().double() for value in values if value is not None]
    return [tuple(row) for row in torch.stack(known, 1).tolist()] if known else []


def _pair_layers(module: nn.Module, source: nn.Module, batch: Any) -> list[_Pair]:
    """The layers to refit, in the order in which they run."""
    theirs = [(layer, _signature(layer, norm)) for layer, norm in _layers(source, batch).values()]
    pairs = []
    for name, (layer, norm) in _layers(module, batch).items():
        wanted = _signature(layer, norm)
        for other, known in theirs:
            if not wanted or type(other) is not type(layer) or not set(wanted) <= set(known):
                continue
            counts = Counter(known)  # channels that are alike, such as dead ones, could be any of them
            found = [(row, known.index(key)) for row, key in enumerate(wanted) if counts[key] == 1]
            if found and (isinstance(layer, nn.Linear) or (layer.groups, layer.padding_mode) == (1, "zeros")):
                rows, given = (torch.tensor(side) for side in zip(*found, strict=True))
                pairs.append(_Pair(name, layer, norm, other, rows, given))
            break
    return pairs


def _reach(network: nn.Module, layer: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a layer of a network; what comes after it is not computed."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: Any, output: torch.Tensor) -> NoReturn:
        found.extend((inputs[0], output))
        raise _LayerReached

    hook = layer.register_forward_hook(stop)
    try:
        with contextlib.suppress(_LayerReached):
            run_batch(network, batch)
    finally:
        hook.remove()
    return found[0], found[1]


def _rows(layer: nn.Conv2d | nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor) -> Iterable[Any]:
    """(R, K) and (R, C) of a few images at a time."""
    for x, y in zip(torch.split(inputs, _IMAGES_AT_ONCE), torch.split(outputs, _IMAGES_AT_ONCE), strict=True):
        if isinstance(layer, nn.Conv2d):
            x = functional.pad(x, layer._reversed_padding_repeated_twice)  # torch's own, also where padding is "same"
            shape: Any = (layer.kernel_size, layer.dilation, 0, layer.stride)
            x = functional.unfold(x, *shape).mT  # (I, positions, K)
            y = y.flatten(2).mT  # (I, positions, C)
        yield x.flatten(0, -2), y.flatten(0, -2)


def _fit(pair: _Pair, module: nn.Module, source: nn.Module, batches: list[Any], count: int) -> None:
    """The weights W and shift b of least |W x + b - y|^2, near the present ones where that leaves a choice."""
    layer, rows = pair.layer, pair.rows.to(pair.layer.weight.device)
    present = layer.weight[rows].flatten(1).double()  # (C, K)
    size, generator = present.shape[1], torch.Generator().manual_seed(0)
    limit = -(-_ROWS_PER_INPUT * size * _IMAGES_AT_ONCE // count)
    moments = torch.zeros(size + 1 + len(rows), size + 1, dtype=torch.float64, device=present.device)
    for batch in batches:
        x, y = _reach(module, layer, batch)[0], _reach(source, pair.source, batch)[1]
        for inputs, outputs in _rows(
            layer, x, y[:, pair.given] if isinstance(layer, nn.Conv2d) else y[..., pair.given]
        ):
            chosen = torch.randperm(len(inputs), generator=generator)[:limit].to(inputs.device)
            inputs = functional.pad(inputs[chosen], (0, 1), value=1.0)  # the last one is for the shift
            both = torch.cat([inputs, outputs.to(inputs)[chosen]], 1)
            moments += (both.mT @ inputs).double()
    squares, products = moments[: size + 1], moments[size + 1 :]
    mean, wanted = squares[-1] / squares[-1, -1], products[:, -1] / squares[-1, -1]
    centred = (squares / squares[-1, -1] - torch.outer(mean, mean))[:-1, :-1]  # covariance of the inputs, (K, K)
    crossed = (products / squares[-1, -1] - torch.outer(wanted, mean))[:, :-1]  # with the outputs, (C, K)
    ridge = (
        _RIDGE * centred.diagonal().mean().clamp_min(1e-9) * torch.eye(size, dtype=torch.float64, device=present.device)
    )
    fitted = torch.linalg.solve(centred + ridge, (crossed + present @ ridge).mT).mT
    shift = wanted - fitted @ mean[:-1]
    layer.weight[rows] = fitted.to(layer.weight.dtype).reshape(-1, *layer.weight.shape[1:])
    if layer.bias is not None:
        layer.bias[rows] = shift.to(layer.bias.dtype)
    elif pair.norm is not None and pair.norm.running_mean is not None:
        pair.norm.running_mean[rows] -= shift.to(pair.norm.running_mean.dtype)
