"""On which inputs an expressed layer is exact: balls round the mean, measured on samples.

P (S, p) inputs of a layer as rows: samples for linear layers, all patches of all images for convolutions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ghn_client.finetune.express.pairing import BlockPair, Matrix


@dataclass(frozen=True, eq=False)
class Domain:
    """A ball in the input space of one layer, per group of its channels; all float64."""

    center: torch.Tensor  # (groups, p)
    radius: torch.Tensor  # (groups,)
    covariance: torch.Tensor  # (groups, p, p) of the measured inputs round the center


def _layer_rows(layer: Matrix, inputs: torch.Tensor) -> torch.Tensor:
    """What each output of ``layer`` is a linear function of, as float64 rows (groups, S, p)."""
    double = inputs.double()
    if isinstance(layer, nn.Linear):
        return double.reshape(1, -1, layer.in_features)
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        double, padding = functional.pad(double, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    patches = functional.unfold(double, layer.kernel_size, layer.dilation, padding, layer.stride)
    rows = patches.movedim(1, 2).reshape(-1, layer.groups, layer.weight[0].numel())
    return rows.movedim(1, 0)


@torch.no_grad()
def watch_inputs(
    module: nn.Module, pairs: Sequence[BlockPair], inputs: torch.Tensor, see: Callable[[str, torch.Tensor], None]
) -> None:
    """Runs ``module`` on ``inputs``, 32 at a time, and hands every layer's rows (groups, S, p) to ``see``."""

    def hook_of(pair: BlockPair) -> Callable[..., None]:
        return lambda _module, given: see(pair.name, _layer_rows(pair.layer, given[0]))

    hooks = [pair.layer.register_forward_pre_hook(hook_of(pair)) for pair in pairs]
    try:
        for chunk in torch.split(inputs, 32):
            module(chunk)
    finally:
        for hook in hooks:
            hook.remove()


def measure_domains(
    module: nn.Module, pairs: Sequence[BlockPair], inputs: torch.Tensor, *, slack: float
) -> dict[str, Domain]:
    """Balls round the mean input of every layer that hold all measured inputs, larger by the factor ``1 + slack``."""
    counts: dict[str, int] = {}
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    largest: dict[str, torch.Tensor] = {}

    def moments(name: str, rows: torch.Tensor) -> None:
        counts[name] = counts.get(name, 0) + rows.shape[1]
        sums[name] = sums.get(name, 0.0) + rows.sum(1)
        squares[name] = squares.get(name, 0.0) + torch.einsum("gsp,gsq->gpq", rows, rows)

    def radii(name: str, rows: torch.Tensor) -> None:
        distances = (rows - means[name][:, None]).norm(dim=2).max(dim=1).values
        largest[name] = torch.maximum(largest.get(name, torch.zeros_like(distances)), distances)

    watch_inputs(module, pairs, inputs, moments)
    means = {name: total / counts[name] for name, total in sums.items()}
    watch_inputs(module, pairs, inputs, radii)
    return {
        name: Domain(
            mean,
            (1.0 + slack) * largest[name].clamp_min(1e-12),
            squares[name] / counts[name] - torch.einsum("gp,gq->gpq", mean, mean),
        )
        for name, mean in means.items()
    }
