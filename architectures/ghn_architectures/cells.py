"""Cells in the manner of DeepNets-1M: their operations, and their wiring as data, drawn at random.

References: Liu et al. 2019, "DARTS" (arXiv:1806.09055); Knyazev et al. 2021 (arXiv:2110.13100), table 1 and appendix A.

Shapes: B examples, C channels, H x W positions, T = H * W tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ghn_architectures.draw import Draw
from ghn_architectures.layers import Conv2d, EncoderBlock, SqueezeExcite, heads_for, make_norm

_MAX_TRIES = 1000


def convolution(in_channels: int, channels: int, kernel: int, *, stride: int, norm: str) -> nn.Sequential:
    """ReLU, convolution, norm: (B, in_channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
    conv = Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    return _after_relu(norm, channels, conv)


def _after_relu(norm: str, channels: int, *convolutions: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), *convolutions, *(() if norm == "none" else (make_norm(norm, channels),)))


def _square(channels: int, *, stride: int, norm: str, kernel: int) -> nn.Module:
    return convolution(channels, channels, kernel, stride=stride, norm=norm)


def _depthwise(channels: int, *, stride: int, norm: str, kernel: int, dilation: int) -> nn.Module:
    """ReLU, depthwise convolution (dilated or not), 1x1 convolution, norm."""
    window: dict[str, Any] = {"stride": stride, "padding": dilation * (kernel // 2), "dilation": dilation}
    bias = norm == "none"
    depthwise = Conv2d(channels, channels, kernel, groups=channels, bias=bias, **window)
    return _after_relu(norm, channels, depthwise, Conv2d(channels, channels, 1, bias=bias))


def _factorized(channels: int, *, stride: int, norm: str) -> nn.Module:
    """ReLU, 1x7 convolution, 7x1 convolution, norm."""
    bias = norm == "none"
    rows = Conv2d(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3), bias=bias)
    columns = Conv2d(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0), bias=bias)
    return _after_relu(norm, channels, rows, columns)


def _pool(channels: int, *, stride: int, norm: str, kind: Callable[..., nn.Module]) -> nn.Module:
    return kind(3, stride=stride, padding=1)


def _skip(channels: int, *, stride: int, norm: str) -> nn.Module:
    return nn.Identity() if stride == 1 else convolution(channels, channels, 1, stride=stride, norm=norm)


def _gate(channels: int, *, stride: int, norm: str) -> nn.Module:
    gate = SqueezeExcite(channels, max(channels // 4, 8))
    return gate if stride == 1 else nn.Sequential(nn.MaxPool2d(3, stride=stride, padding=1), gate)


class AttentionOperation(nn.Module):
    """A transformer block over all positions of a feature."""

    def __init__(self, channels: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.block = EncoderBlock(channels, num_heads=heads_for(channels, 16), mlp_ratio=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.block(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))  # type: ignore[no-any-return]


CELL_OPERATIONS: dict[str, Callable[..., nn.Module]] = {
    "max_pool_3x3": partial(_pool, kind=nn.MaxPool2d),
    "avg_pool_3x3": partial(_pool, kind=nn.AvgPool2d),
    "skip_connect": _skip,
    "sep_conv_3x3": partial(_depthwise, kernel=3, dilation=1),
    "sep_conv_5x5": partial(_depthwise, kernel=5, dilation=1),
    "dil_conv_3x3": partial(_depthwise, kernel=3, dilation=2),
    "dil_conv_5x5": partial(_depthwise, kernel=5, dilation=2),
    "conv_1x1": partial(_square, kernel=1),
    "conv_7x1_1x7": _factorized,
    "conv_3x3": partial(_square, kernel=3),
    "conv_5x5": partial(_square, kernel=5),
    "conv_7x7": partial(_square, kernel=7),
    "msa": AttentionOperation,
    "cse": _gate,
}
"""Makes each operation for C channels, from (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""

OPERATIONS = ("none", *CELL_OPERATIONS)
FREE_OPERATIONS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
_LARGE = ("conv_5x5", "conv_7x7")


@dataclass(frozen=True, slots=True)
class Step:
    """One inner value of a cell: the sum of operations on earlier values.

    Attributes:
        operations: Names in ``OPERATIONS``, none of them ``none``; one or two.
        inputs: The value that each operation reads: 0 and 1 are the outputs of the last but one and the last cell,
            ``2 + i`` is step ``i``.
    """

    operations: tuple[str, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CellGenotype:
    """The wiring of one cell; steps that nothing reads have been taken out.

    Attributes:
        steps: Inner values in order.
        outputs: Steps whose values the cell concatenates.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @property
    def used_inputs(self) -> frozenset[int]:
        """Which of the two inputs (0 and 1) are read."""
        return frozenset(value for step in self.steps for value in step.inputs if value < 2)

    @property
    def operations(self) -> tuple[str, ...]:
        """All operations of the cell."""
        return tuple(name for step in self.steps for name in step.operations)


@dataclass(frozen=True, slots=True)
class Genotype:
    """The two cells that a network repeats.

    Attributes:
        normal: Cell that keeps the resolution.
        reduction: Cell that halves it.
    """

    normal: CellGenotype
    reduction: CellGenotype

    @property
    def is_isotropic(self) -> bool:
        """Whether the network keeps one resolution throughout, as those with self-attention do."""
        return "msa" in self.normal.operations


def draw_genotype(draw: Draw, *, steps: int, allowed: tuple[str, ...] = OPERATIONS) -> Genotype:
    """A random pair of cells with at most ``steps`` steps that make a connected, sensible network."""
    reduction_operations = tuple(name for name in allowed if name != "msa")
    if draw.chance(0.5):
        reduction_operations = tuple(name for name in reduction_operations if name in FREE_OPERATIONS)
    for _ in range(_MAX_TRIES):
        kept = _draw_outputs(draw, steps)
        normal = _draw_cell(draw, steps, kept, allowed)
        reduction = _draw_cell(draw, steps, kept, reduction_operations)
        if _is_sensible(normal, must_learn=True) and _is_sensible(reduction, must_learn=False):
            return Genotype(normal, reduction)
    raise AssertionError(f"no sensible genotype among {_MAX_TRIES} of {allowed}")


def _draw_outputs(draw: Draw, steps: int) -> tuple[int, ...]:
    if steps > 1 and draw.chance(0.5):
        return (*(step for step in range(steps - 1) if draw.chance(0.5)), steps - 1)
    return tuple(range(steps))


def _draw_cell(draw: Draw, steps: int, outputs: tuple[int, ...], allowed: tuple[str, ...]) -> CellGenotype:
    wiring: list[Step] = []
    for step in range(steps):
        first, second = draw.sample(range(2 + step), 2)
        names = [draw.choice([name for name in allowed if name != "none" or steps > 1]) for _ in range(2)]
        pairs = [(name, value) for name, value in zip(names, (first, second), strict=True) if name != "none"]
        if not pairs:
            pairs = [("skip_connect", max(first, second))]
        wiring.append(Step(tuple(name for name, _ in pairs), tuple(value for _, value in pairs)))
    return _without_dead_steps(wiring, outputs)


def _without_dead_steps(steps: list[Step], outputs: tuple[int, ...]) -> CellGenotype:
    live = set(outputs)
    for index in range(len(steps) - 1, -1, -1):
        if index in live:
            live |= {value - 2 for value in steps[index].inputs if value >= 2}
    place = {old + 2: new + 2 for new, old in enumerate(sorted(live))} | {0: 0, 1: 1}
    kept = tuple(
        Step(steps[old].operations, tuple(place[value] for value in steps[old].inputs)) for old in sorted(live)
    )
    return CellGenotype(kept, tuple(place[old + 2] - 2 for old in outputs))


def _is_sensible(cell: CellGenotype, *, must_learn: bool) -> bool:
    """Whether a cell reads the cell before it, has weights, and not too many costly operations."""
    names = cell.operations
    has_layers = any(name not in (*FREE_OPERATIONS, "cse") for name in names)
    return (
        1 in cell.used_inputs
        and (has_layers or not must_learn)
        and names.count("cse") <= (1 if has_layers else 0)
        and sum(name in _LARGE for name in names) <= 1
        and names.count("msa") <= 2
    )
