"""ConvNeXt: depthwise 7x7 convolutions and two-layer perceptrons with layer normalisation.

Reference: Liu et al. 2022, "A ConvNet for the 2020s" (arXiv:2201.03545).

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import Conv2d, Linear, TokenMlp


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """``x + scale * mlp(norm(depthwise(x)))``."""

    def __init__(self, channels: int, configuration: ConvNeXtConfiguration) -> None:
        super().__init__()
        kernel = configuration.kernel
        self.depthwise = Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = TokenMlp(channels, configuration.mlp_ratio * channels)
        self.layer_scale = None
        if configuration.layer_scale:
            self.layer_scale = nn.Parameter(torch.full((channels,), configuration.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        branch = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        if self.layer_scale is not None:
            branch = branch * self.layer_scale
        return x + branch.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """Patch stem, stages with norm and strided convolution in between, global average, norm, classifier."""

    def __init__(self, configuration: ConvNeXtConfiguration, interface: Interface) -> None:
        super().__init__()
        channels, patch = configuration.widths[0], configuration.patch
        self.stem = nn.Sequential(Conv2d(interface.in_channels, channels, patch, stride=patch), ChannelNorm(channels))
        self.stages = nn.Sequential()
        for stage, (width, depth) in enumerate(zip(configuration.widths, configuration.depths, strict=True)):
            blocks = nn.Sequential()
            if stage > 0:
                blocks.append(ChannelNorm(channels))
                blocks.append(Conv2d(channels, width, 2, stride=2))
            blocks.extend(ConvNeXtBlock(width, configuration) for _ in range(depth))
            channels = width
            self.stages.append(blocks)
        self.norm = nn.LayerNorm(channels)
        self.classifier = Linear(channels, interface.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        x = self.stages(self.stem(x))
        return self.classifier(self.norm(x.mean((2, 3))))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class ConvNeXtConfiguration(Configuration):
    """A ConvNeXt.

    Attributes:
        widths: Channels of each stage; each stage but the first halves the resolution.
        patch: Kernel and stride of the first convolution.
        kernel: Kernel of the depthwise convolutions.
        layer_scale: Start of the trainable factor of each branch; 0 for no such factor.
    """

    family: ClassVar[str] = "convnext"
    network: ClassVar[type[nn.Module]] = ConvNeXt

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int = 2
    kernel: int = 7
    mlp_ratio: int = 4
    layer_scale: float = 0.0
