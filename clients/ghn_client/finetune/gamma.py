"""Gammas near zero: how many channels a tuned network switched off, and what that costs when it is made exact.

Frankle, Schwab and Morcos, arXiv:2003.00152, report that training norm layers alone switches off about a third of the
random features; a gamma with ``|gamma| < 0.01`` counts as off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.norm_layers import find_norm_layers

DEFAULT_THRESHOLD = 1e-2


@dataclass(frozen=True)
class LayerGammas:
    """Scales of one norm layer.

    Attributes:
        name: Dotted path.
        channels: Number of scales.
        disabled: How many are below the threshold in absolute value.
        mean_absolute: Mean of their absolute values.
        histogram: Counts in equal bins of |gamma| from 0 to ``histogram_limit``; larger ones are in the last bin.
    """

    name: str
    channels: int
    disabled: int
    mean_absolute: float
    histogram: tuple[int, ...]

    @property
    def share(self) -> float:
        """Disabled channels over all."""
        return self.disabled / self.channels


@dataclass(frozen=True)
class GammaReport:
    """What :func:`gamma_report` found.

    Attributes:
        layers: One entry per norm layer with scales.
        threshold: Below it a scale counts as off.
        histogram_limit: Upper end of the histograms.
        score: Of ``evaluate`` as the module is, ``None`` without it.
        score_zeroed: With all disabled scales set to exactly zero.
    """

    layers: tuple[LayerGammas, ...]
    threshold: float
    histogram_limit: float
    score: float | None = None
    score_zeroed: float | None = None

    @property
    def share(self) -> float:
        """Disabled channels over all channels of the network."""
        return sum(layer.disabled for layer in self.layers) / sum(layer.channels for layer in self.layers)

    def to_json(self) -> str:
        """All fields and the share."""
        return json.dumps({**asdict(self), "share": self.share})

    def __str__(self) -> str:
        rows = [f"{'layer':<40}{'channels':>10}{'off':>8}{'share':>9}{'mean':>9}"]
        rows += [
            f"{layer.name:<40}{layer.channels:>10,}{layer.disabled:>8,}{layer.share:>9.1%}{layer.mean_absolute:>9.3f}"
            for layer in self.layers
        ]
        rows.append(f"{self.share:.1%} of all channels have |gamma| < {self.threshold:g}")
        if self.score is not None and self.score_zeroed is not None:
            rows.append(f"score {self.score:.4f} as it is, {self.score_zeroed:.4f} with those set to zero")
        return "\n".join(rows)


def gamma_report(
    module: nn.Module,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    evaluate: Callable[[nn.Module], float] | None = None,
    bins: int = 20,
    histogram_limit: float = 2.0,
) -> GammaReport:
    """Counts scales near zero; leaves the module as it is.

    Args:
        module: Network with norm layers.
        threshold: Scales below it in absolute value count as off.
        evaluate: Gives a score such as accuracy; is called twice.
        bins: Of the histograms.
        histogram_limit: Upper end of the histograms.

    Raises:
        UnsupportedModuleError: The network has no norm layer with scales.
        InvalidOptionError: The threshold is negative.
    """
    scales = _scales(module)
    _check_threshold(threshold)
    layers = []
    for name, scale in scales.items():
        size = scale.detach().abs().float()
        counts = torch.histc(size.clamp_max(histogram_limit), bins=bins, min=0.0, max=histogram_limit)
        disabled = int((size < threshold).sum())
        histogram = tuple(int(count) for count in counts.tolist())
        layers.append(LayerGammas(name, len(size), disabled, float(size.mean()), histogram))
    score = score_zeroed = None
    if evaluate is not None:
        score = float(evaluate(module))
        with zeroed_scales(module, threshold=threshold):
            score_zeroed = float(evaluate(module))
    return GammaReport(tuple(layers), threshold, histogram_limit, score, score_zeroed)


@contextmanager
def zeroed_scales(module: nn.Module, *, threshold: float = DEFAULT_THRESHOLD) -> Iterator[nn.Module]:
    """Within the block all scales below ``threshold`` are exactly zero; shifts stay."""
    _check_threshold(threshold)
    kept = {name: scale.detach().clone() for name, scale in _scales(module).items()}
    try:
        with torch.no_grad():
            for name, scale in _scales(module).items():
                scale[kept[name].abs() < threshold] = 0.0
        yield module
    finally:
        with torch.no_grad():
            for name, scale in _scales(module).items():
                scale.copy_(kept[name])


def _scales(module: nn.Module) -> dict[str, nn.Parameter]:
    found = {
        layer.name: layer.parameters["weight"] for layer in find_norm_layers(module) if "weight" in layer.parameters
    }
    if not found:
        raise UnsupportedModuleError(f"{type(module).__name__} has no norm layer with scales")
    return found


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0.0:
        raise InvalidOptionError(f"threshold must not be negative, got {threshold}")
