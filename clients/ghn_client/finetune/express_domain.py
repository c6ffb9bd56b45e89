"""On which inputs an expressed layer is exact: balls round the mean, measured on samples.

P (S, p) inputs of a layer as rows: samples for linear layers, all patches of all images for convolutions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ghn_client.finetune.certificate import batches_of
from ghn_client.finetune.frozen_network import BlockPair, Matrix


@dataclass(frozen=True, eq=False)
class Domain:
    """A ball in the input space of one layer, per group of its channels.

    Attributes:
        center: (groups, p) float64.
        radius: (groups,) float64.
        covariance: (groups, p, p) of the measured inputs round the center.
    """

    center: torch.Tensor
    radius: torch.Tensor
    covariance: torch.Tensor

    def distance(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest distance from the center over the radius; at most 1 inside.

        Args:
            rows: (groups, S, p).
        """
        ratios: torch.Tensor = (rows - self.center[:, None]).norm(dim=2) / self.radius[:, None]
        return ratios.max()


def layer_rows(layer: Matrix, inputs: torch.Tensor) -> torch.Tensor:
    """What each output of ``layer`` is a linear function of, as float64 rows (groups, S, p)."""
    if isinstance(layer, nn.Linear):
        return inputs.double().reshape(1, -1, layer.in_features)
    double = inputs.double()
    if layer.padding_mode != "zeros":
        mode = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}[layer.padding_mode]
        double = functional.pad(double, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    elif isinstance(layer.padding, str):
        double = functional.pad(double, layer._reversed_padding_repeated_twice)
        padding = (0, 0)
    else:
        padding = layer.padding
    patches = functional.unfold(double, layer.kernel_size, layer.dilation, padding, layer.stride)
    rows = patches.movedim(1, 2).reshape(-1, layer.groups, layer.weight[0].numel())
    return rows.movedim(1, 0)


def watch_inputs(
    module: nn.Module,
    pairs: Sequence[BlockPair],
    inputs: torch.Tensor,
    see: Callable[[str, torch.Tensor], None],
    batch: int,
) -> None:
    """Runs ``module`` on ``inputs`` and hands every layer's rows (groups, S, p) to ``see``, batch by batch."""

    def hook_of(pair: BlockPair) -> Callable[..., None]:
        return lambda _module, given: see(pair.name, layer_rows(pair.layer, given[0]))

    hooks = [pair.layer.register_forward_pre_hook(hook_of(pair)) for pair in pairs]
    try:
        with torch.no_grad():
            for chunk in batches_of(inputs, batch):
                module(chunk)
    finally:
        for hook in hooks:
            hook.remove()


def measure_domains(
    module: nn.Module, pairs: Sequence[BlockPair], inputs: torch.Tensor, *, slack: float, batch: int = 32
) -> dict[str, Domain]:
    """Balls round the mean input of every layer that hold all measured inputs, larger by the factor ``1 + slack``.

    Args:
        module: The target.
        pairs: Its layers.
        inputs: (S, ...) samples.
        slack: Room for unseen inputs.
        batch: Samples per forward pass.
    """
    counts: dict[str, int] = {}
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}

    def moments(name: str, rows: torch.Tensor) -> None:
        product = torch.einsum("gsp,gsq->gpq", rows, rows)
        counts[name] = counts.get(name, 0) + rows.shape[1]
        sums[name] = sums[name] + rows.sum(1) if name in sums else rows.sum(1)
        squares[name] = squares[name] + product if name in squares else product

    watch_inputs(module, pairs, inputs, moments, batch)
    means = {name: total / counts[name] for name, total in sums.items()}
    largest = {name: torch.zeros(len(mean), dtype=mean.dtype, device=mean.device) for name, mean in means.items()}

    def radii(name: str, rows: torch.Tensor) -> None:
        distances = (rows - means[name][:, None]).norm(dim=2).max(dim=1).values
        largest[name] = torch.maximum(largest[name], distances)

    watch_inputs(module, pairs, inputs, radii, batch)
    return {
        name: Domain(
            mean,
            (1.0 + slack) * largest[name].clamp_min(1e-12),
            squares[name] / counts[name] - torch.einsum("gp,gq->gpq", mean, mean),
        )
        for name, mean in means.items()
    }


def norm_map(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a BatchNorm in eval mode, in float64."""
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    scale = scale if weight is None else scale * weight.detach().double()
    return scale, (0.0 if bias is None else bias.detach().double()) - scale * mean
