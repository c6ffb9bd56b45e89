"""Densely connected networks: every layer of a block reads the concatenation of all before it.

Reference: Huang et al. 2017, "Densely Connected Convolutional Networks" (arXiv:1608.06993).

Shapes: B examples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import ClassifierHead, Conv2d, make_activation, make_norm, round_channels


def _norm_act_conv(
    channels: int, out_channels: int, kernel: int, configuration: DenseNetConfiguration
) -> nn.Sequential:
    return nn.Sequential(
        make_norm(configuration.norm, channels),
        make_activation(configuration.activation),
        Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=configuration.norm == "none"),
    )


class DenseBlock(nn.Module):
    """Layers that each append ``growth`` channels to what they read."""

    def __init__(self, channels: int, depth: int, configuration: DenseNetConfiguration) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for place in range(depth):
            width = channels + place * configuration.growth
            layer = nn.Sequential()
            if configuration.bottleneck:
                inner = configuration.bottleneck * configuration.growth
                layer.append(_norm_act_conv(width, inner, 1, configuration))
                width = inner
            layer.append(_norm_act_conv(width, configuration.growth, 3, configuration))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + depth * growth, H, W)."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1) if len(features) > 1 else x))
        return torch.cat(features, 1)


class DenseNet(nn.Sequential):
    """Stem, dense blocks with transitions in between, and a head."""

    def __init__(self, configuration: DenseNetConfiguration, interface: Interface) -> None:
        super().__init__()
        channels = configuration.stem_width
        bias, stride = configuration.norm == "none", configuration.stem_stride
        self.stem = Conv2d(interface.in_channels, channels, 3, stride=stride, padding=1, bias=bias)
        self.blocks = nn.Sequential()
        for stage, depth in enumerate(configuration.depths):
            self.blocks.append(DenseBlock(channels, depth, configuration))
            channels += depth * configuration.growth
            if stage < len(configuration.depths) - 1:
                kept = round_channels(channels * configuration.compression)
                transition = _norm_act_conv(channels, kept, 1, configuration)
                transition.append(nn.AvgPool2d(2))
                self.blocks.append(transition)
                channels = kept
        final_norm = make_norm(configuration.norm, channels)
        self.final = nn.Sequential(final_norm, make_activation(configuration.activation))
        self.head = ClassifierHead(channels, interface.num_classes)


@dataclass(frozen=True, slots=True)
class DenseNetConfiguration(Configuration):
    """A densely connected network.

    Attributes:
        growth: Channels that each layer adds.
        depths: Layers in each block.
        bottleneck: Channels of the 1x1 convolution before each 3x3 one, in units of ``growth``; 0 for none.
        compression: Share of the channels that a transition keeps.
    """

    family: ClassVar[str] = "densenet"
    network: ClassVar[type[nn.Module]] = DenseNet

    growth: int
    depths: tuple[int, ...]
    bottleneck: int = 4
    compression: float = 0.5
    stem_width: int = 24
    stem_stride: int = 1
    norm: str = "batch"
    activation: str = "relu"
