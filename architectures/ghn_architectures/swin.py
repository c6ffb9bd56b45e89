"""Hierarchical transformers with attention in shifted windows.

Reference: Liu et al. 2021, "Swin Transformer" (arXiv:2103.14030).

Shapes: B examples, H x W positions, C channels, S side of a window, T = S * S tokens of a window, N windows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Configuration, Interface
from ghn_architectures.layers import (
    Conv2d,
    Linear,
    SelfAttention,
    TokenLinear,
    TokenMlp,
    embedding_parameter,
    heads_for,
)


def _split_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * N, T, C)."""
    # (B, H, W, C) -> (B, H / S, S, W / S, S, C) -> (B, H / S, W / S, S, S, C)
    x = torch.unflatten(torch.unflatten(x, 2, (-1, window)), 1, (-1, window)).transpose(2, 3)
    return x.flatten(0, 2).flatten(1, 2)


def _join_windows(x: Tensor, window: int, size: int) -> Tensor:
    """(B * N, T, C) -> (B, H, W, C) with H = W = ``size``."""
    per_side = size // window
    # (B * N, T, C) -> (B, H / S, W / S, S, S, C) -> (B, H / S, S, W / S, S, C)
    x = torch.unflatten(torch.unflatten(x, 1, (window, window)), 0, (-1, per_side, per_side)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _relative_positions(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, (T, T)."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + window - 1
    column_offset = columns[:, None] - columns[None, :] + window - 1
    return row_offset * (2 * window - 1) + column_offset


def _shifted_mask(size: int, window: int, shift: int) -> Tensor:
    """0 where two tokens of a shifted window were neighbours before the shift, -100 elsewhere, (N, 1, T, T)."""
    region = torch.zeros(size)
    region[size - window : size - shift] = 1
    region[size - shift :] = 2
    regions = (3 * region[:, None] + region[None, :])[None, :, :, None]
    windows = _split_windows(regions, window).squeeze(2)
    return (windows[:, None, :] != windows[:, :, None]).float().mul(-100.0).unsqueeze(1)


class SwinBlock(nn.Module):
    """Attention in windows, shifted or not, then a perceptron, each with its norm and shortcut."""

    position_index: Tensor
    mask: Tensor | None

    def __init__(self, channels: int, size: int, configuration: SwinConfiguration, *, is_shifted: bool) -> None:
        super().__init__()
        self.size = size
        self.window = max(side for side in range(1, configuration.window + 1) if size % side == 0)
        self.shift = self.window // 2 if is_shifted and self.window < size else 0
        num_heads = heads_for(channels, configuration.head_channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, num_heads)
        self.position_bias = embedding_parameter((2 * self.window - 1) ** 2, num_heads)
        self.register_buffer("position_index", _relative_positions(self.window), persistent=False)
        mask = _shifted_mask(size, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = TokenMlp(channels, configuration.mlp_ratio * channels)

    def logit_bias(self, batch_size: int) -> Tensor:
        """What is added to the attention logits, (1, heads, T, T) or (B * N, heads, T, T)."""
        # (T, T, heads) -> (1, heads, T, T)
        bias = self.position_bias[self.position_index].permute(2, 0, 1).unsqueeze(0)
        return bias if self.mask is None else (bias + self.mask).repeat(batch_size, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        branch = self.norm1(x)
        if self.shift:
            branch = torch.roll(branch, (-self.shift, -self.shift), (1, 2))
        branch = self.attention(_split_windows(branch, self.window), logit_bias=self.logit_bias(x.shape[0]))
        branch = _join_windows(branch, self.window, self.size)
        if self.shift:
            branch = torch.roll(branch, (self.shift, self.shift), (1, 2))
        x = x + branch
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Four neighbouring positions become one with twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = TokenLinear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2C)."""
        parts = [x[:, row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))  # type: ignore[no-any-return]


class Swin(nn.Module):
    """Patches, stages of window attention with merging in between, norm, mean, classifier."""

    def __init__(self, configuration: SwinConfiguration, interface: Interface) -> None:
        super().__init__()
        channels, patch = configuration.channels, configuration.patch
        size = interface.image_size // patch
        self.patches = Conv2d(interface.in_channels, channels, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(channels)
        self.stages = nn.Sequential()
        for stage, depth in enumerate(configuration.depths):
            if stage > 0 and size % 2 == 0:
                self.stages.append(PatchMerging(channels))
                channels, size = 2 * channels, size // 2
            blocks = (SwinBlock(channels, size, configuration, is_shifted=place % 2 == 1) for place in range(depth))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(channels)
        self.classifier = Linear(channels, interface.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        x = self.patch_norm(self.patches(x).permute(0, 2, 3, 1))  # (B, C, h, w) -> (B, h, w, C)
        return self.classifier(self.norm(self.stages(x)).mean((1, 2)))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class SwinConfiguration(Configuration):
    """A Swin transformer.

    Attributes:
        channels: Channels of the first stage; each later one has twice as many at half the resolution.
        depths: Blocks in each stage; every second one shifts its windows.
        head_channels: Channels of each attention head.
        window: Side of the attention windows; smaller where it does not divide the resolution.
    """

    family: ClassVar[str] = "swin"
    network: ClassVar[type[nn.Module]] = Swin

    channels: int
    depths: tuple[int, ...]
    head_channels: int = 16
    patch: int = 2
    window: int = 4
    mlp_ratio: int = 4
