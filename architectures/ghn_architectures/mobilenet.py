"""Inverted residuals with depthwise convolutions, with or without squeeze-and-excitation gates.

References: Sandler et al. 2018, "MobileNetV2" (arXiv:1801.04381); Tan and Le 2019, "EfficientNet" (arXiv:1905.11946).

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import ClassifierHead, SqueezeExcite, conv_norm, round_channels


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, gate, 1x1 projection; a shortcut where the shape stays."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, stage: int, configuration: MobileNetConfiguration
    ) -> None:
        super().__init__()
        norm, activation = configuration.norm, configuration.activation
        expansion, kernel = configuration.expansions[stage], configuration.kernels[stage]
        inner = in_channels * expansion
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.append(conv_norm(in_channels, inner, 1, norm=norm, activation=activation))
        self.branch.append(
            conv_norm(inner, inner, kernel, stride=stride, groups=inner, norm=norm, activation=activation)
        )
        if configuration.squeeze:
            squeezed = round_channels(inner / configuration.squeeze)
            self.branch.append(SqueezeExcite(inner, squeezed, hard=activation == "hardswish"))
        self.branch.append(conv_norm(inner, out_channels, 1, norm=norm))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return x + self.branch(x) if self.has_shortcut else self.branch(x)  # type: ignore[no-any-return]


class MobileNet(nn.Sequential):
    """Stem, stages of inverted residuals, optional 1x1 convolution, and a head."""

    def __init__(self, configuration: MobileNetConfiguration, interface: Interface) -> None:
        super().__init__()
        norm, activation = configuration.norm, configuration.activation
        channels = configuration.stem_width
        self.stem = conv_norm(
            interface.in_channels, channels, 3, stride=configuration.stem_stride, norm=norm, activation=activation
        )
        self.stages = nn.Sequential()
        for stage, (width, depth) in enumerate(zip(configuration.widths, configuration.depths, strict=True)):
            blocks = nn.Sequential()
            for place in range(depth):
                stride = configuration.strides[stage] if place == 0 else 1
                blocks.append(InvertedResidual(channels, width, stride, stage, configuration))
                channels = width
            self.stages.append(blocks)
        self.final: nn.Module = nn.Identity()
        if configuration.head_width:
            self.final = conv_norm(channels, configuration.head_width, 1, norm=norm, activation=activation)
            channels = configuration.head_width
        self.head = ClassifierHead(channels, interface.num_classes)


@dataclass(frozen=True, slots=True)
class MobileNetConfiguration(Configuration):
    """A network of inverted residuals.

    Attributes:
        strides: Stride of the first block of each stage.
        expansions: Inner channels over input channels of each stage's blocks.
        kernels: Kernel of each stage's depthwise convolutions.
        squeeze: Reduction of the gate, of the inner channels; 0 for no gate.
        head_width: Channels of the last 1x1 convolution; 0 for none.
    """

    family: ClassVar[str] = "mobilenet"
    network: ClassVar[type[nn.Module]] = MobileNet

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...]
    expansions: tuple[int, ...]
    kernels: tuple[int, ...]
    stem_width: int = 32
    stem_stride: int = 1
    squeeze: int = 0
    head_width: int = 0
    norm: str = "batch"
    activation: str = "relu"
