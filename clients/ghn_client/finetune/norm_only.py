"""``norm_only``: tune the affine parameters of the normalization layers and nothing else; and what the scales say.

What it can express: Giannou, Rajput and Papailiopoulos, arXiv:2302.07937 (see ``express/``); what it reaches when
trained: Frankle, Schwab and Morcos, arXiv:2003.00152, who report that it switches off about a third of random features
(a gamma with ``|gamma| < 0.01`` counts as off); for transformers LN-tuning, arXiv:2312.11420.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ghn_client.batchnorm import UPDATE, check_statistics, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError, require_known
from ghn_client.finetune.handle import FineTuneHandle, Lifecycle, Part
from ghn_client.finetune.inserted_norms import (
    add_affine,
    fold_inserted_norms,
    insert_norms,
    layers_without_norm,
    remove_affine,
    remove_inserted_norms,
)
from ghn_client.finetune.matrix_layers import norm_layers, parameter_groups, parameters_under, resolve_head

#: What to do about layers without a norm layer, and norm layers without affine parameters.
MISSING = ("ignore", "insert")
#: Bins of the histograms of |gamma|, and their upper end.
BINS, HISTOGRAM_LIMIT = 20, 2.0


def norm_only(
    module: nn.Module,
    *,
    head: bool | str | Sequence[str] = True,
    statistics: str = UPDATE,
    missing: str = "ignore",
    after: Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
) -> FineTuneHandle:
    """Makes the norm layers of ``module`` (and its head) trainable and freezes the rest.

    Finds BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm, also of other libraries.

    Args:
        module: Any network. No wrapper is put around it, and no value changes.
        head: Tune the classifier too: ``True`` for the last linear layer, ``False`` for norm layers alone, or dotted
            paths.
        statistics: ``update``, ``keep`` or ``freeze`` those of BatchNorm; see ``ghn_client.batchnorm``.
        missing: ``insert`` hangs an identity norm layer on every matrix layer without one, and makes norm layers with
            ``affine=False`` affine; the function is unchanged at insertion. ``ignore`` tunes what is there.
        after: With ``insert``, the layers to follow instead of all that lack a norm layer.
        calibration: With ``insert``, batches from which the new layers take their running statistics.

    Returns:
        The handle; ``handle.parameters()`` are ready optimizer groups without weight decay.

    Raises:
        UnsupportedModuleError: There is no norm layer, and none was asked to be inserted.
        InvalidOptionError: An option has an unknown value, or ``calibration`` is empty. The module is unchanged then.
    """
    require_known(missing, MISSING, field="missing")
    check_statistics(statistics)
    head_names = resolve_head(module, head)
    inserted: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    if missing == "insert":
        wanted = layers_without_norm(module) if after is None else tuple(after)
        inserted = insert_norms(module, after=wanted, calibration=calibration) if wanted else ()
        affine = add_affine(module)  # cannot fail, as an insertion can
    tuned = parameters_under(module, norm_layers(module))
    if not tuned:
        raise UnsupportedModuleError(
            f"{type(module).__name__} has no affine norm layer; pass missing='insert' to add identity norm layers"
        )
    config = {
        "head": list(head_names),
        "statistics": statistics,
        "missing": missing,
        "after": [name.rpartition(".")[0] for name in inserted] or None,
    }
    buffers = {f"{name}.{buffer}" for name in inserted for buffer in ("running_mean", "running_var")}
    buffers |= set(travelling_statistics(module, statistics))
    part = Part("norm_only", config, module, parameter_groups(module, "norm", tuned, head_names), sorted(buffers))

    def restore() -> None:
        remove_inserted_norms(module.get_submodule(name.rpartition(".")[0]) for name in inserted)
        remove_affine(module, affine)

    lifecycle = Lifecycle(restore=restore, fold=partial(fold_inserted_norms, module, inserted))
    return FineTuneHandle(part, statistics=statistics, lifecycle=lifecycle)


@dataclass(frozen=True)
class LayerGammas:
    """Scales of one norm layer."""

    name: str  # dotted path
    channels: int  # number of scales
    disabled: int  # how many are below the threshold in absolute value
    mean_absolute: float  # mean of their absolute values
    # counts in equal bins of |gamma| from 0 to ``HISTOGRAM_LIMIT``; larger ones are in the last bin
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class GammaReport:
    """What :func:`gamma_report` found."""

    layers: tuple[LayerGammas, ...]  # one entry per norm layer with scales
    threshold: float  # below it a scale counts as off
    score: float | None = None  # of ``evaluate`` as the module is, ``None`` without it
    score_zeroed: float | None = None  # with all disabled scales set to exactly zero

    @property
    def share(self) -> float:
        """Disabled channels over all channels of the network."""
        return sum(layer.disabled for layer in self.layers) / sum(layer.channels for layer in self.layers)

    def __str__(self) -> str:
        rows = [f"{'layer':<40}{'channels':>10}{'off':>8}{'share':>9}{'mean':>9}"]
        rows += [
            f"{layer.name:<40}{layer.channels:>10,}{layer.disabled:>8,}{layer.disabled / layer.channels:>9.1%}"
            f"{layer.mean_absolute:>9.3f}"
            for layer in self.layers
        ]
        rows.append(f"{self.share:.1%} of all channels have |gamma| < {self.threshold:g}")
        if self.score is not None and self.score_zeroed is not None:
            rows.append(f"score {self.score:.4f} as it is, {self.score_zeroed:.4f} with those set to zero")
        return "\n".join(rows)


@torch.no_grad()
def gamma_report(
    module: nn.Module,
    *,
    threshold: float = 1e-2,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> GammaReport:
    """Counts scales below ``threshold`` in absolute value; leaves the module as it is.

    ``evaluate`` gives a score such as accuracy; it is called twice, the second time with those scales at exactly zero.

    Raises:
        UnsupportedModuleError: The network has no norm layer with scales.
        InvalidOptionError: The threshold is negative.
    """
    found = {name: getattr(layer, "weight", None) for name, layer in norm_layers(module).items()}
    scales = {name: scale for name, scale in found.items() if isinstance(scale, nn.Parameter)}
    if not scales:
        raise UnsupportedModuleError(f"{type(module).__name__} has no norm layer with scales")
    if not threshold >= 0.0:
        raise InvalidOptionError(f"threshold must not be negative, got {threshold}")
    layers = []
    for name, scale in scales.items():
        size = scale.abs().float()
        counts = torch.histc(size.clamp_max(HISTOGRAM_LIMIT), bins=BINS, min=0.0, max=HISTOGRAM_LIMIT)
        histogram = tuple(int(count) for count in counts.tolist())
        layers.append(LayerGammas(name, len(size), int((size < threshold).sum()), float(size.mean()), histogram))
    score = score_zeroed = None
    if evaluate is not None:
        score = float(evaluate(module))
        kept = {name: scale.clone() for name, scale in scales.items()}
        try:
            for scale in scales.values():
                scale[scale.abs() < threshold] = 0.0
            score_zeroed = float(evaluate(module))
        finally:
            for name, scale in scales.items():
                scale.copy_(kept[name])
    return GammaReport(tuple(layers), threshold, score, score_zeroed)
