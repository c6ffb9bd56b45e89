"""A tiny family of convolutional networks with graphs written by hand, so that training tests need no generator."""

from __future__ import annotations

import random

import torch
from torch import nn

from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec


class SmallConvnet(nn.Module):
    """Convolution, BatchNorm and ReLU ``depth`` times, then global pooling and a linear classifier."""

    def __init__(self, width: int, depth: int, kernel: int, in_channels: int, num_classes: int, stride_at: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        channels = in_channels
        for index in range(depth):
            stride = 2 if index == 0 or index == stride_at else 1
            self.convolutions.append(nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False))
            self.norms.append(nn.BatchNorm2d(width))
            channels = width
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = torch.relu(norm(convolution(features)))
        return self.head(features.mean((2, 3)))


class SmallArchitecture:
    """Architecture number ``index`` of the family."""

    family = "small"

    def __init__(self, index: int, *, image_size: int = 32, in_channels: int = 3, num_classes: int = 10) -> None:
        draw = random.Random(index)
        self.width = draw.choice((8, 16, 24, 32))
        self.depth = draw.randint(2, 5)
        self.kernel = draw.choice((3, 5))
        self.stride_at = draw.randint(1, self.depth)
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size

    @property
    def multiply_adds(self) -> int:
        total, channels, size = 0, self.in_channels, self.image_size
        for index in range(self.depth):
            size = (size + 1) // 2 if index in (0, self.stride_at) else size
            total += channels * self.width * self.kernel**2 * size**2
            channels = self.width
        return total

    def build(self, *, initialize: bool = True) -> nn.Module:
        return SmallConvnet(self.width, self.depth, self.kernel, self.in_channels, self.num_classes, self.stride_at)

    def graph(self) -> ArchitectureGraph:
        nodes = [Node("input")]
        channels = self.in_channels
        for index in range(self.depth):
            shape = (self.width, channels, self.kernel, self.kernel)
            nodes.append(Node("conv", weight=ParameterSpec(f"convolutions.{index}.weight", shape)))
            weight = ParameterSpec(f"norms.{index}.weight", (self.width,))
            bias = ParameterSpec(f"norms.{index}.bias", (self.width,))
            nodes.append(Node("bn", weight=weight, norm_bias=bias))
            channels = self.width
        nodes.append(Node("glob_avg"))
        head = ParameterSpec("head.weight", (self.num_classes, self.width))
        nodes.append(Node("conv", weight=head, is_head=True))
        nodes.append(Node("bias", weight=ParameterSpec("head.bias", (self.num_classes,)), is_head=True))
        edges = tuple((index, index + 1) for index in range(len(nodes) - 1))
        return ArchitectureGraph(tuple(nodes), edges)
