"""Residual networks for small images, of basic, bottleneck and pre-activation blocks, wide or not, normed or not.

References: He et al. 2016, "Deep Residual Learning" (arXiv:1512.03385) and "Identity Mappings" (arXiv:1603.05027);
Zagoruyko and Komodakis 2016, "Wide Residual Networks" (arXiv:1605.07146); Xie et al. 2017, "Aggregated Residual
Transformations" (arXiv:1611.05431).

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import (
    ClassifierHead,
    Conv2d,
    SqueezeExcite,
    conv_norm,
    make_activation,
    make_norm,
    round_channels,
)


class Shortcut(nn.Module):
    """What a residual block adds to its branch where resolution or channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, configuration: ResNetConfiguration) -> None:
        super().__init__()
        # Odd sizes are rounded up, as by the strided convolution of the branch.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if configuration.shortcut == "pool" and stride > 1 else None
        self.stride = 1 if self.pool is not None else stride
        self.extra_channels = out_channels - in_channels
        self.project: nn.Module | None = None
        if configuration.shortcut != "pad" or self.extra_channels < 0:
            norm = "none" if configuration.block == "preactivation" else configuration.norm
            self.project = conv_norm(in_channels, out_channels, 1, stride=self.stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.pool is not None:
            x = self.pool(x)
        if self.project is not None:
            return self.project(x)  # type: ignore[no-any-return]
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


class ResidualBlock(nn.Module):
    """``activation(branch(x) + shortcut(x))`` with a branch of two or three convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, configuration: ResNetConfiguration) -> None:
        super().__init__()
        norm, activation, kernel = configuration.norm, configuration.activation, configuration.kernel
        if configuration.block == "bottleneck":
            inner = round_channels(out_channels / configuration.expansion)
            groups = configuration.groups
            layers = [
                conv_norm(in_channels, inner, 1, norm=norm, activation=activation),
                conv_norm(inner, inner, kernel, stride=stride, groups=groups, norm=norm, activation=activation),
                conv_norm(inner, out_channels, 1, norm=norm),
            ]
        else:
            layers = [
                conv_norm(in_channels, out_channels, kernel, stride=stride, norm=norm, activation=activation),
                conv_norm(out_channels, out_channels, kernel, norm=norm),
            ]
        if configuration.squeeze:
            layers.append(nn.Sequential(SqueezeExcite(out_channels, max(out_channels // configuration.squeeze, 4))))
        self.branch = nn.Sequential(*layers)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = Shortcut(in_channels, out_channels, stride, configuration) if changes else nn.Identity()
        self.branch_scale = _branch_scale(configuration)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        branch = self.branch(x)
        if self.branch_scale != 1.0:
            branch = branch * self.branch_scale
        return self.activation(branch + self.shortcut(x))  # type: ignore[no-any-return]


class PreactivationBlock(nn.Module):
    """``x + conv(act(norm(conv(act(norm(x))))))``; a shortcut that changes the shape follows the first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, configuration: ResNetConfiguration) -> None:
        super().__init__()
        bias, kernel = configuration.norm == "none", configuration.kernel
        padding = kernel // 2
        self.norm1 = make_norm(configuration.norm, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)
        self.norm2 = make_norm(configuration.norm, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, kernel, padding=padding, bias=bias)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = Shortcut(in_channels, out_channels, stride, configuration) if changes else None
        self.branch_scale = _branch_scale(configuration)
        self.activation = make_activation(configuration.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        active = self.activation(self.norm1(x))
        branch = self.conv2(self.activation(self.norm2(self.conv1(active))))
        if self.branch_scale != 1.0:
            branch = branch * self.branch_scale
        return branch + (x if self.shortcut is None else self.shortcut(active))  # type: ignore[no-any-return]


def _branch_scale(configuration: ResNetConfiguration) -> float:
    """Constant factor of branches: without norm, variances would otherwise double in every block."""
    return 1.0 if configuration.norm != "none" else float(sum(configuration.depths)) ** -0.5


class ResNet(nn.Sequential):
    """Stem, stages of residual blocks, global average pooling and classifier."""

    def __init__(self, configuration: ResNetConfiguration, interface: Interface) -> None:
        super().__init__()
        preactivation = configuration.block == "preactivation"
        channels = configuration.widths[0]
        if configuration.block == "bottleneck":
            channels = round_channels(channels / configuration.expansion)
        channels = configuration.stem_width or channels
        kernel, stride = configuration.stem_kernel, configuration.stem_stride
        norm, activation = configuration.norm, configuration.activation
        self.stem = conv_norm(interface.in_channels, channels, kernel, stride=stride, norm=norm, activation=activation)
        if preactivation:
            self.stem = nn.Sequential(self.stem[0])
        if configuration.stem_pool:
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        block = PreactivationBlock if preactivation else ResidualBlock
        self.stages = nn.Sequential()
        for stage, (width, depth) in enumerate(zip(configuration.widths, configuration.depths, strict=True)):
            blocks = nn.Sequential()
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(block(channels, width, stride, configuration))
                channels = width
            self.stages.append(blocks)
        self.final: nn.Module = nn.Identity()
        if preactivation:
            self.final = nn.Sequential(make_norm(norm, channels), make_activation(activation))
        self.head = ClassifierHead(channels, interface.num_classes, hidden=configuration.head)


@dataclass(frozen=True, slots=True)
class ResNetConfiguration(Configuration):
    """A residual network.

    Attributes:
        widths: Output channels of each stage; each stage but the first halves the resolution.
        block: ``basic`` (two 3x3), ``bottleneck`` (1x1, 3x3, 1x1) or ``preactivation`` (norm and ReLU first).
        stem_width: Channels after the first convolution; 0 for those inside the first block.
        stem_pool: Whether a max pooling of stride 2 follows the first convolution.
        kernel: Kernel of the blocks' spatial convolutions.
        groups: Groups of the bottleneck's spatial convolution.
        expansion: Output channels of a bottleneck over its inner channels.
        shortcut: ``conv`` (1x1 with stride), ``pool`` (average pooling, then 1x1) or ``pad`` (slicing, zero channels).
        norm: ``batch`` or ``none``; without norm, branches are scaled by a constant.
        squeeze: Reduction of a squeeze-and-excitation gate at the end of each branch; 0 for no gate.
    """

    family: ClassVar[str] = "resnet"
    network: ClassVar[type[nn.Module]] = ResNet

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    block: str = "basic"
    stem_width: int = 0
    stem_kernel: int = 3
    stem_stride: int = 1
    stem_pool: bool = False
    kernel: int = 3
    groups: int = 1
    expansion: int = 4
    shortcut: str = "conv"
    norm: str = "batch"
    activation: str = "relu"
    squeeze: int = 0
    head: tuple[int, ...] = ()
