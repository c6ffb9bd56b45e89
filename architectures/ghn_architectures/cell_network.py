"""Networks of repeated cells in the manner of DeepNets-1M.

References: Liu et al. 2019, "DARTS" (arXiv:1806.09055); Knyazev et al. 2021 (arXiv:2110.13100), appendix A.

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.cells import CELL_OPERATIONS, CellGenotype, Genotype, convolution
from ghn_architectures.layers import ClassifierHead, Conv2d, conv_norm, embedding_parameter, make_norm


class Cell(nn.Module):
    """One cell: two inputs brought to a common shape, the steps of its genotype, and their concatenation.

    ``in_channels`` are those of the last but one and the last cell's outputs, and ``input_stride`` relates these two's
    resolutions; each step has ``channels``, and ``stride`` is that of the operations that read the cell's inputs.
    """

    def __init__(
        self,
        genotype: CellGenotype,
        in_channels: tuple[int, int],
        channels: int,
        stride: int,
        input_stride: int,
        configuration: CellNetworkConfiguration,
    ) -> None:
        super().__init__()
        self.genotype = genotype
        self.inputs = nn.ModuleDict()
        for value in sorted(genotype.used_inputs):
            value_stride = input_stride if value == 0 else 1
            if configuration.preprocess or in_channels[value] != channels or value_stride > 1:
                self.inputs[str(value)] = convolution(
                    in_channels[value], channels, 1, stride=value_stride, norm=configuration.norm
                )
        self.steps = nn.ModuleList(
            nn.ModuleList(
                CELL_OPERATIONS[name](channels, stride=stride if value < 2 else 1, norm=configuration.norm)
                for name, value in zip(step.operations, step.inputs, strict=True)
            )
            for step in genotype.steps
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """(B, C0, H0, W0) and (B, C1, H, W) -> (B, outputs * channels, H', W')."""
        values = [before, last]
        for name, layer in self.inputs.items():
            values[int(name)] = layer(values[int(name)])
        for step, operations in zip(self.genotype.steps, self.steps, strict=True):
            terms = [layer(values[value]) for layer, value in zip(operations, step.inputs, strict=True)]  # type: ignore[call-overload]
            values.append(terms[0] if len(terms) == 1 else terms[0] + terms[1])
        outputs = [values[2 + place] for place in self.genotype.outputs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class PositionEmbedding(nn.Module):
    """A trainable tensor added to a feature of side S."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = embedding_parameter(1, channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, C, S, S)."""
        return x + self.weight


class CellNetwork(nn.Module):
    """Stem, cells that each read the two before them, and a head."""

    def __init__(self, configuration: CellNetworkConfiguration, interface: Interface) -> None:
        super().__init__()
        self.stem, size = _make_stem(configuration, interface)
        channels = configuration.channels
        before, last, input_stride = channels, channels, 1
        self.cells = nn.ModuleList()
        for place in range(configuration.num_cells):
            is_reduction = place in configuration.reductions and size > 1
            genotype = configuration.genotype.reduction if is_reduction else configuration.genotype.normal
            channels *= configuration.multiplier if is_reduction else 1
            stride = 2 if is_reduction else 1
            self.cells.append(Cell(genotype, (before, last), channels, stride, input_stride, configuration))
            before, last, input_stride = last, channels * len(genotype.outputs), stride
            size = -(-size // stride)
        spatial = None if configuration.pooled else size
        self.head = ClassifierHead(last, interface.num_classes, hidden=configuration.head, spatial=spatial)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class CellNetworkConfiguration(Configuration):
    """A network of cells.

    Attributes:
        genotype: The two cells.
        num_cells: Number of cells L; cells L // 3 and 2 L // 3 halve the resolution.
        channels: Channels of each value inside the first cells.
        multiplier: Factor of the channels at each reduction.
        stem: ``simple`` (one convolution), ``strided`` (two convolutions, stride 2) or ``patch``.
        stem_kernel: Kernel of the stem; patch size for ``patch``.
        stem_pool: Whether a max pooling halves the resolution after a simple stem.
        preprocess: Whether a 1x1 convolution precedes each cell's inputs even where shapes fit.
        positions: Whether a position embedding is added after a patch stem.
    """

    family: ClassVar[str] = "cells"
    network: ClassVar[type[nn.Module]] = CellNetwork

    genotype: Genotype
    num_cells: int
    channels: int
    multiplier: int = 2
    stem: str = "simple"
    stem_kernel: int = 3
    stem_pool: bool = False
    preprocess: bool = True
    positions: bool = False
    pooled: bool = True
    head: tuple[int, ...] = ()
    norm: str = "batch"

    @property
    def reductions(self) -> frozenset[int]:
        """Places of the cells that halve the resolution."""
        if self.genotype.is_isotropic:
            return frozenset()
        return frozenset({self.num_cells // 3, 2 * self.num_cells // 3})


def _make_stem(configuration: CellNetworkConfiguration, interface: Interface) -> tuple[nn.Sequential, int]:
    """The first layers, and the side of their output."""
    channels, kernel, norm = configuration.channels, configuration.stem_kernel, configuration.norm
    if configuration.stem == "patch":
        bias = norm == "none"
        stem = nn.Sequential(Conv2d(interface.in_channels, channels, kernel, stride=kernel, bias=bias))
        if norm != "none":
            stem.append(make_norm(norm, channels))
        size = interface.image_size // kernel
        if configuration.positions:
            stem.append(PositionEmbedding(channels, size))
        return stem, size
    if configuration.stem == "strided":
        half = max(channels // 2, 8)
        first = conv_norm(interface.in_channels, half, kernel, stride=2, norm=norm, activation="relu")
        return nn.Sequential(*first, *conv_norm(half, channels, 3, norm=norm)), -(-interface.image_size // 2)
    stem = conv_norm(interface.in_channels, channels, kernel, norm=norm)
    if configuration.stem_pool:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        return stem, -(-interface.image_size // 2)
    return stem, interface.image_size
